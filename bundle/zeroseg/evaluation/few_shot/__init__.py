"""Learning from a few labels, measured: heads fitted to k images or volumes of a set and scored on others of it.

Beside them stands what needs no frozen model. Each choice of images is drawn by a seed. All methods that learn have the same images, and
the same seconds of processor time, so that a busy machine favours none.
"""

from zeroseg.evaluation.few_shot.plan import Plan
from zeroseg.evaluation.few_shot.run import evaluate_few_shot

__all__ = ["Plan", "evaluate_few_shot"]
