"""Finding cases: formats, DICOM series, names, and what is left out."""

import logging
import shutil

import pytest

from bad_inputs import bundled, ct_series, dicom, write_bad, write_odd
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases


def names(folder, **options):
    return {case.stem: case.kind for case in find_cases(folder, **options)}


def test_formats_are_found_recursively_whatever_the_case_of_the_extension(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_odd("bmp", tmp_path)
    write_odd("2d_nifti", tmp_path / "a")
    write_odd("alpha", tmp_path / "a" / "b").rename(tmp_path / "a" / "b" / "UPPER.PNG")
    shutil.copy(bundled("MR_small.dcm"), tmp_path / "a" / "1.2.840.77")
    assert names(tmp_path) == {"plain": "picture", "flat": "nifti", "UPPER": "picture", "1.2.840.77": "dicom"}


def test_content_decides_over_extension(tmp_path):
    shutil.copy(bundled("anatomical.nii"), tmp_path / "volume.png")
    write_odd("png_named_jpg", tmp_path)
    shutil.copy(bundled("MR_small.dcm"), tmp_path / "mr.png")
    assert names(tmp_path) == {"volume": "nifti", "liar": "picture", "mr.png": "dicom"}


def test_single_files(tmp_path):
    path = write_odd("zipped_nifti_named_nii", tmp_path)
    (case,) = find_cases(path)
    assert (case.stem, case.paths, case.kind) == ("liar", (path,), "nifti")
    first = ct_series(tmp_path / "ct", count=3)[0]
    (case,) = find_cases(first)  # one file of a series, asked for by name
    assert (case.paths, case.kind) == ((first,), "dicom")


def test_nothing_to_find(tmp_path):
    with pytest.raises(ZeroSegError, match="no such file"):
        find_cases(tmp_path / "missing")
    with pytest.raises(ZeroSegError, match="no image found"):
        find_cases(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ZeroSegError, match="no image found"):
        find_cases(tmp_path)
    with pytest.raises(ZeroSegError, match="not a known image format"):
        find_cases(tmp_path / "notes.txt")


def test_hidden_unknown_and_leaving_files_are_left_out(tmp_path, caplog):
    data, outside = tmp_path / "data", tmp_path / "outside"
    (data / ".cache").mkdir(parents=True)
    outside.mkdir()
    write_odd("alpha", data)
    write_odd("bmp", data / ".cache")
    write_odd("bmp", data).rename(data / ".hidden.bmp")
    (data / "notes.txt").write_text("hello")
    secret = write_odd("palette", outside)
    (data / "link.png").symlink_to(secret)
    (data / "folder").symlink_to(outside, target_is_directory=True)
    (data / "inner.png").symlink_to(data / "alpha.png")
    with caplog.at_level(logging.WARNING):
        assert names(data) == {"alpha": "picture", "inner": "picture"}
    assert "notes.txt" in caplog.text and "link.png" in caplog.text


def test_excluded_folder(tmp_path):
    (tmp_path / "out").mkdir()
    write_odd("alpha", tmp_path)
    write_odd("palette", tmp_path / "out")
    assert set(names(tmp_path, exclude=tmp_path / "out")) == {"alpha"}


def test_clashing_names_are_made_unique_independent_of_order(tmp_path):
    for folder in ("p1", "p2"):
        (tmp_path / folder).mkdir()
        write_odd("alpha", tmp_path / folder).rename(tmp_path / folder / "scan.png")
    write_odd("cmyk", tmp_path / "p1").rename(tmp_path / "p1" / "SCAN.jpg")
    write_odd("bmp", tmp_path / "p1").rename(tmp_path / "p1" / "own.bmp")
    assert set(names(tmp_path)) == {"p1_scan", "p2_scan", "SCAN_jpg", "own"}
    # a folder named like the way out of a clash cannot bring the clash back
    (tmp_path / "p1" / "p1_scan.bmp").write_bytes((tmp_path / "p1" / "own.bmp").read_bytes())
    stems = [case.stem.casefold() for case in find_cases(tmp_path)]
    assert len(set(stems)) == len(stems) == 5


def test_series_are_grouped_and_other_dicom_stays_single(tmp_path):
    slices = ct_series(tmp_path / "study" / "ct", count=4)
    other = ct_series(tmp_path / "study" / "ct2", count=2, seed=1, SeriesNumber=7)
    for path in other:
        path.rename(tmp_path / "study" / "ct" / f"other_{path.name}")  # two series in one folder
    for view in (1, 2):  # two views of an X-ray examination share a series, but are no volume
        dataset = dicom("MR_small.dcm", Modality="DX", ImagePositionPatient=None, ImageOrientationPatient=None)
        dataset.SOPInstanceUID += f".{view}"
        dataset.save_as(tmp_path / "study" / f"view{view}.dcm")
    cases = {case.stem: case for case in find_cases(tmp_path)}
    assert set(cases) == {"ct_series1", "ct_series7", "view1", "view2"}
    assert cases["ct_series1"].kind == "dicom_series" and set(cases["ct_series1"].paths) == set(slices)
    assert len(cases["ct_series7"].paths) == 2
    assert cases["view1"].kind == "dicom"


def test_series_in_the_folder_itself_takes_its_name(tmp_path):
    ct_series(tmp_path / "liver", count=3)
    assert names(tmp_path / "liver") == {"liver": "dicom_series"}


def test_damaged_dicom_is_a_case_of_its_own(tmp_path):
    write_bad("text_named_dcm", tmp_path)
    write_bad("dicom_without_pixels", tmp_path)
    assert names(tmp_path) == {"text": "dicom", "report": "dicom"}


def test_detached_pixels_belong_to_their_header(tmp_path):
    import numpy as np
    import SimpleITK as sitk

    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "v.mhd"))
    (case,) = find_cases(tmp_path)
    assert case.paths == (tmp_path / "v.mhd", tmp_path / "v.raw")
