"""Writing: geometry bit for bit, whole files or none."""

import os

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from bad_inputs import OBLIQUE, bundled, ct_series, gray, write_nifti, write_odd
from zeroseg.errors import ZeroSegError
from zeroseg.io import (
    Image,
    atomic_path,
    check_same_grid,
    find_cases,
    read_image,
    without_shear,
    write_confidence,
    write_map,
    write_mask,
)

GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "pixdim", "dim", "xyzt_units"),
)


def read(path):
    return read_image(find_cases(path)[0])


def assert_same_geometry(one, other):
    one, other = nib.load(one), nib.load(other)
    assert one.shape == other.shape and one.affine.tobytes() == other.affine.tobytes()
    for field in GEOMETRY:
        assert np.array_equal(one.header[field], other.header[field], equal_nan=True), field


def round_trip(path, out):
    image = read(path)
    labels = (np.arange(np.prod(image.shape)) % 3).reshape(image.shape)
    write_mask(image, labels, out / "m_seg.nii.gz")
    write_confidence(image, labels / 2, out / "m_confidence.nii.gz")
    mask, confidence = nib.load(out / "m_seg.nii.gz"), nib.load(out / "m_confidence.nii.gz")
    assert (mask.get_data_dtype().str[1:], confidence.get_data_dtype().str[1:]) == ("u1", "f4")
    np.testing.assert_array_equal(np.asarray(mask.dataobj).reshape(image.shape), labels)
    np.testing.assert_array_equal(np.asarray(confidence.dataobj).reshape(image.shape), np.float32(labels / 2))
    return out / "m_seg.nii.gz", out / "m_confidence.nii.gz"


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        np.diag([-1.5, 1.5, 3, 1]),  # left-right flipped
        np.diag([-1.0, -1.0, -2.5, 1]),
        np.eye(4)[[2, 0, 1, 3]] * [1.1, -0.7, 2, 1],  # permuted and flipped
        OBLIQUE,  # rotated, sheared, with digits float32 cannot hold
    ],
)
@pytest.mark.parametrize("codes", [(1, 0), (0, 2), (1, 4), (0, 0)])
def test_nifti_geometry_is_kept_bit_for_bit(affine, codes, tmp_path):
    nifti = nib.Nifti1Image(np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32), affine)
    nifti.set_qform(affine, code=codes[0])
    nifti.set_sform(affine, code=codes[1])
    nib.save(nifti, tmp_path / "in.nii.gz")
    for out in round_trip(tmp_path / "in.nii.gz", tmp_path):
        assert_same_geometry(out, tmp_path / "in.nii.gz")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    matrix=st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
)
def test_any_affine_is_kept_bit_for_bit(matrix, shape, tmp_path):
    nifti = nib.Nifti1Image(np.zeros(shape, np.int16), None)
    nifti.header.set_sform(np.vstack([np.reshape(matrix, (3, 4)), [0, 0, 0, 1]]), code=1)
    nib.save(nifti, tmp_path / "in.nii")
    image = read(tmp_path / "in.nii")
    write_mask(image, np.ones(shape, bool), tmp_path / "out.nii.gz")
    assert_same_geometry(tmp_path / "out.nii.gz", tmp_path / "in.nii")


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_real_nifti(name, tmp_path):
    for out in round_trip(bundled(name), tmp_path):
        assert_same_geometry(out, bundled(name))


@pytest.mark.parametrize("name", ["2d_nifti", "4d_nifti_of_one", "zipped_nifti_named_nii", "rgb_nifti"])
def test_odd_nifti_keeps_its_shape(name, tmp_path):
    path = write_odd(name, tmp_path)
    plain = path
    if name == "zipped_nifti_named_nii":
        plain = path.rename(tmp_path / "plain.nii.gz")
    for out in round_trip(plain, tmp_path):
        assert_same_geometry(out, plain)


def test_nifti2_stays_nifti2_and_display_range_and_notes_are_dropped(tmp_path):
    nifti = nib.Nifti2Image(np.zeros((3, 4, 5), np.int16), OBLIQUE)
    nifti.header["cal_max"] = 300
    nifti.header["descrip"] = b"patient name"
    nifti.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"private"))
    nib.save(nifti, tmp_path / "in.nii")
    for out in round_trip(tmp_path / "in.nii", tmp_path):
        assert_same_geometry(out, tmp_path / "in.nii")
        loaded = nib.load(out)
        assert isinstance(loaded, nib.Nifti2Image) and loaded.header["cal_max"] == 0
        assert not loaded.header.extensions and loaded.header["descrip"] == b"ZeroSeg"


def test_masks_of_itk_and_dicom_volumes_lie_where_the_image_lies(tmp_path):
    volume = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16))
    volume.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, -1))
    volume.SetSpacing((0.5, 1.5, 3))
    volume.SetOrigin((1, 2, 3))
    sitk.WriteImage(volume, str(tmp_path / "v.nrrd"))
    ct_series(tmp_path / "tilted", count=3, step=(0.0, 0.9, 2.5))
    for source in (tmp_path / "v.nrrd", tmp_path / "tilted"):
        image = read(source)
        round_trip(source, tmp_path)
        mask = nib.load(tmp_path / "m_seg.nii.gz")
        np.testing.assert_allclose(mask.affine, image.affine, rtol=1e-5, atol=1e-5)
        assert mask.header["sform_code"] == 1 and mask.header.get_xyzt_units()[0] == "mm"
        itk = sitk.ReadImage(str(tmp_path / "m_seg.nii.gz"))  # ITK knows no shear, but has to open the mask
        np.testing.assert_allclose(np.multiply(itk.GetOrigin(), (-1, -1, 1)), image.affine[:3, 3], rtol=1e-5)
        across = np.reshape(itk.GetDirection(), (3, 3))[:, :2] * itk.GetSpacing()[:2] * [[-1], [-1], [1]]
        np.testing.assert_allclose(across, image.affine[:3, :2], atol=1e-5)


def test_pictures_become_png(tmp_path):
    image = Image(gray()[None].astype(np.float32), bits=8)
    labels = gray() % 256
    confidence = np.linspace(0, 1, gray().size).reshape(gray().shape)
    write_mask(image, labels, tmp_path / "p_seg.png")
    write_confidence(image, confidence, tmp_path / "p_confidence.png")
    with PILImage.open(tmp_path / "p_seg.png") as mask, PILImage.open(tmp_path / "p_confidence.png") as evidence:
        assert mask.mode == "L"
        np.testing.assert_array_equal(np.asarray(mask), labels)
        np.testing.assert_allclose(np.asarray(evidence) / 65535, confidence, atol=1 / 131070 + 1e-7)


def test_maps_that_do_not_fit_are_refused(tmp_path):
    image = Image(np.zeros((1, 4, 5), np.float32))
    good = np.zeros((4, 5), np.uint8)
    for bad in (good.T, good + 0.5, good.astype(int) - 1, good.astype(int) + 256):
        with pytest.raises(ValueError, match=r"labels|shape"):
            write_mask(image, bad, tmp_path / "m.png")
    with pytest.raises(ValueError, match="finite"):
        write_confidence(image, np.full((4, 5), np.nan), tmp_path / "m.png")
    with pytest.raises(ValueError, match="must end in"):
        write_mask(image, good, tmp_path / "m.nii.gz")
    assert not any(tmp_path.iterdir())


def test_same_mask_same_bytes(tmp_path):
    write_nifti(tmp_path / "in.nii", np.zeros((3, 4, 5), np.uint8))
    image = read(tmp_path / "in.nii")
    for name in ("a.nii.gz", "b.nii.gz"):
        write_mask(image, np.ones(image.shape, bool), tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# Atomicity


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(interruption, tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(interruption), atomic_path(target) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.name.startswith(".") and temporary.suffix == ".json"
        raise interruption
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]


def test_folders_are_made_and_files_replaced(tmp_path):
    target = tmp_path / "a" / "b" / "x.nii.gz"
    for text in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.name.endswith(".nii.gz")
            temporary.write_text(text)
    assert target.read_text() == "two" and len(list(target.parent.iterdir())) == 1


def test_a_full_disk_is_one_clear_line(tmp_path):
    """/dev/full is a disk that is always full."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with (
        pytest.raises(ZeroSegError, match=r"cannot write m\.txt .*\(No space left on device\)") as caught,
        atomic_path(tmp_path / "m.txt") as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_text("x" * 10_000)
    assert str(tmp_path) in str(caught.value) and not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_names_the_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    image = Image(np.zeros((1, 4, 5), np.float32))
    with pytest.raises(ZeroSegError, match="file"):
        write_mask(image, np.zeros((4, 5), np.uint8), tmp_path / "file" / "m.png")
    (tmp_path / "m.png").mkdir()
    with pytest.raises(ZeroSegError, match=r"cannot write m\.png"):
        write_mask(image, np.zeros((4, 5), np.uint8), tmp_path / "m.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "m.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ZeroSegError, match="permissions"), atomic_path(tmp_path / "x.txt") as temporary:
        temporary.write_text("x")
    tmp_path.chmod(0o700)


def test_maps_keep_their_range(tmp_path):
    values = np.random.default_rng(0).normal(0, 900, (5, 6, 7)).astype(np.float32)
    write_nifti(tmp_path / "in.nii.gz", np.zeros((5, 6, 7), np.int16), OBLIQUE)
    volume = write_map(read(tmp_path / "in.nii.gz"), values, tmp_path / "in_aova")
    assert volume.name == "in_aova.nii.gz"
    assert_same_geometry(tmp_path / "in.nii.gz", volume)
    np.testing.assert_array_equal(np.asarray(nib.load(volume).dataobj), values)
    PILImage.fromarray(gray()).save(tmp_path / "flat.png")
    image = read(tmp_path / "flat.png")
    flat = np.random.default_rng(1).normal(0, 900, image.shape).astype(np.float32)
    picture = write_map(image, flat, tmp_path / "flat_aova")
    assert picture.name == "flat_aova.tif"
    np.testing.assert_array_equal(np.asarray(PILImage.open(picture)), flat)
    with pytest.raises(ValueError, match="not finite"):
        write_map(image, np.full(image.shape, np.nan), tmp_path / "bad")
    with pytest.raises(ValueError, match="has shape"):
        write_map(image, flat[1:], tmp_path / "bad")


def test_a_mask_of_slices_stacked_straight_lies_on_the_grid_of_a_tilted_gantry():
    tilted = np.array([[0.8, 0, 0, 4], [0, 0.8, 1.3, 5], [0, 0, 4.8, -7], [0, 0, 0, 1]])
    straight, shape = without_shear(tilted), (12, 12, 6)
    assert not np.allclose(straight, tilted, atol=0.1)
    for affine in (tilted, straight, tilted + 1e-3):
        check_same_grid("the mask", shape, affine, shape, tilted)
    for affine in (np.diag([-1.0, 1, 1, 1]) @ tilted, tilted + 0.1):
        with pytest.raises(ZeroSegError, match="another affine"):
            check_same_grid("the mask", shape, affine, shape, tilted)
    # What was drawn on the exact geometry of an upright series does not lie on that of a tilted one.
    with pytest.raises(ZeroSegError, match="another affine"):
        check_same_grid("the mask", shape, tilted, shape, straight)
