"""The tasks of the app, one function each."""

from __future__ import annotations

from lib.configs import SEGMENTS, anonymous_labels
from lib.engine import Engine
from lib.heads import Heads
from lib.infers.learned import Learned
from lib.infers.points import Points, Scribbles
from lib.infers.segments import Segments
from lib.infers.text import Text
from lib.infers.tumor import Tumor
from zeroseg.backbones.weights import MODELS
from zeroseg.interaction.settings import TEXT_CERTAINTY

REFINE = ["guided", "none"]
EXTENT = ["volume", "slice"]
CANDIDATE = ["best", "1", "2", "3"]


def segments(engine: Engine) -> Segments:
    """The panel "Auto-Segmentation" of OHIF and "Auto Segmentation" of 3D Slicer."""
    return Segments(
        engine,
        type="segmentation",
        labels=anonymous_labels(),
        description="All segments of the image, most object-like first, named by the nouns in the option text if there are any; or "
        "(select: auto) what differs from its frame",
        config={
            "select": ["segments", "auto"],
            "text": "",
            "extent": EXTENT,
            "slice": -1,
            "refine": REFINE,
            "threshold": "auto",
            "max_segments": SEGMENTS,
        },
    )


def text(engine: Engine) -> Text:
    """The same panel: the option ``text`` is a text box in both viewers."""
    return Text(
        engine,
        type="segmentation",
        labels={"target": 1},
        description="What the words in the option text name, or the answer that it is absent",
        config={
            "text": "",
            "extent": EXTENT,
            "slice": -1,
            "refine": REFINE,
            "certainty": TEXT_CERTAINTY,
            "absent": ["error", "empty mask"],
        },
    )


def points(engine: Engine) -> Points:
    """The panel "Point Prompts" of OHIF and "SmartEdit" of 3D Slicer.

    The type is deepgrow: both panels show it, send foreground and background clicks of the label the user picked, and give the
    mask to that label. A deepedit task would get clicks under the names of all labels and had to keep them all. It declares no
    label of its own, so that OHIF offers the labels of all tasks, those of ``learned`` among them.
    """
    return Points(
        engine,
        type="deepgrow",
        labels={},
        description="The object under the clicks, in a volume all of it at once; each further click, in any slice, mends the answer",
        config={"extent": EXTENT, "refine": REFINE, "candidate": CANDIDATE},
    )


def scribbles(engine: Engine) -> Scribbles:
    """The panel "Scribbles" of 3D Slicer."""
    return Scribbles(
        engine,
        type="scribbles",
        labels={},
        description="The object under the green strokes and not under the red ones",
        config={"extent": EXTENT, "refine": REFINE, "candidate": CANDIDATE},
    )


def learned(engine: Engine, heads: Heads) -> Learned:
    """The panel "Auto-Segmentation", once something was learned."""
    return Learned(
        engine,
        heads,
        type="segmentation",
        description="The labels that people submitted, found in this image by what was learned from them",
        config={"extent": EXTENT, "slice": -1},
    )


def tumor(engine: Engine) -> Tumor | None:
    """The panel "Auto-Segmentation"; None where the bundle has no tumour model."""
    if not (MODELS / "tumor").is_dir():
        return None
    from zeroseg.tumor import TumorSegmentationInferer

    return Tumor(
        engine,
        TumorSegmentationInferer(),
        type="segmentation",
        labels={"tumor": 1},
        description="A tumour in a CT, MR or PET volume: of the organ, or what the text names (liver tumour, glioma, ...)",
        config={
            "organ": "body",
            "text": "",
            "modality": ["auto", "ct", "mr", "pet"],
            "absent": ["error", "empty mask"],
        },
    )
