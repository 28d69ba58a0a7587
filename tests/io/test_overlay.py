"""Overlays: contours where the labels are, legible, in the right orientation."""

import re
import time
from io import BytesIO

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as PILImage

from bad_inputs import bundled, color, gray
from zeroseg.io import (
    contact_html,
    contact_sheet,
    draw_overlay,
    find_cases,
    overlay_slices,
    read_image,
    to_unit_range,
)


def disc(size, center, radius):
    y, x = np.mgrid[:size, :size]
    return ((x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2).astype(np.uint8)


def is_colored(picture):
    pixels = np.asarray(picture).astype(int)
    return pixels.max(axis=-1) - pixels.min(axis=-1) > 60


def luminance(pixels):
    return np.asarray(pixels).astype(float) @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1), (512, 512)),
        ((64, 64), (512, 512)),
        ((300, 200), (400, 600)),
        ((1, 700), (700, 1)),
        ((1000, 600), (600, 1000)),
        ((4000, 3000), (768, 1024)),
    ],
)
def test_sizes(shape, size):
    picture = draw_overlay(np.full((1, *shape), 0.5, np.float32), np.ones(shape, np.uint8))
    assert picture.size == size and picture.mode == "RGB"


@pytest.mark.parametrize("ground", [0.0, 0.5, 1.0])
def test_contours_follow_the_border_and_stand_out_on_any_ground(ground):
    labels = disc(64, (20, 40), 12)
    picture = draw_overlay(np.full((1, 64, 64), ground, np.float32), labels)
    line = is_colored(picture)
    big = np.kron(labels, np.ones((8, 8), np.uint8))
    inside = np.pad(big, 2, mode="edge")
    near = np.zeros_like(big)  # within 2 px of the border
    for dy in range(5):
        for dx in range(5):
            near |= inside[dy : dy + 512, dx : dx + 512] != big
    assert line.any() and not (line & (near == 0)).any()
    plain = np.asarray(picture)[~near.astype(bool) & (big == 1)]
    assert np.abs(plain.astype(int) - round(ground * 255)).max() <= 1 or ground == 1.0
    # the line or its rim differs from the ground by half of the range
    drawn = luminance(picture)[near > 0]
    assert np.abs(drawn - 255 * ground).max() > 110


def test_labels_have_different_colors():
    labels = np.zeros((60, 80), np.uint8)
    for k in range(7):
        labels[5 + (k // 4) * 28 : 25 + (k // 4) * 28, 2 + (k % 4) * 19 : 17 + (k % 4) * 19] = k + 1
    pixels = np.asarray(draw_overlay(np.zeros((1, 60, 80), np.float32), labels)).reshape(-1, 3)
    colors = {tuple(color) for color in pixels if color.any()}
    assert len(colors) == 7
    values = np.array(sorted(colors)).astype(int)
    distance = np.abs(values[:, None] - values[None]).sum(axis=-1)
    assert distance[~np.eye(7, dtype=bool)].min() > 60


def test_a_mask_of_the_whole_image_is_outlined_and_an_empty_one_is_not():
    image = np.full((1, 64, 64), 0.5, np.float32)
    assert is_colored(draw_overlay(image, np.ones((64, 64), np.uint8)))[0].all()
    assert not is_colored(draw_overlay(image, np.zeros((64, 64), np.uint8))).any()


def test_colors_of_the_image_are_kept():
    image = color(64, 64).transpose(2, 0, 1) / np.float32(255)
    picture = draw_overlay(image, np.zeros((64, 64), np.uint8)).resize((64, 64), PILImage.Resampling.BOX)
    assert np.abs(np.asarray(picture).astype(int) - color(64, 64)).mean() < 3


def test_prompts_are_drawn_where_they_are():
    image, labels = np.full((1, 64, 64), 0.5, np.float32), np.zeros((64, 64), np.uint8)
    plain = np.asarray(draw_overlay(image, labels)).astype(int)
    drawn = np.asarray(draw_overlay(image, labels, points=[(10, 20), (50, 40)], point_labels=[1, 0])).astype(int)
    changed = np.abs(drawn - plain).sum(axis=-1) > 0
    assert tuple(drawn[20 * 8 + 4, 10 * 8 + 4]) == (0, 255, 0) and tuple(drawn[40 * 8 + 4, 50 * 8 + 4]) == (255, 0, 0)
    rows, columns = np.nonzero(changed)
    for row, column in zip(rows, columns, strict=True):
        assert min(np.hypot(row - 164, column - 84), np.hypot(row - 324, column - 404)) < 14
    boxed = np.asarray(draw_overlay(image, labels, box=(8, 16, 40, 56)))
    assert tuple(boxed[128, 200]) == (255, 255, 255) and tuple(boxed[300, 200]) == (128, 128, 128)
    with pytest.raises(ValueError, match="shorter"):
        draw_overlay(image, labels, points=[(1, 2), (3, 4)], point_labels=[1])


def test_titles_are_written_above_and_cut_to_the_width():
    image, labels = np.zeros((1, 64, 64), np.float32), np.zeros((64, 64), np.uint8)
    plain = draw_overlay(image, labels)
    titled = draw_overlay(image, labels, title="a title " * 100)
    assert titled.width == plain.width and titled.height > plain.height
    strip = np.asarray(titled)[: titled.height - plain.height]
    assert strip.min() < 60 and strip.max() == 255 and (strip[:, -3:] == 255).all()
    np.testing.assert_array_equal(np.asarray(titled)[-plain.height :], np.asarray(plain))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit"):
        draw_overlay(np.zeros((1, 4, 5), np.float32), np.zeros((5, 4), np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        overlay_slices(np.zeros((1, 4, 5, 6), np.float32), np.zeros((4, 5, 6), np.uint8), axis=3)


def test_it_is_fast_enough():
    image, labels = np.random.default_rng(0).random((3, 512, 512), np.float32), disc(512, (200, 200), 100)
    draw_overlay(image, labels, title="warm up")
    drawing, saving = [], []
    for _ in range(3):
        start = time.perf_counter()
        drawn = draw_overlay(image, labels, points=[(200, 200)], title="timed")
        drawing.append(time.perf_counter() - start)
        start = time.perf_counter()
        drawn.save(BytesIO(), "PNG")
        saving.append(time.perf_counter() - start)
    assert min(drawing) < 4 * min(saving)


# Volumes


def marked_volume(affine):
    """A volume with a bright cube at the patient's right, anterior, superior corner."""
    volume = np.full((1, 20, 24, 28), 0.2, np.float32)
    index = np.stack(np.meshgrid(*map(np.arange, (20, 24, 28)), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(affine, index)
    low, high = world.reshape(-1, 3).min(axis=0), world.reshape(-1, 3).max(axis=0)
    share = (world - low) / (high - low)  # 0..1 to the right, anterior, superior
    volume[0, (share > 0.75).all(axis=-1)] = 1
    return volume


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_patients_right_is_left_and_anterior_and_superior_are_up(signs, order):
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, list(order)] * signs
    volume = marked_volume(affine)
    for axis in range(3):
        labels = np.zeros(volume.shape[1:], np.uint8)
        slices = np.moveaxis(volume[0], axis, 0)
        k = int(slices.reshape(len(slices), -1).max(axis=1).argmax())
        np.moveaxis(labels, axis, 0)[k, 0, 0] = 1  # only to choose this slice
        picture = np.asarray(overlay_slices(volume, labels, axis=axis, affine=affine)).astype(int)
        tile = picture[30:-6, 6:-6]  # without the title and the white gap
        bright = (tile.min(axis=-1) > 200).nonzero()
        height, width = tile.shape[:2]
        assert bright[0].mean() < height / 2, "anterior and superior are up"
        # axial and coronal: the patient's right is on the left; sagittal: anterior is on the left
        if order[axis] == 0:
            assert bright[0].mean() < height / 2 and bright[1].mean() < width / 2
        else:
            assert bright[1].mean() < width / 2


def test_aspect_ratio_follows_the_spacing():
    volume, labels = np.zeros((1, 30, 30, 10), np.float32), np.ones((30, 30, 10), np.uint8)
    affine = np.diag([-1.0, -1.0, 3.0, 1])
    axial = overlay_slices(volume[..., :1], labels[..., :1], axis=2, affine=affine)
    coronal = overlay_slices(volume[:, :, :1], labels[:, :1], axis=1, affine=affine)
    assert axial.size == coronal.size  # 30 mm in every direction
    flat = overlay_slices(volume[:, :, :1], labels[:, :1], axis=1)  # no affine: cubes
    assert flat.height < coronal.height / 2


def test_slices_run_through_the_object():
    volume, labels = np.zeros((1, 16, 16, 40), np.float32), np.zeros((16, 16, 40), np.uint8)
    one = overlay_slices(volume, labels, title="empty")
    labels[4:8, 4:8, 5:8] = 1
    few = overlay_slices(volume, labels)
    labels[4:8, 4:8, 5:39] = 1
    many = overlay_slices(volume, labels)
    assert few.size[0] < many.size[0] == one.size[0]  # 3 slices in 2 columns; 9 in 3
    columns = is_colored(many).reshape(many.height, many.width).any(axis=0)
    assert sum(np.diff(columns.astype(int)) == 1) >= 3  # contours in every column of the sheet


def test_real_volume():
    image = read_image(find_cases(bundled("anatomical.nii"))[0])
    unit = to_unit_range(image)
    picture = overlay_slices(unit, (unit[0] > 0.6).astype(np.uint8), affine=image.affine, title="anatomical")
    assert is_colored(picture).any() and luminance(picture).std() > 20


# Sheets


def test_contact_sheet_and_page(tmp_path):
    entries = [
        ("wide <one>", PILImage.new("RGB", (800, 100), "red")),
        ("tall", PILImage.new("L", (50, 900), 100)),
        ("small & square", PILImage.fromarray(gray(20, 20))),
    ]
    sheet = contact_sheet(entries, tmp_path / "index.png")
    with PILImage.open(sheet) as picture:
        assert picture.mode == "RGB" and picture.width < 800 and picture.height < 850
        assert (np.asarray(picture) == (255, 0, 0)).all(axis=-1).sum() > 10_000
    page = contact_html(entries, tmp_path / "index.html", title="Demo & more").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert "wide &lt;one&gt;" in page and "small &amp; square" in page and "Demo &amp; more" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "index.png"]


def test_a_legend_names_labels_beside_their_colours():
    labels = np.zeros((40, 40), np.uint8)
    labels[5:20, 5:20], labels[25:35, 25:35] = 1, 3
    plain = draw_overlay(np.zeros((1, 40, 40)), labels)
    names = {1: "white blood cell", 3: "a name much longer than the picture is wide " * 9}
    shown = draw_overlay(np.zeros((1, 40, 40)), labels, legend=names)
    assert shown.width == plain.width and shown.height > plain.height + 30, "two lines"
    above = np.asarray(shown)[: shown.height - plain.height].reshape(-1, 3)
    assert {(240, 228, 66), (213, 94, 0)} <= set(map(tuple, above.tolist()))
    assert np.array_equal(np.asarray(shown)[shown.height - plain.height :], np.asarray(plain))
    volume = overlay_slices(np.zeros((1, 40, 40, 1)), labels[..., None], legend=names)
    assert volume.height > overlay_slices(np.zeros((1, 40, 40, 1)), labels[..., None]).height
