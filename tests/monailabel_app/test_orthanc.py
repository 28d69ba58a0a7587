"""The server over a real Orthanc: series in, masks on their voxels out, DICOM SEG stored and read again."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import requests

pytest.importorskip("monailabel")

from monailabel.client.client import MONAILabelClient

import dicom_series
from dicom_studies import TO_LPS, Series
from orthanc import Orthanc, missing, orthanc
from serving import Server, serving
from zeroseg import __version__
from zeroseg.backbones.weights import MODELS
from zeroseg.io import find_cases, read_image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


@pytest.fixture(scope="module")
def series(store, tmp_path_factory) -> dict[str, Series]:
    folder = tmp_path_factory.mktemp("series")
    written = [write(folder / write.__name__) for write in (dicom_series.ct, dicom_series.mr, dicom_series.cr)]
    for one in written:
        store.push(one.folder)
    return {one.modality: one for one in written}


@pytest.fixture(scope="module")
def server(store, series, tmp_path_factory):
    with serving(store.dicom_web, tmp_path_factory.mktemp("server"), "--resolution", "128") as running:
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> MONAILabelClient:
    return MONAILabelClient(server.url, str(tmp_path_factory.mktemp("client")))


def infer(server: Server, model: str, image: str, output: str, **params) -> requests.Response:
    """As OHIF asks: uncompressed NRRD of uint8 unless a DICOM SEG is wanted."""
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, **params}
    return requests.post(
        f"{server.url}/infer/{model}?image={image}&output={output}", data={"params": json.dumps(params)}, timeout=300
    )


def mask_of(answer: requests.Response, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (X, Y, Z) and affine of an answered NRRD."""
    assert answer.status_code == 200, answer.text
    path = folder / "mask.nrrd"
    path.write_bytes(answer.content)
    image = read_image(find_cases(path)[0])
    return image.array[0].astype(np.uint8), image.affine


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.count_nonzero(a & b) / max(1, np.count_nonzero(a) + np.count_nonzero(b))


def volume_of(seg: pydicom.Dataset, series: Series, number: int) -> np.ndarray:
    """One segment of a DICOM SEG on the series' voxels, each frame laid where its own attributes say it is.

    The place comes from the frame's position for a series, and from the image it refers to for a CR; the two must agree.
    """
    volume = np.zeros(series.volume.shape, bool)
    masks = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    assert (seg.Columns, seg.Rows) == series.volume.shape[:2] and len(masks) == seg.NumberOfFrames
    for frame, mask in zip(seg.PerFrameFunctionalGroupsSequence, masks, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        k = series.instances.index(source.ReferencedSOPInstanceUID)
        if series.modality != "CR":
            position = frame.PlanePositionSequence[0].ImagePositionPatient
            np.testing.assert_allclose(position, (TO_LPS @ series.affine @ [0, 0, k, 1])[:3], atol=1e-3)
        assert mask.any() and not volume[:, :, k].any()  # no empty frame, none twice
        volume[:, :, k] = mask.T > 0
    return volume


def check(seg: pydicom.Dataset, series: Series, labels: np.ndarray, names: dict[int, str], kind: str) -> None:
    """A DICOM SEG holds these labels, on the slices they belong to, and says where they come from."""
    segments = {int(s.SegmentNumber): s for s in seg.SegmentSequence}
    assert [s.SegmentLabel for s in segments.values()] == list(names.values())
    for (number, segment), label in zip(segments.items(), names, strict=True):
        np.testing.assert_array_equal(volume_of(seg, series, number), labels == label)
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("ZeroSeg", __version__)
        assert (segment.SegmentAlgorithmName, segment.SegmentAlgorithmType) == ("ZeroSeg", kind)
    assert (seg.Modality, seg.SOPClassUID) == ("SEG", SEGMENTATION)
    assert seg.StudyInstanceUID == series.study and seg.SeriesInstanceUID != series.uid
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == series.uid
    assert {i.ReferencedSOPInstanceUID for i in referenced.ReferencedInstanceSequence} <= set(series.instances)
    assert (seg.PatientID, str(seg.PatientName)) == ("zeroseg-test", f"{series.modality}^Phantom")


def test_ct_mr_and_cr_are_listed_without_being_asked_for(server, series, client):
    assert requests.get(f"{server.url}/datastore/").json()["total"] == 3
    offered = set()
    for _ in range(40):  # a strategy picks at random
        offered.add(client.next_sample("random", {})["id"])
        if len(offered) == 3:
            break
    assert offered == {one.uid for one in series.values()}


def test_a_click_on_an_oblique_ct_gives_its_object_on_the_voxels_of_the_series(server, series, tmp_path):
    ct = series["CT"]
    labels, affine = mask_of(infer(server, "points", ct.uid, "image", foreground=[ct.click], background=[]), tmp_path)
    assert labels.shape == ct.volume.shape and set(np.unique(labels)) == {0, 1}
    np.testing.assert_allclose(affine, ct.affine, atol=1e-3)
    assert dice(labels > 0, ct.object) > 0.7
    assert dice(labels[:, :, ::-1] > 0, ct.object) < dice(labels > 0, ct.object)


def test_the_client_of_3d_slicer_gets_the_same_mask(client, server, series, tmp_path):
    ct = series["CT"]
    prompt = {"foreground": [ct.click], "background": [], "result_extension": ".nrrd", "result_dtype": "uint8"}
    path, params = client.infer("points", ct.uid, prompt)
    image = read_image(find_cases(Path(path))[0])
    labels, _ = mask_of(infer(server, "points", ct.uid, "image", **prompt), tmp_path)
    np.testing.assert_array_equal(image.array[0], labels)
    assert params["label_names"] == {"object": 1}


@pytest.mark.parametrize("modality", ["CT", "MR", "CR"])
def test_segments_come_back_as_dicom_seg_on_the_right_slices(server, series, store, modality, tmp_path):
    """Asked for as a DICOM SEG, stored as a person's archive would be, and read again from there."""
    one = series[modality]
    options = {"extent": "slice", "max_segments": 4} if modality == "MR" else {"max_segments": 4}
    labels, affine = mask_of(infer(server, "segments", one.uid, "image", **options), tmp_path)
    assert labels.shape == one.volume.shape
    if modality != "CR":
        np.testing.assert_allclose(affine, one.affine, atol=1e-3)
    present = [int(v) for v in np.unique(labels) if v]
    assert len(present) >= 2
    info = [{"name": f"part {label}", "idx": label} for label in present]
    answer = infer(server, "segments", one.uid, "dicom_seg", **options, label_info=info)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/dicom", answer.text[:300]
    seg = pydicom.dcmread(io.BytesIO(answer.content))
    store.store(answer.content)
    [stored] = store.instances(Modality="SEG", SOPInstanceUID=seg.SOPInstanceUID)
    check(stored, one, labels, {label: f"part {label}" for label in present}, "AUTOMATIC")
    assert highdicom.seg.Segmentation.from_dataset(stored, copy=False).number_of_segments == len(present)


def test_a_label_that_is_saved_is_stored_in_orthanc(client, series, store):
    ct = series["CT"]
    path, _ = client.infer("points", ct.uid, {"foreground": [ct.click], "result_extension": ".nrrd"})
    before = {s.SOPInstanceUID for s in store.instances(Modality="SEG")}
    saved = client.save_label(ct.uid, path, "final", {"label_info": [{"name": "round mass", "idx": 1}]})
    assert saved["image"] == ct.uid
    [seg] = [s for s in store.instances(Modality="SEG") if s.SOPInstanceUID not in before]
    check(seg, ct, read_image(find_cases(Path(path))[0]).array[0].astype(np.uint8), {1: "round mass"}, "SEMIAUTOMATIC")


def test_a_dicom_seg_of_a_click_says_that_a_person_took_part(server, series, tmp_path):
    ct = series["CT"]
    labels, _ = mask_of(infer(server, "points", ct.uid, "image", foreground=[ct.click]), tmp_path)
    info = [{"name": "round mass", "idx": 1}]
    answer = infer(server, "points", ct.uid, "dicom_seg", foreground=[ct.click], label_info=info)
    assert answer.status_code == 200, answer.text[:300]
    check(pydicom.dcmread(io.BytesIO(answer.content)), ct, labels, {1: "round mass"}, "SEMIAUTOMATIC")


@pytest.mark.skipif(not (MODELS / "tumor").is_dir(), reason="the bundle holds no tumour model")
def test_a_tumour_asked_for_by_words_comes_back_as_dicom_seg(server, store, tmp_path):
    limb = dicom_series.limb(tmp_path / "limb")
    store.push(limb.folder)
    asked = {"organ": "limb", "text": "soft tissue sarcoma"}
    labels, found_affine = mask_of(infer(server, "tumor", limb.uid, "image", **asked), tmp_path)
    np.testing.assert_allclose(found_affine, limb.affine, atol=1e-3)
    assert dice(labels > 0, limb.object) > 0.4
    info = [{"name": asked["text"], "idx": 1}]
    answer = infer(server, "tumor", limb.uid, "dicom_seg", **asked, label_info=info)
    assert answer.status_code == 200, answer.text[:300]
    store.store(answer.content)
    uid = pydicom.dcmread(io.BytesIO(answer.content)).SOPInstanceUID
    [stored] = store.instances(Modality="SEG", SOPInstanceUID=uid)
    check(stored, limb, labels, {1: asked["text"]}, "AUTOMATIC")


def test_a_text_is_found_on_a_radiograph(server, series, tmp_path):
    """Words for what the drawing shows; which of them the model is how sure of, at this resolution, is the model's affair."""
    cr = series["CR"]
    found, asked = {}, {"certainty": 0.5}
    for word in ("lungs", "heart", "ribs", "chest x-ray"):
        params = infer(server, "text", cr.uid, "json", text=word, absent="empty mask", **asked).json()
        if not params["absent"]:
            found[word] = params["label_names"]
    assert found and all(names == {word: 1} for word, names in found.items())
    labels, _ = mask_of(infer(server, "text", cr.uid, "image", text=next(iter(found)), **asked), tmp_path)
    assert labels.shape == (160, 128, 1) and labels.any() and not labels.all()


def test_an_empty_mask_is_no_dicom_seg_but_a_reason(server, series):
    options = {"text": "lungs", "certainty": 1e6, "absent": "empty mask", "label_info": []}
    answer = infer(server, "text", series["CR"].uid, "dicom_seg", **options)
    assert answer.status_code == 422 and "empty" in answer.json()["detail"]


def test_a_series_that_arrives_later_can_be_segmented(server, store: Orthanc, tmp_path):
    late = dicom_series.cr(tmp_path / "late")
    store.push(late.folder)
    labels, _ = mask_of(infer(server, "segments", late.uid, "image", max_segments=3), tmp_path)
    assert labels.shape == (160, 128, 1)


def test_ohif_gets_its_studies_through_the_server(server, series):
    ct = series["CT"]
    for path in ("", f"/{ct.study}/series", f"/{ct.study}/series/{ct.uid}/metadata"):
        answer = requests.get(f"{server.url}/proxy/dicom/wado/studies{path}", timeout=60)
        assert answer.status_code == 200, path
    assert {i["00080018"]["Value"][0] for i in answer.json()} == set(ct.instances)


def test_unknown_series_and_a_store_that_is_gone_are_said(server, store, series):
    assert infer(server, "segments", "1.2.3", "image").status_code == 404
    store.process.terminate()  # last of this file: nothing needs the store any more
    store.process.wait(15)
    start = time.perf_counter()
    answer = infer(server, "segments", "1.2.4", "image")
    assert answer.status_code == 503 and "DICOM server" in answer.json()["detail"]
    assert time.perf_counter() - start < 10  # soon enough to be read
    assert server.process.poll() is None and requests.get(f"{server.url}/ohif/", timeout=30).status_code == 200
