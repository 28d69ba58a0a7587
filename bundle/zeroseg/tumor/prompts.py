"""Prompts: what is asked of a volume, as pairs of normal and abnormal descriptions (paper section 2.1).

The paper contrasts descriptions of the normal and the abnormal per organ; its wording is unknown. A third-party account
has one template each, "normal {modality} of {organ}" and "abnormal {modality} of {tumour}". ZeroSeg adds a second
wording of each, since an encoder answers to the words and not only to their meaning, and a third role, ``null``: the
same sentence with nothing named. What the null prompts explain as well as the tumour's own words is not evidence for
the tumour; that contrast is what lets nonsense find nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from zeroseg.errors import ZeroSegError

MODALITIES = {"ct": "CT", "mr": "MRI", "pet": "PET"}
"""Modality -> the word for it in a prompt."""
DICOM_MODALITIES = {"CT": "ct", "MR": "mr", "PT": "pet"}
"""DICOM's names -> ours."""

ORGANS: dict[str, tuple[str, ...]] = {
    "liver": ("liver tumour", "hepatic metastasis", "liver cyst"),
    "kidney": ("kidney tumour", "renal cell carcinoma", "kidney cyst"),
    "spleen": ("spleen tumour", "splenic lesion"),
    "pancreas": ("pancreas tumour", "pancreatic mass"),
    "colon": ("colon tumour", "colon cancer"),
    "lung": ("lung tumour", "lung nodule"),
    "brain": ("brain tumour", "glioma", "brain metastasis", "haemorrhage", "stroke", "multiple sclerosis lesion"),
    "head": ("head tumour", "glioma", "brain metastasis"),
    "nasopharynx": ("nasopharynx tumour", "nasopharyngeal carcinoma"),
    "hepatic vessel": ("tumour near hepatic vessel",),
    "limb": ("soft tissue sarcoma", "muscle tumour"),
    "thigh": ("soft tissue sarcoma", "muscle tumour"),
    "soft tissue": ("soft tissue sarcoma", "soft tissue tumour"),
    "abdomen": ("abdominal tumour", "abdominal mass"),
    "body": ("tumour", "lesion", "mass"),
}
"""Organs with prompts of their own -> tumour phrases that fit them, the first being the default."""

OF_THE_HEAD, OF_THE_LIMBS = ("brain", "head", "nasopharynx"), ("limb", "thigh", "soft tissue")
"""Organs that have embedded adapters of their own, see ``TumorSegmentationInferer``."""
OF_THE_LUNGS = ("lung", "lungs", "chest", "thorax")
"""Organs for which the stage ``lungs`` looks into the lungs."""

PLACES: dict[str, tuple[str, ...]] = {
    "brain": ("cerebrum", "cerebral", "cerebellum", "cerebellar", "brainstem", "intracranial", "meninges", "pituitary"),
    "head": ("skull", "face", "head and neck"),
    "nasopharynx": ("nasopharyngeal", "pharynx"),
    "lung": ("lungs", "pulmonary", "chest", "thorax", "thoracic", "bronchus", "bronchial", "mediastinum", "pleura", "pleural"),
    "liver": ("hepatic",),
    "kidney": ("kidneys", "renal"),
    "spleen": ("splenic",),
    "pancreas": ("pancreatic",),
    "colon": ("colorectal", "rectum", "rectal", "sigmoid", "large bowel"),
    "abdomen": (
        "abdominal", "adrenal", "adrenal gland", "bladder", "bowel", "cervix", "cervical", "esophagus", "gallbladder", "gastric",
        "oesophagus", "ovarian", "ovary", "pelvic", "pelvis", "peritoneum", "prostate", "small bowel", "stomach", "uterine", "uterus",
    ),
    "soft tissue": (
        "axilla", "breast", "breasts", "chest wall", "fat", "mammary", "muscle", "neck", "parotid", "skin", "thyroid",
    ),
    "limb": (
        "ankle", "arm", "bone", "buttock", "calf", "elbow", "extremity", "femur", "foot", "forearm", "hand", "hip", "humerus", "knee", "leg",
        "limbs", "lower extremity", "lower limb", "shoulder", "tibia", "upper extremity", "upper limb",
    ),
}  # fmt: skip
"""Organ with prompts of its own -> other names for it, and for places whose tissue is most like it. A text encoder that has never read
"breast" takes it for nonsense, and nonsense is nowhere."""

SIDES = ("left", "right", "both")
"""Words that mean nothing to the model."""

ANY_TUMOUR = ("tumour", "lesion", "mass", "cancer", "carcinoma", "metastasis", "sarcoma", "nodule")
"""Words for a tumour wherever it is."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "normal": ("normal {modality} of {organ}", "healthy {organ} in {modality}"),
    "abnormal": ("abnormal {modality} of {organ} with {tumor}", "{tumor} in {organ} in {modality}"),
    "null": ("{modality} of {organ}", ""),
}
"""Role -> wordings. The null role names what the picture shows anyway, or nothing at all."""

REGIONS = {
    "brain": (0, 0),
    "head": (0, 0),
    "nasopharynx": (0, 0),
    "lung": (1, 1),
    "liver": (1, 2),
    "spleen": (1, 2),
    "hepatic vessel": (1, 2),
    "pancreas": (2, 2),
    "kidney": (2, 2),
    "abdomen": (2, 2),
    "colon": (2, 3),
    "limb": (3, 3),
    "thigh": (3, 3),
}
"""Organ -> top and bottom body region (0 head, 1 chest, 2 abdomen, 3 pelvis and legs) for the DDPM release's
conditions."""

_OTHER_NAMES = {name: organ for organ, names in PLACES.items() for name in names}
_SPELLING = {"tumor": "tumour", "tumors": "tumour", "tumours": "tumour", "mri": "mr", "pt": "pet"}


def normalise(text: object, what: str) -> str:
    """Lower case, single blanks, British tumour, no punctuation: one spelling for one meaning.

    Raises:
        ZeroSegError: it is no text, or blank.
    """
    if not isinstance(text, str) or not text.strip():
        raise ZeroSegError(f"{what} must be words, e.g. liver, not {text!r}")
    words = re.sub(r"[^\w\s-]", " ", text.lower()).replace("_", " ").split()
    if not words:
        raise ZeroSegError(f"{what} must be words, e.g. liver, not {text!r}")
    return " ".join(_SPELLING.get(w, w) for w in words)


def check_modality(modality: object) -> str:
    """``ct``, ``mr`` or ``pet`` from any usual spelling (CT, MRI, PT ...).

    Raises:
        ZeroSegError: it is none of them.
    """
    name = str(modality or "").strip().lower()
    name = _SPELLING.get(name, name)
    if name not in MODALITIES:
        raise ZeroSegError(f"modality must be ct, mr or pet, not {modality!r}")
    return name


def prompt_set(organ: str = "body", tumor: str | None = None, modality: str = "ct") -> list[tuple[str, str]]:
    """The prompts that ask for a tumour in an organ.

    Args:
        organ: free text; a key of ``ORGANS`` gets that organ's default tumour where ``tumor`` is None.
        tumor: free text, or None.
        modality: ct, mr or pet.

    Returns:
        Ordered (role, text) pairs: normal, abnormal, null, each with all its wordings.

    Raises:
        ZeroSegError: organ or tumor is blank, or the modality is unknown.
    """
    organ = normalise(organ, "organ")
    words = {
        "organ": organ,
        "modality": MODALITIES[check_modality(modality)],
        "tumor": default_tumor(organ) if tumor is None else normalise(tumor, "tumor"),
    }
    return [(role, template.format(**words)) for role, templates in TEMPLATES.items() for template in templates]


def default_tumor(organ: str) -> str:
    """What is looked for in an organ when no tumour is named."""
    return ORGANS[organ][0] if organ in ORGANS else f"{organ} tumour"


def place_of(organ: str, tumor: str) -> str:
    """The organ with prompts of its own in which a tumour is looked for.

    Where no organ is named but the body, the tumour's own words may name one: "liver tumour", "glioma", "breast cancer".

    Args:
        organ, tumor: as ``normalise`` gives them.

    Returns:
        A key of ``ORGANS``; an organ that is neither such a key nor in ``PLACES`` stays as it is.
    """
    if organ != "body":
        return _known(organ) or organ
    listed = next((other for other, phrases in ORGANS.items() if other != "body" and tumor in phrases), None)
    return listed or _named(tumor) or "body"


def without_place(tumor: str, place: str) -> str:
    """A tumour's words without what names that place: "breast cancer" in soft tissue is "cancer".

    Returns:
        The words as they were, where they name no tumour of that place.
    """
    words = tumor.split()
    return words[-1] if words[-1] in ANY_TUMOUR and _named(tumor) == place else tumor


def _named(tumor: str) -> str | None:
    """The organ that all but the last of a tumour's words name, or None."""
    return _known(tumor.rpartition(" ")[0])


def _known(name: str) -> str | None:
    """The organ with prompts of its own that a name stands for, or None."""
    bare = " ".join(word for word in name.split() if word not in SIDES)
    organ = _OTHER_NAMES.get(bare, bare)
    return organ if organ in ORGANS else None


def organ_note(organ: str) -> str | None:
    """A line for the user when an organ has no prompts of its own, with the closest known name; None when it has."""
    organ = normalise(organ, "organ")
    if organ in ORGANS:
        return None
    close = get_close_matches(organ, ORGANS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(ORGANS)}"
    return f"organ {organ!r} has no prompts of its own, its words are used as they are; {hint}"


def grammar() -> Iterator[tuple[str, str, str, str]]:
    """All (organ, tumor, modality, role) combinations the embedded text encoder is made for."""
    for organ, tumours in ORGANS.items():
        for tumour in dict.fromkeys((*tumours, *ANY_TUMOUR)):
            for modality in MODALITIES:
                for role in TEMPLATES:
                    yield organ, tumour, modality, role
