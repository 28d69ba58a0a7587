"""What every segmentation returns."""

from __future__ import annotations

import numpy as np
import pytest

from zeroseg.segmentation import scores_of


def test_scores_are_mean_confidences_and_0_where_a_label_has_no_pixel():
    labels = np.array([[0, 1, 1], [3, 3, 3]], np.uint8)
    confidence = np.array([[0.9, 0.2, 0.4], [0.5, 0.6, 1.0]], np.float32)
    assert scores_of(labels, confidence) == pytest.approx([0.3, 0.0, 0.7])
    assert scores_of(np.zeros((2, 3), np.uint8), confidence) == []
