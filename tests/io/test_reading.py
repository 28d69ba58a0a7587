"""Reading: values, geometry, odd inputs accepted and bad inputs refused."""

import os
import tracemalloc

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import skimage
import tifffile
from PIL import Image as PILImage

from bad_inputs import BAD, OBLIQUE, bundled, color, ct_series, dicom, gray, write_bad, write_nifti, write_odd
from zeroseg.errors import ZeroSegError
from zeroseg.io import find_cases, read_image, slice_affine


def read(path):
    (case,) = find_cases(path)
    return read_image(case)


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_give_one_clear_line(name, tmp_path):
    path = write_bad(name, tmp_path)
    with pytest.raises(ZeroSegError, match=BAD[name].error) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 400 + len(str(path))


def test_large_declared_sizes_are_refused_before_anything_is_allocated(tmp_path):
    for name in ("huge_nifti", "bomb_png"):
        path = write_bad(name, tmp_path)
        tracemalloc.start()
        with pytest.raises(ZeroSegError):
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6


def test_what_a_damaged_header_says_cannot_break_the_line(tmp_path):
    data = bundled("test-SR.dcm").read_bytes()
    uid = b"1.2.840.10008.5.1.4.1.1.88.33"
    (tmp_path / "report.dcm").write_bytes(data.replace(uid, uid[:9] + b"\n\x1b[2J" + uid[14:]))
    with pytest.raises(ZeroSegError, match="without pixels") as caught:
        read(tmp_path / "report.dcm")
    assert str(caught.value).isprintable()


def test_a_file_that_vanished(tmp_path):
    path = write_odd("alpha", tmp_path)
    (case,) = find_cases(path)
    path.unlink()
    with pytest.raises(ZeroSegError, match="No such file"):
        read_image(case)


@pytest.mark.parametrize(
    ("name", "expected", "bits", "modality"),
    [
        ("constant", np.full((1, 30, 20), 77), 8, None),
        ("one_pixel", np.full((1, 1, 1), 9), 8, None),
        ("16_bit_png", gray()[None] * 257.0, 16, None),
        ("16_bit_tiff", gray()[None] * 257.0, 16, None),
        ("16_bit_rgb_tiff", color().transpose(2, 0, 1) * 257.0, 16, "RGB"),
        ("float_tiff", gray()[None] / np.float32(7), None, None),
        ("alpha", color().transpose(2, 0, 1), 8, "RGB"),
        ("gray_alpha", gray()[None], 8, None),
        ("1_bit", (gray()[None] > 100) * 255, 8, None),
        ("bmp", color().transpose(2, 0, 1), 8, "RGB"),
        ("png_named_jpg", color().transpose(2, 0, 1), 8, "RGB"),
    ],
)
def test_odd_pictures_keep_their_values(name, expected, bits, modality, tmp_path):
    image = read(write_odd(name, tmp_path))
    np.testing.assert_allclose(image.array, expected, rtol=1e-6)
    assert image.array.dtype == np.float32 and image.array.flags.c_contiguous
    assert (image.bits, image.modality, image.affine, image.is_volume) == (bits, modality, None, False)
    assert any("alpha" in note for note in image.notes) == ("alpha" in name)


def test_palette_and_cmyk_become_rgb(tmp_path):
    for name, tolerance in (("palette", 40), ("cmyk", 12)):
        image = read(write_odd(name, tmp_path))
        assert image.array.shape == (3, 40, 60)
        assert np.abs(image.array - color().transpose(2, 0, 1)).mean() < tolerance
    with PILImage.open(tmp_path / "palette.png") as picture:
        np.testing.assert_array_equal(
            read(tmp_path / "palette.png").array.transpose(1, 2, 0), np.asarray(picture.convert("RGB"))
        )


def test_exif_orientation_is_applied_and_noted(tmp_path):
    image = read(write_odd("rotated", tmp_path))
    assert image.array.shape == (1, 60, 40)
    assert np.abs(image.array[0] - np.rot90(gray(), -1)).mean() < 3
    assert "EXIF" in image.notes[0]


def test_eight_thousand_pixels_square_are_accepted(tmp_path):
    PILImage.new("L", (8000, 8000), 3).save(tmp_path / "big.png", compress_level=1)
    image = read(tmp_path / "big.png")
    assert image.array.shape == (1, 8000, 8000) and image.array.min() == image.array.max() == 3


@pytest.mark.parametrize(("name", "channels"), [("cell.png", 1), ("ihc.png", 3), ("retina.jpg", 3), ("logo.png", 3)])
def test_real_pictures(name, channels):
    image = read(os.path.join(skimage.data_dir, name))
    assert len(image.array) == channels and image.bits == 8 and 0 <= image.array.min() < image.array.max() <= 255


# NIfTI, NRRD, MetaImage


def test_real_nifti():
    path = bundled("anatomical.nii")
    image = read(path)
    expected = nib.load(path)
    np.testing.assert_array_equal(image.array[0], expected.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(image.affine, expected.affine)
    assert image.is_volume and image.spacing == (2.0, 2.0, 2.0) and image.shape == (33, 41, 25)
    assert image.suffix == ".nii.gz" and image.source == (path,)


def test_nifti_scaling_is_applied(tmp_path):
    nifti = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    nifti.header.set_slope_inter(0.5, -1000)
    nib.save(nifti, tmp_path / "hu.nii.gz")
    image = read(tmp_path / "hu.nii.gz")
    np.testing.assert_array_equal(image.array[0], nib.load(tmp_path / "hu.nii.gz").get_fdata())
    assert image.bits is None


def test_nifti_shapes(tmp_path):
    flat = read(write_odd("2d_nifti", tmp_path))
    assert flat.array.shape == (1, 4, 5, 1) and flat.file_shape == (4, 5)
    np.testing.assert_array_equal(flat.array[0, :, :, 0], np.arange(20).reshape(4, 5))
    single = read(write_odd("4d_nifti_of_one", tmp_path))
    assert single.array.shape == (1, 4, 5, 6) and single.file_shape == (4, 5, 6, 1)
    colored = read(write_odd("rgb_nifti", tmp_path))
    assert colored.array.shape == (3, 4, 5, 6) and colored.modality == "RGB" and colored.bits == 8
    assert (colored.array[0] == 200).all() and (colored.array[2] == np.arange(6)).all()
    zipped = read(write_odd("zipped_nifti_named_nii", tmp_path))
    np.testing.assert_array_equal(zipped.array[0], np.arange(120).reshape(4, 5, 6))


def test_plain_nifti_named_gz_and_nifti2(tmp_path):
    data = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    nib.save(nib.Nifti2Image(data, OBLIQUE), tmp_path / "two.nii")
    (tmp_path / "two.nii").rename(tmp_path / "two.nii.gz")
    image = read(tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(image.array[0], data)
    assert isinstance(image.header, nib.Nifti2Header) and image.bits == 8


@pytest.mark.parametrize("extension", ["nrrd", "mha", "mhd", "nii.gz"])
def test_itk_formats_and_nifti_agree_on_values_and_geometry(extension, tmp_path):
    """The same volume, written by another library, has the same voxels at the same place in the world."""
    data = np.random.default_rng(0).integers(-1000, 1000, (7, 6, 5)).astype(np.int16)  # Z, Y, X
    volume = sitk.GetImageFromArray(data)
    volume.SetSpacing((0.7, 1.3, 2.5))
    volume.SetOrigin((-11.0, 22.0, 33.0))
    angle = 0.3
    volume.SetDirection((np.cos(angle), 0, -np.sin(angle), 0, -1, 0, -np.sin(angle), 0, -np.cos(angle)))
    path = tmp_path / f"volume.{extension}"
    sitk.WriteImage(volume, str(path))
    image = read(path)
    np.testing.assert_array_equal(image.array[0], data.transpose(2, 1, 0))
    np.testing.assert_allclose(image.spacing, (0.7, 1.3, 2.5), rtol=1e-5)
    for index in ((0, 0, 0), (4, 2, 6)):
        world = np.array(volume.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose(nib.affines.apply_affine(image.affine, index), world, atol=1e-4)


def test_flat_and_colored_nrrd(tmp_path):
    flat = sitk.GetImageFromArray(gray())
    flat.SetSpacing((0.5, 0.25))
    sitk.WriteImage(flat, str(tmp_path / "flat.nrrd"))
    image = read(tmp_path / "flat.nrrd")
    np.testing.assert_array_equal(image.array[0], gray())
    assert image.spacing == (0.25, 0.5) and not image.is_volume and image.bits == 8
    sitk.WriteImage(sitk.GetImageFromArray(color(), isVector=True), str(tmp_path / "color.mha"))
    np.testing.assert_array_equal(read(tmp_path / "color.mha").array, color().transpose(2, 0, 1))
    many = sitk.GetImageFromArray(np.zeros((4, 5, 6, 7), np.float32), isVector=True)
    sitk.WriteImage(many, str(tmp_path / "many.nrrd"))
    with pytest.raises(ZeroSegError, match="7 channels"):
        read(tmp_path / "many.nrrd")


# DICOM


def test_ct_is_in_hounsfield_units():
    image = read(bundled("CT_small.dcm"))
    dataset = pydicom.dcmread(bundled("CT_small.dcm"))
    np.testing.assert_array_equal(image.array[0], dataset.pixel_array + float(dataset.RescaleIntercept))
    assert image.modality == "CT" and image.kind == "dicom" and not image.is_volume
    np.testing.assert_allclose(image.spacing, dataset.PixelSpacing)


@pytest.mark.parametrize(
    "name",
    ["MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"],
)
def test_every_lossless_coding_of_a_dicom_gives_the_same_pixels(name):
    np.testing.assert_array_equal(read(bundled(f"{name}.dcm")).array, read(bundled("MR_small.dcm")).array)


@pytest.mark.parametrize(
    "name", ["SC_rgb_rle", "SC_rgb_gdcm_KY", "SC_rgb_dcmtk_+eb+cy+np", "SC_ybr_full_422_uncompressed"]
)
def test_color_dicom_becomes_rgb(name):
    image = read(bundled(f"{name}.dcm"))
    reference = read(bundled("SC_rgb_jpeg_gdcm.dcm"))  # JPEG lossless
    assert image.array.shape == (3, 100, 100) and image.bits == 8
    assert np.abs(image.array - reference.array).mean() < 3


def test_dicom_without_preamble(tmp_path):
    np.testing.assert_array_equal(
        read(write_odd("dicom_without_preamble", tmp_path)).array, read(bundled("MR_small.dcm")).array
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_monochrome1_is_inverted(bits, tmp_path):
    pixels = np.linspace(0, 255 if bits == 8 else 4095, 64 * 64).reshape(64, 64).astype(f"u{bits // 8}")
    changes = {
        "PixelData": pixels.tobytes(),
        "BitsAllocated": bits,
        "BitsStored": 8 if bits == 8 else 12,
        "HighBit": 7 if bits == 8 else 11,
        "PixelRepresentation": 0,
        "SmallestImagePixelValue": None,
        "LargestImagePixelValue": None,
    }
    images = []
    for meaning in ("MONOCHROME1", "MONOCHROME2"):
        dicom(PhotometricInterpretation=meaning, **changes).save_as(tmp_path / meaning)
        images.append(read(tmp_path / meaning).array[0])
    inverted, plain = images
    np.testing.assert_array_equal(plain, pixels)
    np.testing.assert_array_equal(inverted, pixels.max() - pixels.astype(np.float32))


def test_ct_screen_capture_is_not_taken_for_hounsfield_units(tmp_path):
    capture = dicom("CT_small.dcm", RescaleSlope=None, RescaleIntercept=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    capture.file_meta.MediaStorageSOPClassUID = capture.SOPClassUID
    capture.save_as(tmp_path / "capture.dcm")
    assert read(tmp_path / "capture.dcm").modality == "OT"


def test_series_is_sorted_by_position(tmp_path):
    files = ct_series(tmp_path / "ct", count=6)
    assert [path.name for path in files] != sorted(path.name for path in files)  # the names do mislead
    image = read(tmp_path / "ct")
    assert image.array.shape == (1, 128, 128, 6) and image.kind == "dicom_series" and image.modality == "CT"
    assert image.source == tuple(files)
    np.testing.assert_array_equal(image.array[0, 0, 0], np.arange(6) * 10.0)
    dataset = pydicom.dcmread(files[2])
    expected = dataset.pixel_array.T + float(dataset.RescaleIntercept)
    np.testing.assert_array_equal(image.array[0, :, :, 2], expected)
    np.testing.assert_allclose(image.spacing, (0.661468, 0.661468, 2.5))


def test_series_geometry_agrees_with_itk(tmp_path):
    files = ct_series(tmp_path / "ct", count=5, ImageOrientationPatient=[0.8, 0.6, 0, 0, 0, -1], step=(1.2, -1.6, 0))
    image = read(tmp_path / "ct")
    reference = sitk.ReadImage([str(path) for path in image.source])
    np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(reference).transpose(2, 1, 0))
    for index in ((0, 0, 0), (100, 50, 4)):
        world = np.array(reference.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        np.testing.assert_allclose(nib.affines.apply_affine(image.affine, index), world, atol=1e-3)
    assert set(image.source) == set(files)


def test_tilted_gantry_keeps_slices_where_they_are(tmp_path):
    files = ct_series(tmp_path / "ct", count=4, step=(0.0, 0.9, 2.5))
    image = read(tmp_path / "ct")
    for k, path in enumerate(files):
        position = np.array(pydicom.dcmread(path).ImagePositionPatient, dtype=float) * (-1, -1, 1)
        np.testing.assert_allclose(nib.affines.apply_affine(image.affine, (0, 0, k)), position)


def _change(path, **attributes):
    dataset = pydicom.dcmread(path)
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "differ in orientation"),
        ({"PixelSpacing": [1.0, 1.0]}, "differ in pixel spacing"),
        ({"Rows": 64, "PixelData": bytes(64 * 128 * 2)}, "differ in size"),
        ({"ImagePositionPatient": [-20.0, -30.0, 40.0]}, "at one position"),
        ({"ImagePositionPatient": None}, "without position"),
        ({"PixelData": bytes(100)}, "100 bytes of pixels where 32768 belong"),
    ],
)
def test_irregular_series_are_refused(change, message, tmp_path):
    files = ct_series(tmp_path / "ct", count=4)
    _change(files[3], **change)
    with pytest.raises(ZeroSegError, match=message) as caught:
        read(tmp_path / "ct")
    assert "\n" not in str(caught.value)


def test_uneven_spacing_is_warned_about(tmp_path, caplog):
    files = ct_series(tmp_path / "ct", count=5)
    files[2].unlink()
    image = read(tmp_path / "ct")
    assert "uneven slice spacing, 2.5 to 5 mm" in image.notes[0] and "uneven" in caplog.text


def test_real_two_slice_series(tmp_path):
    """nibabel ships two slices of one MR series."""
    for name in ("1.dcm", "0.dcm"):
        (tmp_path / name).write_bytes(bundled(name).read_bytes())
    image = read(tmp_path)
    assert image.array.shape == (1, 256, 256, 2) and image.modality == "MR"
    assert image.spacing[2] == pytest.approx(3.0, abs=1e-3)


def test_write_nifti_helper_keeps_its_affine(tmp_path):
    write_nifti(tmp_path / "o.nii", np.zeros((3, 4, 5), np.uint8), OBLIQUE)
    np.testing.assert_allclose(read(tmp_path / "o.nii").affine, OBLIQUE, rtol=1e-6)


def test_rows_of_a_picture_run_to_the_back_and_columns_to_the_left():
    affine = slice_affine((0.5, 2.0))
    assert nib.aff2axcodes(affine) == ("P", "L", "S")
    np.testing.assert_array_equal(nib.affines.voxel_sizes(affine), (0.5, 2, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_that_pillow_cannot_hold_are_turned_upright_as_well(tmp_path, orientation):
    small, wide = tmp_path / "small.tif", tmp_path / "wide.tif"
    pixels = color(6, 9)
    for path, values in ((small, pixels), (wide, pixels.astype(np.uint16) * 257)):
        tag = (274, "H", 1, orientation, True)
        tifffile.imwrite(path, values, photometric="rgb", extratags=[tag])
    expected, found = (read_image(find_cases(path)[0]) for path in (small, wide))
    np.testing.assert_array_equal(found.array, expected.array * 257)
    assert found.notes == expected.notes and bool(found.notes) == (orientation > 1)
