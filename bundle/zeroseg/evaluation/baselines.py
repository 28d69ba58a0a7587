"""Segmentation without a model: what a user could do with scikit-image and OpenCV, and what every result is compared with.

All functions take an image (C, H, W) float in [0, 1] (``zeroseg.io.to_unit_range``) and return a bool mask (H, W).
Those that end in ``_click`` see one click; (x, y) is (column, row) in pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from skimage.color import rgb2gray, rgb2lab
from skimage.filters import threshold_otsu
from skimage.graph import cut_threshold, rag_mean_color
from skimage.measure import label
from skimage.segmentation import random_walker, slic
from sklearn.cluster import KMeans

from zeroseg.attention.prepare import to_three_channels

CLICK_RADIUS = 2  # a click stands for the 5 x 5 pixels around it


def _rgb(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> (H, W, 3)."""
    return to_three_channels(torch.as_tensor(image, dtype=torch.float32)).permute(1, 2, 0).contiguous().numpy()


def _lab(image: np.ndarray) -> np.ndarray:
    """(C, H, W) -> CIE Lab (H, W, 3); lightness alone differs in a gray image."""
    return rgb2lab(_rgb(image))


def _around(x: int, y: int) -> tuple[slice, slice]:
    return tuple(slice(max(0, c - CLICK_RADIUS), c + CLICK_RADIUS + 1) for c in (y, x))


def _component(mask: np.ndarray, x: int, y: int) -> np.ndarray:
    """The connected part of ``mask`` that holds the click, which always belongs to it."""
    mask = mask.copy()
    mask[y, x] = True
    parts = label(mask, connectivity=1)
    return parts == parts[y, x]


def border_rule(mask: np.ndarray) -> np.ndarray:
    """Of a mask and its complement, the one that covers less of the image's border: objects are rarely cut off."""
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    return ~mask if border.mean() > 0.5 else mask


def otsu_bright(image: np.ndarray) -> np.ndarray:
    """Pixels whose luminance is above Otsu's threshold; none in a constant image."""
    gray = rgb2gray(_rgb(image))
    return gray > threshold_otsu(gray)


def kmeans2_bright(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """The lighter of two k-means clusters of the pixels' gray values or Lab colours; none in a constant image."""
    pixels = image.reshape(-1, 1) if len(image) == 1 else _lab(image).reshape(-1, 3)
    if np.ptp(pixels, axis=0).max() == 0:
        return np.zeros(image.shape[1:], dtype=bool)
    model = KMeans(2, n_init=3, random_state=seed).fit(pixels)
    return (model.labels_ == np.argmax(model.cluster_centers_[:, 0])).reshape(image.shape[1:])


def otsu(image: np.ndarray) -> np.ndarray:
    """Otsu's threshold; the class that covers more of the border is background."""
    return border_rule(otsu_bright(image))


def kmeans2(image: np.ndarray, seed: int = 0) -> np.ndarray:
    """2-means in gray or Lab colour; the class that covers more of the border is background."""
    return border_rule(kmeans2_bright(image, seed))


def all_foreground(image: np.ndarray) -> np.ndarray:
    """Everything: what a score is worth that knows nothing."""
    return np.ones(image.shape[1:], dtype=bool)


def colour_click(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """Pixels of the click's colour (Lab distance below Otsu's threshold), as far as they are connected to the click."""
    lab = _lab(image)
    distance = np.linalg.norm(lab - lab[_around(x, y)].mean(axis=(0, 1)), axis=-1)
    return _component(distance <= threshold_otsu(distance), x, y)


def random_walker_click(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """Random walker (Grady 2006): the click is the object's seed, the image's border the background's.

    scikit-image's beta of 130 lets the border win nearly everywhere from so small a seed; 1000 is fairer to the method.
    """
    seeds = np.zeros(image.shape[1:], dtype=np.uint8)
    seeds[[0, -1], :] = seeds[:, [0, -1]] = 2
    seeds[_around(x, y)] = 1
    rgb = _rgb(image)
    if np.ptp(rgb) == 0 or not (seeds == 0).any():  # no edges to follow, or nothing left to decide
        return seeds == 1
    # Flat areas make the system ill-conditioned, and skimage warns; exact solutions took up to a minute an image and
    # were no better.
    return random_walker(rgb, seeds, beta=1000, mode="cg_j", prob_tol=np.inf, channel_axis=-1) == 1


def slic_click(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """SLIC superpixels, neighbours of similar mean colour merged (region adjacency graph); the region of the click."""
    rgb = _rgb(image)
    superpixels = slic(rgb, n_segments=400, compactness=10, start_label=1)
    if superpixels.max() < 2:
        return superpixels == superpixels[y, x]
    graph = rag_mean_color(rgb * 255, superpixels)
    regions = cut_threshold(superpixels, graph, 20)
    return _component(regions == regions[y, x], x, y)


def _grabcut(image: np.ndarray, likely: np.ndarray, x: int, y: int) -> np.ndarray:
    """GrabCut (Rother, Kolmogorov and Blake 2004), OpenCV's: the part of its mask that is connected to the click.

    The click is surely the object, the image's border surely background, ``likely`` (H, W) bool probably the object.
    """
    mask = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[[0, -1], :] = mask[:, [0, -1]] = cv2.GC_BGD
    mask[_around(x, y)] = cv2.GC_FGD
    if (mask == cv2.GC_FGD).all():  # nothing left to decide
        return np.ones(mask.shape, bool)
    cv2.setRNGSeed(0)  # its colour models start from k-means
    pixels = np.ascontiguousarray((_rgb(image) * 255).round().astype(np.uint8))
    cv2.grabCut(pixels, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    return _component((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD), x, y)


def grabcut_click(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """GrabCut from a frame, as is usual: all between the border and the click is probably the object."""
    return _grabcut(image, np.ones(image.shape[1:], bool), x, y)


def grabcut_colour_click(image: np.ndarray, x: int, y: int) -> np.ndarray:
    """GrabCut that starts from the mask of ``colour_click``: better than from a frame where the frame holds much else."""
    return _grabcut(image, colour_click(image, x, y), x, y)


def _likely(image: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Pixels closer in colour to the object's marks than Otsu's threshold and than to the background's marks."""
    lab = _lab(image)

    def away(kind: int) -> np.ndarray:
        places = np.argwhere(marks == kind)
        places = places[np.linspace(0, len(places) - 1, min(len(places), 32)).round().astype(int)]
        colours = np.stack([lab[_around(x, y)].mean(axis=(0, 1)) for y, x in places])
        return np.linalg.norm(lab[:, :, None] - colours, axis=-1).min(-1)

    wanted = away(1)
    likely = wanted <= threshold_otsu(wanted)
    return likely & (wanted < away(2)) if (marks == 2).any() else likely


def _drawn(marks: np.ndarray) -> np.ndarray:
    """Marks as wide as a click is for the one-click methods; background over object where they meet."""
    kernel = np.ones((2 * CLICK_RADIUS + 1,) * 2, np.uint8)
    wide = cv2.dilate((marks == 1).astype(np.uint8), kernel)
    return np.where(cv2.dilate((marks == 2).astype(np.uint8), kernel) > 0, 2, wide)


def _held(mask: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The connected parts that hold a mark of the object."""
    mask = (mask | (marks == 1)) & (marks != 2)
    parts = label(mask, connectivity=1)
    return np.isin(parts, np.setdiff1d(np.unique(parts[marks == 1]), [0]))


def grabcut_marks(image: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """GrabCut from any number of marks (H, W): 1 object, 2 background; it starts from the colours near the object's."""
    wide = _drawn(marks)
    mask = np.where(_likely(image, marks), cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[[0, -1], :] = mask[:, [0, -1]] = cv2.GC_BGD
    mask[wide == 1], mask[wide == 2] = cv2.GC_FGD, cv2.GC_BGD
    if (mask == cv2.GC_FGD).all():
        return np.ones(mask.shape, bool)
    cv2.setRNGSeed(0)
    pixels = np.ascontiguousarray((_rgb(image) * 255).round().astype(np.uint8))
    cv2.grabCut(pixels, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    return _held((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD), marks)


def random_walker_marks(image: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Random walker from any number of marks; the image's border is background until the user has marked some."""
    seeds = _drawn(marks).astype(np.uint8)
    if not (marks == 2).any():
        frame = np.zeros(seeds.shape, bool)
        frame[[0, -1], :] = frame[:, [0, -1]] = True
        seeds[frame & (seeds == 0)] = 2
    rgb = _rgb(image)
    if np.ptp(rgb) == 0 or not (seeds == 0).any():
        return marks == 1
    return _held(random_walker(rgb, seeds, beta=1000, mode="cg_j", prob_tol=np.inf, channel_axis=-1) == 1, marks)


AUTOMATIC = {"otsu": otsu, "kmeans2": kmeans2, "all_foreground": all_foreground}
"""Name -> function of an image."""

BRIGHT = {"otsu": otsu_bright, "kmeans2": kmeans2_bright}
"""Name -> function that gives the bright class, for the oracle over the polarity of a set."""

CLICKS = {
    "colour_click": colour_click,
    "grabcut_click": grabcut_click,
    "grabcut_colour_click": grabcut_colour_click,
    "random_walker_click": random_walker_click,
    "slic_click": slic_click,
}
"""Name -> function of an image and a click."""
