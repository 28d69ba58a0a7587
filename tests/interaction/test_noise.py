"""Processors round differently; answers must not: the attention of real images times 1 + 1e-6 noise gives the same labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from skimage.transform import resize

from zeroseg.attention import EncodedImage
from zeroseg.interaction.inferer import AttentionSegmentationInferer

pytestmark = pytest.mark.slow

IMAGES = {
    "tissue": lambda: data.immunohistochemistry().transpose(2, 0, 1),
    "embryo": lambda: data.human_mitosis()[None],
    "retina": lambda: data.retina().transpose(2, 0, 1),
}
PROMPTS = {
    "segments": {},
    "auto": {},
    "points": {"points": [[60, 70], [100, 30], [62, 90]], "labels": [1, 1, 0]},
    "box": {"box": [30, 40, 90, 110]},
}


@pytest.fixture(scope="module")
def inferer(embedded_backbone) -> AttentionSegmentationInferer:
    return AttentionSegmentationInferer(embedded_backbone)


@pytest.fixture(scope="module", params=IMAGES)
def encoded(inferer, request) -> EncodedImage:
    image = IMAGES[request.param]()
    return inferer.encode(resize(image.astype(np.float32), (len(image), 128, 128), anti_aliasing=True))


@pytest.mark.parametrize("seed", range(3))
def test_labels_hold_under_the_noise_of_rounding(inferer, encoded, seed):
    noise = torch.randn(encoded.attention.shape, generator=torch.Generator().manual_seed(seed))
    shaken = EncodedImage(encoded.image, encoded.size, encoded.latents, encoded.attention * (1 + 1e-6 * noise))
    for rule, prompt in PROMPTS.items():
        before, after = (inferer.predict(e, rule, **prompt).labels for e in (encoded, shaken))
        assert (before == after).mean() >= 0.999, rule
