"""Learning from a few labelled images, beside a frozen diffusion model.

    head = fit([Case(image, label), ...], inferer, labels={"lesion": 1})
    head.predict(other_image).label_map

Volumes alone are learned from as a whole, by a network of their own. ``fit`` takes seconds to a minute; ``exemplar`` takes one labelled image and no fitting at all.
"""

from zeroseg.learning.cases import Case, as_volumes
from zeroseg.learning.exemplar import Exemplar
from zeroseg.learning.fitting import Stopped, fit
from zeroseg.learning.head import LearnedHead, Prediction

__all__ = ["Case", "Exemplar", "LearnedHead", "Prediction", "Stopped", "as_volumes", "fit"]
