"""DICOM SEG: every frame on the right slice, reasons where there can be none."""

import highdicom
import numpy as np
import pydicom
import pytest

from bad_inputs import bundled, ct_series, dicom, gray, write_odd
from zeroseg.errors import ZeroSegError
from zeroseg.io import Image, find_cases, read_image, write_dicom_seg


def read(path):
    return read_image(find_cases(path)[0])


def frames_by_source(path, segment):
    """SOPInstanceUID of the source -> (rows, columns) mask, as the file's own references say."""
    seg = highdicom.seg.segread(path)
    masks = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = {}
    for frame, mask in zip(seg.PerFrameFunctionalGroupsSequence, masks, strict=True):
        if frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber == segment:
            found[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID] = (mask, frame)
    return found


def test_frames_of_a_shuffled_series_refer_to_their_slices(tmp_path):
    files = ct_series(tmp_path / "ct", count=6)
    image = read(tmp_path / "ct")
    labels = np.zeros(image.shape, np.uint8)
    for k in (1, 2, 4):  # label 1: an unsymmetric block that moves with the slice
        labels[10 + k : 20, 30 : 33 + k, k] = 1
    labels[100:110, 5:9, 4] = 7
    path = write_dicom_seg(image, labels, tmp_path / "seg.dcm", label_names={7: "lesion"}, algorithm_version="1.2")
    assert path == tmp_path / "seg.dcm"

    first, second = frames_by_source(path, 1), frames_by_source(path, 2)
    sources = [pydicom.dcmread(file) for file in files]
    assert set(first) == {sources[k].SOPInstanceUID for k in (1, 2, 4)}
    assert set(second) == {sources[4].SOPInstanceUID}
    for k in (1, 2, 4):
        mask, frame = first[sources[k].SOPInstanceUID]
        np.testing.assert_array_equal(mask, labels[:, :, k].T == 1)
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, sources[k].ImagePositionPatient)
    np.testing.assert_array_equal(second[sources[4].SOPInstanceUID][0], labels[:, :, 4].T == 7)

    seg = highdicom.seg.segread(path)
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["Segment 1", "lesion"]
    item = seg.SegmentSequence[0]
    assert (item.SegmentAlgorithmType, item.SegmentAlgorithmName) == ("AUTOMATIC", "ZeroSeg")
    assert item.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "1.2"
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
    assert seg.SeriesInstanceUID != sources[0].SeriesInstanceUID


def test_highdicom_gives_back_the_volume_by_sources(tmp_path):
    ct_series(tmp_path / "ct", count=4)
    image = read(tmp_path / "ct")
    labels = np.zeros(image.shape, np.uint8)
    labels[20:50, 40:45, 1:3] = 1
    path = write_dicom_seg(image, labels, tmp_path / "seg.dcm")
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in image.source]
    found = highdicom.seg.segread(path).get_pixels_by_source_instance(uids, combine_segments=True)
    np.testing.assert_array_equal(found.transpose(2, 1, 0), labels)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm", "image_dfl.dcm"])
def test_single_images(name, tmp_path):
    image = read(bundled(name))
    labels = np.zeros(image.shape, bool)
    labels[10:20, 30:34] = True
    path = write_dicom_seg(image, labels, tmp_path / "seg.dcm", algorithm_type="SEMIAUTOMATIC")
    ((mask, _),) = frames_by_source(path, 1).values()
    np.testing.assert_array_equal(mask, labels)
    dataset = pydicom.dcmread(path)
    assert dataset.Modality == "SEG" and dataset.SegmentSequence[0].SegmentAlgorithmType == "SEMIAUTOMATIC"


def test_anonymised_source(tmp_path):
    dicom("CT_small.dcm", PatientID=None, PatientName=None, StudyID=None, AccessionNumber=None).save_as(tmp_path / "a")
    image = read(tmp_path / "a")
    path = write_dicom_seg(image, np.ones(image.shape, np.uint8), tmp_path / "seg.dcm")
    assert not pydicom.dcmread(path).PatientID


def test_a_garbled_header_is_a_reason_too(tmp_path):
    data = bytearray(bundled("MR_small.dcm").read_bytes())
    tag = data.index(b"\x08\x00\x50\x00SH")  # AccessionNumber
    data[tag + 4 : tag + 6] = b"S\xf0"  # a value representation that does not exist
    (tmp_path / "garbled.dcm").write_bytes(data)
    image = read(tmp_path / "garbled.dcm")
    with pytest.raises(ZeroSegError, match="cannot carry one"):
        write_dicom_seg(image, np.ones(image.shape, np.uint8), tmp_path / "seg.dcm")


def test_nothing_found_writes_nothing(tmp_path):
    image = read(bundled("CT_small.dcm"))
    assert write_dicom_seg(image, np.zeros(image.shape, np.uint8), tmp_path / "seg.dcm") is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (lambda folder: write_odd("alpha", folder), "not DICOM"),
        (lambda folder: bundled("SC_rgb_rle.dcm"), "colour image"),
        (lambda folder: bundled("ExplVR_BigEnd.dcm"), "colour image"),
        (lambda folder: bundled("693_J2KI.dcm"), "Frame Of Reference"),
    ],
)
def test_sources_that_cannot_carry_a_seg(source, reason, tmp_path):
    image = read(source(tmp_path))
    with pytest.raises(ZeroSegError, match=reason) as caught:
        write_dicom_seg(image, np.ones(image.shape, np.uint8), tmp_path / "seg.dcm")
    assert "\n" not in str(caught.value) and not (tmp_path / "seg.dcm").exists()


def test_labels_that_do_not_fit(tmp_path):
    image = read(bundled("CT_small.dcm"))
    for labels in (np.ones((5, 5), np.uint8), np.ones(image.shape, np.float32)):
        with pytest.raises(ValueError, match="labels"):
            write_dicom_seg(image, labels, tmp_path / "seg.dcm")


def test_an_image_made_by_hand_is_not_dicom(tmp_path):
    with pytest.raises(ZeroSegError, match="not DICOM"):
        write_dicom_seg(Image(gray()[None].astype(np.float32)), gray(), tmp_path / "seg.dcm")


def test_a_segment_has_its_name_in_any_letters(tmp_path):
    image = read(bundled("CT_small.dcm"))
    labels = np.zeros(image.shape, np.uint8)
    labels[40:60, 40:60] = 1
    path = write_dicom_seg(image, labels, tmp_path / "seg.dcm", label_names={1: "\u809d\u81d3 é"})
    assert pydicom.dcmread(path).SegmentSequence[0].SegmentLabel == "\u809d\u81d3 é"
