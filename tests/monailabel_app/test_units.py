"""The app's own parts: options, labels, names, caches, DICOM SEG; no server."""

from __future__ import annotations

from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from fastapi import HTTPException
from PIL import Image as PILImage
from scipy import ndimage

pytest.importorskip("monailabel")

import dicom_studies
from bad_inputs import ct_series
from dicom_studies import oblique
from lib import rtstruct
from lib.configs import tasks
from lib.datastore import FolderDatastore, write_twin
from lib.engine import Engine
from lib.infers.base import keep_largest, pick, write
from lib.infers.tumor import Tumor
from lib.memory import ByteLimitedCache, bytes_of
from lib.mends import dicom_seg, errors, limits
from lib.sources import source_of
from phantom_studies import OBJECT, SHAPE, phantom, write_series
from zeroseg.attention import Segmentation
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.io import Image, find_cases, read_image, without_shear


@pytest.mark.parametrize(
    ("value", "default", "picked"),
    [
        (["a", "b"], ["a", "b"], "a"),  # nothing was chosen: the list comes back as it is
        ("b", ["a", "b"], "b"),
        (["b"], ["a", "b"], "b"),
        ("false", True, False),
        (True, False, True),
        ("7", 16, 7),
        (2, 2.0, 2.0),
        ("2.5", 2.0, 2.5),
        ("liver", "", "liver"),
    ],
)
def test_an_option_has_the_kind_of_its_default(value, default, picked):
    result = pick("option", value, default)
    assert result == picked and type(result) is type(picked)


@pytest.mark.parametrize(
    ("value", "default"),
    [("c", ["a", "b"]), ("maybe", True), ("x", 1), ("nan", 1.0), (None, 1), ([1], 1.0), (5, "text"), ({}, ["a"])],
)
def test_an_option_that_does_not_fit_is_refused_by_name(value, default):
    with pytest.raises(ZeroSegError, match=r"^option must be"):
        pick("option", value, default)


def test_the_largest_labels_are_kept_and_numbered_without_a_gap():
    labels = np.repeat(np.array([0, 1, 2, 5, 7], np.uint8), [9, 3, 1, 6, 4])
    assert keep_largest(labels, 3) == ([1, 5, 7], 1)
    assert labels.tolist() == [0] * 9 + [1] * 3 + [0] + [2] * 6 + [3] * 4
    assert keep_largest(np.zeros((3, 3), np.uint8), 3) == ([], 0)


def test_named_segments_keep_their_names_when_they_are_numbered_without_a_gap():
    labels = np.repeat(np.array([2, 3, 5], np.uint8), [9, 8, 1]).reshape(3, 6)
    details = {"labels": {"lung": 2}, "nouns": [{"noun": "cell", "label": 1}, {"noun": "lung", "label": 2}]}
    scores = [0.0, 0.2, 0.3, 0.0, 0.5]
    found = Segmentation(labels, np.ones((3, 6), np.float32), scores, "segments", details=details)
    asked = []
    engine = SimpleNamespace(segment=lambda *args, **prompt: asked.append(prompt) or found)
    task = tasks.segments(engine)
    result = task.segment(
        SimpleNamespace(image=SimpleNamespace(is_volume=False)), task.options({"text": " cell, lung "})
    )
    task.fit_labels(result)
    assert asked == [{"text": "cell, lung"}]
    assert task.label_names(result, {}) == {"lung": 1, "segment_02": 2, "segment_03": 3}
    assert result.scores == [0.2, 0.3, 0.5] and [n["label"] for n in result.details["nouns"]] == [None, 1]
    with pytest.raises(ZeroSegError, match="choose select segments"):
        task.segment(None, task.options({"text": "cell", "select": "auto"}))


def test_scores_go_along_with_the_labels_that_are_kept():
    labels = np.repeat(np.array([0, 1, 2, 3], np.uint8), [4, 3, 1, 5]).reshape(1, -1)
    found = Segmentation(labels, np.ones(labels.shape, np.float32), [0.1, 0.2, 0.3], "segments")
    task = tasks.segments(None)
    task.labels = {"segment_01": 1, "segment_02": 2}
    assert task.fit_labels(found) == {1: 1, 3: 2} and found.scores == [0.1, 0.3]
    assert found.notes == ["1 smaller segments left out"] and set(np.unique(found.labels)) == {0, 1, 2}


def test_a_learned_label_keeps_its_name_where_the_others_are_missing_and_when_the_head_is_replaced(tmp_path):
    labels = np.zeros((6, 6), np.uint8)
    labels[2:4, 2:4] = 2
    names = {"liver": 1, "spleen": 2}
    head = SimpleNamespace(describe=lambda: {"labels": names})
    served = {"labels": names}
    heads = SimpleNamespace(head=lambda: head, record=lambda: served)
    engine = SimpleNamespace(
        learned=lambda *args: Segmentation(
            labels.copy(), np.ones((6, 6), np.float32), [0.0, 0.9], "learned", details={}
        ),
        open=lambda path: SimpleNamespace(image=Image(np.zeros((1, 6, 6), np.float32))),
        inferer=SimpleNamespace(backbone=SimpleNamespace(describe=lambda: {"source": "tiny"})),
    )
    task = tasks.learned(engine, heads)
    # A training publishes another head between the answer and its names.
    task.segment = lambda *args, ask=task.segment: (ask(*args), served.update(labels={"spleen": 1, "liver": 2}))[0]
    path, answer = task({"image": str(tmp_path / "a.png"), "result_extension": ".nrrd"})
    assert answer["label_names"] == {"spleen": 2} and answer["scores"] == [0.0, 0.9]
    assert set(np.unique(read_image(find_cases(path)[0]).array)) == {0, 2}


def test_the_cache_forgets_the_least_recently_used_and_keeps_its_limit():
    cache: ByteLimitedCache[bytes] = ByteLimitedCache(10, len)
    cache.put("a", b"1234")
    cache.put("b", b"1234")
    assert cache.get("a") == b"1234"
    cache.put("c", b"1234")  # b is the oldest now
    assert cache.get("b") is None and cache.get("a") is not None and cache.used == 8
    cache.put("a", b"12345")
    assert cache.used == 9
    cache.put("d", b"12345678901")  # larger than the limit
    assert cache.get("d") is None and len(cache) == 2


def test_a_second_prompt_needs_no_second_pass_and_changes_nothing(tiny_backbone, disc, monkeypatch):
    passes = []
    read = type(tiny_backbone).read
    monkeypatch.setattr(type(tiny_backbone), "read", lambda *a, **k: passes.append(1) or read(*a, **k))
    image = torch.from_numpy(disc[0])
    inferer = Engine(tiny_backbone).inferer
    first = inferer.segment(image, points=[[40, 52]])
    again = inferer.segment(image, points=[[40, 52]])
    inferer.replace(refine="none").segment(image, "auto")
    few = [inferer.replace(max_segments=n).segment(image, "segments").labels.max() for n in (16, 2, 16)]
    assert few[0] == few[2] > few[1] and len(passes) == 1
    assert "encode" in first.seconds and "encode" not in again.seconds
    plain = AttentionSegmentationInferer(tiny_backbone).segment(image, points=[[40, 52]])
    for result in (first, again):
        np.testing.assert_array_equal(result.labels, plain.labels)
    inferer.replace(timestep=100).segment(image, points=[[40, 52]])
    inferer.segment(image + 0.01, points=[[40, 52]])
    assert len(passes) == 4  # another setting; another image; and the plain inferer


def test_clicks_are_answered_when_the_attention_had_to_go(tiny_backbone, disc, monkeypatch):
    image = torch.from_numpy(disc[0])
    inferer = Engine(tiny_backbone).inferer
    whole = {
        rule: inferer.segment(image, rule, **p) for rule, p in (("points", {"points": [[40, 52]]}), ("segments", {}))
    }
    inferer.encodings = ByteLimitedCache(0, bytes_of)
    passes = []
    read = type(tiny_backbone).read
    monkeypatch.setattr(type(tiny_backbone), "read", lambda *a, **k: passes.append(1) or read(*a, **k))
    np.testing.assert_array_equal(inferer.segment(image, points=[[40, 52]]).labels, whole["points"].labels)
    assert not passes
    np.testing.assert_array_equal(inferer.segment(image, "segments").labels, whole["segments"].labels)
    assert len(passes) == 1


@pytest.mark.parametrize("axis", [0, 2])
def test_one_slice_of_a_volume_is_segmented_by_itself(tiny_backbone, tmp_path, axis):
    engine = Engine(tiny_backbone, slice_axis=axis)
    entry = engine.open(str(volume_file(tmp_path, "scan")))
    found = engine.segment(entry, "segments", only_slice=9)
    assert found.labels.shape == found.confidence.shape == (24, 24, 24)
    assert set(np.argwhere(found.labels)[:, axis]) == {9}
    alone = engine.inferer.segment(entry.prepared.narrow(axis + 1, 9, 1), "segments", prepared=True)
    np.testing.assert_array_equal(found.labels.take([9], axis), alone.labels)
    np.testing.assert_array_equal(found.confidence.take([9], axis), alone.confidence)
    assert (np.delete(found.confidence, 9, axis) == 1).all()
    head = SimpleNamespace(of_volumes=True)
    for ask in (lambda: engine.segment(entry, "segments", only_slice=24), lambda: engine.learned(entry, head, 24)):
        with pytest.raises(ZeroSegError, match=r"slice 24 lies outside the volume: 0\.\.23"):
            ask()


def volume_file(folder: Path, name: str, scale: float = 1, spacing: float = 3) -> Path:
    """A smooth random volume, 24 voxels a side."""
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((24, 24, 24)), 2)
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image((values * 1000 * scale).astype(np.float32), np.diag([spacing] * 3 + [1])), path)
    return path


def test_a_volume_is_encoded_once_for_all_words(tiny_backbone, tiny_tumor_model, tmp_path, monkeypatch):
    from zeroseg.backbones.maisi import MaisiBackbone
    from zeroseg.backbones.text_encoder import TextEncoder
    from zeroseg.tumor import TumorSegmentationInferer

    engine = Engine(tiny_backbone)
    parts = MaisiBackbone(tiny_tumor_model, device="cpu"), TextEncoder(tiny_tumor_model / "text", device="cpu")
    inferer = TumorSegmentationInferer(*parts, tiny_tumor_model, steps=2)
    config = {"organ": "liver", "text": "", "modality": ["auto", "ct", "mr", "pet"]}
    task = Tumor(engine, inferer, type="segmentation", labels={"tumor": 1}, description="", config=config)
    passes, encode = [], inferer.encode
    monkeypatch.setattr(inferer, "encode", lambda *a: passes.append(1) or encode(*a))

    def ask(name: str, text: str = "liver tumour", modality: str = "ct", **file) -> Segmentation:
        options = task.options({"text": text, "modality": modality})
        return task.segment(engine.open(str(volume_file(tmp_path, name, **file))), options)

    first, again, other = ask("a"), ask("a"), ask("same content, another file", text="hepatic metastasis")
    assert len(passes) == 1
    assert "encode" in first.seconds and "encode" not in again.seconds and "encode" not in other.seconds
    np.testing.assert_array_equal(again.confidence, first.confidence)
    assert other.details["tumor"] == "hepatic metastasis"
    assert 0 < task.encodings.used < task.encodings.limit
    ask("a", modality="mr")
    ask("b", scale=2)
    ask("c", spacing=2)
    assert len(passes) == 4 and len(task.encodings) == 4
    task.encodings = ByteLimitedCache(0, lambda encoded: 1)
    np.testing.assert_array_equal(ask("d", scale=3).confidence, ask("d", scale=3).confidence)
    assert len(passes) == 6, "what is larger than the memory is encoded again"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "a\\b", "a\0b", "a\nb", "x" * 256])
def test_a_name_is_no_path(name):
    assert not errors.is_name(name)


def test_queries_and_paths_are_searched_for_paths():
    errors.check_names("/infer/points", "image=1.2.840.1&output=image")
    errors.check_names("/proxy/dicom/qido/studies/1.2/series", "")
    for path, query in (
        ("/infer/points", "image=../../etc"),
        ("/infer/points", "image=..%2f..%2fetc"),
        ("/session/../etc", ""),
        ("/datastore/label", "label=a&tag=..%2fx"),
        ("/infer/points", "image=%252e%252e%252fetc"),
    ):
        with pytest.raises(errors.Refused, match="no valid name"):
            errors.check_names(path, query)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ZeroSegError("bad"), 422),
        (WeightsError("missing"), 503),
        (MemoryError(), 503),
        (torch.OutOfMemoryError("CUDA out of memory"), 503),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 503),
        (errors.NotFound("gone"), 404),
        (HTTPException(500, "wrong request"), 422),
        (HTTPException(401, "who are you"), 401),
        (FileNotFoundError(2, "No such file"), 503),
        (RuntimeError("bug"), 500),
        (errors.InternalError("bug"), 500),
    ],
)
def test_every_failure_has_a_status_and_a_reason(error, status):
    got, detail = errors.status_and_detail(error)
    assert got == status and len(str(detail)) > 2


def test_a_failure_names_no_folder_of_the_server(tmp_path):
    folder = tmp_path / "the studies"
    write_series(folder / "series", phantom())
    first, *others = sorted((folder / "series").iterdir())
    first.write_bytes(first.read_bytes()[:1000])
    for path in others:
        path.unlink()
    store = FolderDatastore(str(folder), auto_reload=False)
    with pytest.raises(ZeroSegError) as error:
        store.get_image_uri("series")
    assert str(folder) in str(error.value)
    status, detail = errors.status_and_detail(error.value)
    assert status == 422 and detail.startswith("series") and str(tmp_path) not in detail
    # A folder whose name begins like the studies' is none of theirs.
    told = ZeroSegError(f"cannot write a.png into the folder {folder} (full), nor b.png of {folder}2")
    assert errors.status_and_detail(told)[1].startswith("cannot write a.png into the folder the studies (full), nor ")


@pytest.mark.parametrize(
    ("server", "host", "known", "told"),
    [
        ("127.0.0.1", "localhost:8000", "", False),
        ("127.0.0.1", "evil.example:8000", "", True),
        ("127.0.0.1", "10.0.0.5:8000", "", True),
        ("10.0.0.5", "evil.example:8000", "", True),
        ("10.0.0.5", "evil.example:8000", "seg.example.org", True),
        ("10.0.0.5", "10.0.0.5:8000", "seg.example.org", True),
        ("10.0.0.5", "10.0.0.5:8000", "", False),
        ("::1", "[::1]:8000", "", False),
        ("fd00::5", "[fd00::5]:8000", "", False),
        # As nginx of compose.yaml passes them on, and as its health check asks.
        ("172.18.0.3", "seg.example.org", "seg.example.org", False),
        ("172.18.0.3", "localhost:8443", "localhost", False),
        ("127.0.0.1", "127.0.0.1:8000", "localhost", False),
        ("127.0.0.1", "[", "", True),
    ],
)
def test_a_server_answers_to_its_names(monkeypatch, server, host, known, told):
    monkeypatch.setenv("ZEROSEG_ALLOWED_HOSTS", known)
    for origin in (None, f"http://{host}"):
        assert (limits.foreign(server, host, origin) is not None) is told


def test_a_dicom_folder_is_an_image_with_a_nifti_twin_of_the_same_grid(tmp_path):
    write_series(tmp_path / "ct series", phantom())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    store = FolderDatastore(str(tmp_path), auto_reload=False)
    assert store.list_images() == ["ct series"]
    twin = store.get_image_uri("ct series")
    assert source_of(tmp_path / ".converted" / "ct series.nii.gz") == tmp_path / "ct series"
    image = read_image(find_cases(tmp_path / "ct series")[0])
    nifti = nib.load(twin)
    np.testing.assert_allclose(nifti.affine, image.affine, atol=1e-4)
    np.testing.assert_array_equal(nifti.get_fdata(), image.array[0])


def test_extensions_are_known_in_capital_letters_too(tmp_path):
    for name in ("a.PNG", "b.png", "c.TIF", "d.tif"):
        PILImage.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    nib.save(nib.Nifti1Image(phantom(), np.eye(4)), tmp_path / "e.nii.gz")
    (tmp_path / "e.nii.gz").rename(tmp_path / "E.NII.GZ")
    store = FolderDatastore(str(tmp_path), auto_reload=False)
    assert sorted(store.list_images()) == ["E", "a", "b", "c", "d"]
    for image in store.list_images():
        assert Path(store.get_image_uri(image)).is_file()
    assert len(find_cases(tmp_path)) == 5
    store.add_image("f", str(tmp_path / "a.PNG"), {})
    assert Path(store.get_image_uri("f")).name == "f.PNG"


def test_a_folder_beside_a_file_is_not_taken_for_its_source(tmp_path):
    nib.save(nib.Nifti1Image(phantom(), np.eye(4)), tmp_path / "scan.nii.gz")
    write_series(tmp_path / "scan" / "other", phantom())
    (tmp_path / "scan" / "notes.txt").write_text("no image")
    store = FolderDatastore(str(tmp_path), auto_reload=False)
    path = store.get_image_uri("scan")
    assert source_of(Path(path)) == Path(path) == tmp_path / "scan.nii.gz"


def test_a_single_slice_that_is_uploaded_is_no_image(tmp_path):
    """3D Slicer sends one beside a volume, where "Include DICOM files" is chosen."""
    write_series(tmp_path / "series", phantom())
    one = next((tmp_path / "series").iterdir())
    store = FolderDatastore(str(tmp_path / "studies"), auto_reload=False)
    assert store.add_image("IMG0001", str(one), {}) == "IMG0001"
    store.refresh()
    assert store.list_images() == [] and (tmp_path / "studies" / ".dicom" / "IMG0001.dcm").is_file()
    nib.save(nib.Nifti1Image(phantom(), np.eye(4)), tmp_path / "scan.nii.gz")
    store.add_image("scan", str(tmp_path / "scan.nii.gz"), {})
    assert store.list_images() == ["scan"]


def test_monai_labels_own_conversion_has_the_voxel_order_of_our_reader(tmp_path):
    """A click in 3D Slicer is an index of MONAI Label's NIfTI; the mask is made from the DICOM files."""
    from monailabel.datastore.utils.convert import dicom_to_nifti

    write_series(tmp_path / "series", phantom())
    image = read_image(find_cases(tmp_path / "series")[0])
    nifti = nib.load(dicom_to_nifti(str(tmp_path / "series")))
    np.testing.assert_allclose(nifti.affine, image.affine, atol=1e-3)
    np.testing.assert_array_equal(nifti.get_fdata(), image.array[0])


@pytest.mark.parametrize("extension", [".nrrd", ".nii.gz", ".nii"])
def test_a_mask_written_is_on_the_grid_of_its_image(tmp_path, extension):
    affine = np.array([[-1.2, 0.4, 0.1, 10], [0.3, 1.4, -0.2, -20], [0.05, 0.2, 2.9, 30], [0, 0, 0, 1.0]])
    u, _, v = np.linalg.svd(affine[:3, :3])
    affine[:3, :3] = (u @ v) @ np.diag([1.2, 1.4, 2.9])  # oblique, no shear
    nib.save(nib.Nifti1Image(phantom().astype(np.int16), affine), tmp_path / "a.nii.gz")
    image = read_image(find_cases(tmp_path / "a.nii.gz")[0])
    labels = np.zeros(image.shape, np.uint8)
    labels[OBJECT] = 3
    path = write(image, labels, extension, "uint8")
    mask = read_image(find_cases(path)[0])
    np.testing.assert_allclose(mask.affine, affine, atol=1e-4)
    np.testing.assert_array_equal(mask.array[0], labels)
    np.testing.assert_array_equal(dicom_seg.on_grid(mask, image), labels)


@pytest.mark.parametrize("datastore", ["folder", "DICOMweb"])
def test_a_tilted_gantry_is_shown_straight_and_drawn_on_slice_by_slice(tmp_path, datastore):
    from monailabel.datastore.utils.convert import dicom_to_nifti

    ct_series(tmp_path / "series", count=6, step=(0.0, 0.9, 2.5))
    image = read_image(find_cases(tmp_path / "series")[0])
    write_twin(tmp_path / "series", tmp_path / "twin.nii.gz")
    np.testing.assert_allclose(nib.load(tmp_path / "twin.nii.gz").affine, image.affine, atol=1e-4)
    shown = tmp_path / "twin.nii.gz" if datastore == "folder" else dicom_to_nifti(str(tmp_path / "series"))
    # ITK reads it, as 3D Slicer does, and what is drawn there has its grid.
    seen = sitk.ReadImage(str(shown))
    labels = np.zeros(image.shape, np.uint8)
    labels[40:60, 70:90, 1:] = 3
    drawn = sitk.GetImageFromArray(labels.T)
    drawn.CopyInformation(seen)
    sitk.WriteImage(drawn, str(tmp_path / "drawn.nii.gz"))
    submitted = read_image(find_cases(tmp_path / "drawn.nii.gz")[0])
    np.testing.assert_array_equal(dicom_seg.on_grid(submitted, image), labels)
    for extension in (".nrrd", ".nii.gz", ".nii"):
        answer = sitk.ReadImage(write(image, labels, extension, "uint8"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(answer).T, labels)
        for of in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(answer, of)(), getattr(seen, of)(), atol=1e-3)


def test_dicom_seg_takes_names_and_grid_and_refuses_an_empty_mask(tmp_path):
    write_series(tmp_path / "series", phantom())
    image = read_image(find_cases(tmp_path / "series")[0])
    labels = np.zeros(image.shape, np.uint8)
    labels[OBJECT] = 2
    flipped = np.ascontiguousarray(labels[::-1])
    affine = image.affine @ np.array([[-1, 0, 0, image.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(flipped, affine), tmp_path / "mask.nii.gz")  # the same mask on a mirrored grid
    written = dicom_seg.write(str(tmp_path / "series"), str(tmp_path / "mask.nii.gz"), [{"name": "lesion", "idx": 2}])
    seg = pydicom.dcmread(written)
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["lesion"]
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "ZeroSeg" and algorithm.AlgorithmVersion
    shown = np.zeros(image.shape, np.uint8)
    uids = {pydicom.dcmread(p, stop_before_pixels=True).SOPInstanceUID: k for k, p in enumerate(image.source)}
    for frame, groups in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        shown[:, :, uids[uid]] = frame.T
    np.testing.assert_array_equal(shown, labels > 0)
    nib.save(nib.Nifti1Image(np.zeros_like(labels), image.affine), tmp_path / "none.nii.gz")
    with pytest.raises(ZeroSegError, match="empty"):
        dicom_seg.write(str(tmp_path / "series"), str(tmp_path / "none.nii.gz"), [])
    assert dicom_seg.names([3, 5], [{"name": "a"}, {"name": "b"}]) == {3: "a", 5: "b"}


def test_contours_lie_where_the_label_does(tmp_path):
    pytest.importorskip("rt_utils")
    affine = oblique((1.5, 1.5, 4.0), (20, -15), (60, 90, -30))
    series = dicom_studies.write(tmp_path / "ct", "CT", phantom(), affine, numbers=range(SHAPE[2], 0, -1))
    labels = np.zeros(SHAPE, np.uint8)
    labels[OBJECT] = 2
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "label.nii.gz")
    written = rtstruct.write(tmp_path / "ct", tmp_path / "label.nii.gz", [{"name": "lesion", "idx": 2}])
    struct = pydicom.dcmread(written)
    assert struct.Modality == "RTSTRUCT" and [roi.ROIName for roi in struct.StructureSetROISequence] == ["lesion"]
    to_voxel = np.linalg.inv(dicom_studies.TO_LPS @ affine)
    corners = []
    for contour in struct.ROIContourSequence[0].ContourSequence:
        points = np.reshape([float(v) for v in contour.ContourData], (-1, 3))
        voxels = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
        k = round(voxels[0, 2])
        assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == series.instances[k]
        corners.append([*voxels.min(0), *voxels.max(0)])
    low, high = np.min(corners, 0)[:3], np.max(corners, 0)[3:]
    np.testing.assert_allclose(low, [part.start for part in OBJECT], atol=0.02)
    np.testing.assert_allclose(high, [part.stop - 1 for part in OBJECT], atol=0.02)
    write_series(tmp_path / "oblong", phantom())
    nib.save(nib.Nifti1Image(labels, read_image(find_cases(tmp_path / "oblong")[0]).affine), tmp_path / "other.nii.gz")
    with pytest.raises(ZeroSegError, match="not square"):
        rtstruct.write(tmp_path / "oblong", tmp_path / "other.nii.gz")


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"select": "segments"}, "AUTOMATIC"),
        ({"select": "tumor"}, "AUTOMATIC"),
        ({"select": "points"}, "SEMIAUTOMATIC"),
        ({"select": "text"}, "SEMIAUTOMATIC"),
        ({"select": ["segments"]}, "SEMIAUTOMATIC"),  # a client may save a label with params of its own
        (None, "SEMIAUTOMATIC"),  # saved by a person
    ],
)
def test_dicom_seg_says_whether_a_person_took_part(tmp_path, params, kind):
    write_series(tmp_path / "series", phantom())
    image = read_image(find_cases(tmp_path / "series")[0])
    labels = np.zeros(image.shape, np.uint8)
    labels[OBJECT] = 1
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "mask.nii.gz")

    def answer():
        dicom_seg.remember(params)
        return dicom_seg.write(str(tmp_path / "series"), str(tmp_path / "mask.nii.gz"))

    seg = pydicom.dcmread(copy_context().run(answer))
    assert [s.SegmentAlgorithmType for s in seg.SegmentSequence] == [kind]


def test_a_folder_of_several_series_is_refused_by_name(tmp_path):
    write_series(tmp_path / "mixed" / "a", phantom())
    write_series(tmp_path / "mixed" / "b", phantom())
    with pytest.raises(ZeroSegError, match="holds 2 images"):
        write_twin(tmp_path / "mixed", tmp_path / "x.nii.gz")


def test_a_mask_drawn_on_slices_stacked_straight_stays_in_its_slices():
    affine = np.array([[0.8, 0, 0, 4], [0, 0.8, 1.3, 5], [0, 0, 4.8, -7], [0, 0, 0, 1]])
    labels = np.zeros((10, 10, 5), np.float32)
    labels[3:6, 3:6, :] = 1
    image = Image(np.zeros((1, 10, 10, 5), np.float32), affine)
    mask = Image(labels[None], without_shear(affine))
    np.testing.assert_array_equal(dicom_seg.on_grid(mask, image), labels)
