"""What the word head learns: its concepts, and which of them drawn phantoms and folders of real images show.

Of a real image only what images of its kind show is said, never where: ``shows`` is in every one of the folder, ``may`` in some; all
other concepts are in none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = (
    "ct", "mr", "abdominal ct", "chest ct", "brain ct", "limb ct", "brain mr", "heart mr", "limb mr", "ultrasound", "breast ultrasound",
    "dermoscopy", "blood smear", "fluorescence microscopy", "electron microscopy", "histology", "chest x-ray", "pet scan", "endoscopy",
    "retinal fundus", "retinal oct", "dental x-ray", "bone x-ray", "wound photograph", "microscopy",
)  # fmt: skip
THINGS = (
    "liver", "spleen", "kidneys", "stomach", "bowel", "bladder", "spine", "bone", "muscle", "fat", "aorta", "liver tumour", "kidney tumour",
    "spleen tumour", "abdominal tumour", "soft tissue tumour", "brain", "ventricles", "skull", "hippocampus", "spinal cord", "brain tumour",
    "haemorrhage", "stroke", "multiple sclerosis lesion", "nasopharyngeal tumour", "breast tumour", "tissue", "skin", "skin lesion", "hair",
    "white blood cell", "red blood cells", "cell nuclei", "cells", "glands", "worms", "lungs", "heart", "lung tumour", "lung opacity",
    "opacity", "body", "tumour", "lesion", "mucosa", "polyp", "optic disc", "exudates", "vessels", "retina", "retinal fluid", "carotid artery",
    "teeth", "wound",
)  # fmt: skip
CONCEPTS = KINDS + THINGS

IMPLIES = {
    **dict.fromkeys(("abdominal ct", "chest ct", "brain ct", "limb ct"), ("ct",)),
    **dict.fromkeys(("brain mr", "heart mr", "limb mr"), ("mr",)),
    **dict.fromkeys(("blood smear", "fluorescence microscopy", "electron microscopy", "histology"), ("microscopy",)),
    **{
        thing: ("tumour", "lesion")
        for thing in THINGS
        if thing.endswith(" tumour")
    },
    **dict.fromkeys(("haemorrhage", "stroke", "multiple sclerosis lesion", "skin lesion"), ("lesion",)),
    "breast ultrasound": ("ultrasound",),
    "white blood cell": ("cells",),
    "red blood cells": ("cells",),
    "lung opacity": ("opacity",),
    "carotid artery": ("vessels",),
    "spine": ("bone",),
}  # fmt: skip
"""What is there as well, and in the same place, where a concept is."""

UNSAID = {
    **dict.fromkeys(("ct", "mr", "pet scan", "chest x-ray"), ("tissue", "body", "muscle", "fat", "vessels", "bone", "aorta", "skin")),
    "abdominal ct": ("stomach", "bowel", "bladder", "spine"),
    "chest ct": ("spine", "heart"),
    "chest x-ray": ("spine", "opacity", "lesion"),
    "brain ct": ("ventricles", "skull", "opacity"),
    "brain mr": ("ventricles", "skull", "spinal cord"),
    "ultrasound": ("tissue", "muscle", "fat", "skin", "vessels", "lesion", "opacity"),
    "dermoscopy": ("hair", "tissue", "body"),
    "histology": ("cells", "glands", "tissue", "vessels", "fat", "muscle"),
    "endoscopy": ("tissue", "vessels", "bowel", "stomach", "lesion"),
    "retinal fundus": ("tissue", "lesion"),
    "retinal oct": ("tissue", "lesion", "vessels"),
    "dental x-ray": ("tissue", "bone", "lesion", "opacity"),
    "bone x-ray": ("tissue", "muscle", "fat", "body", "lesion", "opacity"),
    "wound photograph": ("tissue", "body", "lesion", "skin lesion", "hair"),
    "fluorescence microscopy": ("cells", "tissue", "microscopy", "cell nuclei"),
    "electron microscopy": ("cells", "tissue", "cell nuclei"),
    "blood smear": ("cell nuclei", "cells"),
    "microscopy": ("cells", "tissue"),
}  # fmt: skip
"""By kind of image, what its folder, or its phantom, does not tell of."""

# Names of phantoms' masks that are spelled otherwise than the concept.
_RENAMED = {"kidney": "kidneys", "red blood cell": "red blood cells", "nuclei": "cell nuclei", "organ": "body"}


@dataclass(frozen=True)
class Shows:
    """Of an image what it shows and what it may show."""

    shows: frozenset[str]
    may: frozenset[str]


def shows(present: Iterable[str], may: Iterable[str] = ()) -> Shows:
    """With all that is implied.

    Raises:
        ValueError: a name is no concept.
    """
    there = set(present)
    for name in tuple(there):
        there |= set(IMPLIES.get(name, ()))
    perhaps = set(may) | {word for name in there for word in UNSAID.get(name, ())}
    for name in tuple(perhaps):
        perhaps |= set(IMPLIES.get(name, ()))
    unknown = (there | perhaps) - set(CONCEPTS)
    if unknown:
        raise ValueError(f"no concepts: {', '.join(sorted(unknown))}")
    return Shows(frozenset(there), frozenset(perhaps - there))


def concept_of(mask: str) -> str:
    """The concept that a phantom's mask shows."""
    return _RENAMED.get(mask, mask)


FOLDERS = {
    "blood_bccd": shows(("blood smear", "white blood cell", "red blood cells")),
    "nuclei_dsb2018": shows(("microscopy", "cell nuclei"), ("fluorescence microscopy", "histology", "glands")),
    "cxr_ieee8023": shows(("chest x-ray", "lungs", "heart", "lung opacity")),
    "blood_chula_rbc": shows(("blood smear", "red blood cells"), ("white blood cell",)),
    "ct_ais_core_penumbra": shows(("brain ct", "brain", "stroke")),
    "ct_ich_haemorrhage": shows(("brain ct", "brain", "haemorrhage")),
    "fundus_drishti_disc": shows(("retinal fundus", "optic disc", "vessels", "retina")),
    "fundus_idrid_exudates": shows(("retinal fundus", "exudates", "retina"), ("optic disc", "vessels")),
    "fundus_idrid_whole": shows(("retinal fundus", "optic disc", "vessels", "retina"), ("exudates",)),
    "histo_camelyon_lymph_tumour": shows(("histology", "tissue", "cell nuclei", "tumour")),
    "histo_ocdc_oral_tumour": shows(("histology", "tissue", "cell nuclei", "tumour")),
    "mr_brisc2025_brain_tumour": shows(("brain mr", "brain", "brain tumour")),
    "mr_hvsmr_heart": shows(("heart mr", "heart"), ("lungs", "liver", "spine")),
    "mr_ms_flair_lesion": shows(("brain mr", "brain", "multiple sclerosis lesion")),
    "mr_npc_t2_tumour": shows(("brain mr", "nasopharyngeal tumour"), ("brain", "spinal cord")),
    "us_carotid_artery": shows(("ultrasound", "carotid artery")),
    "mr_ms_lesion_open": shows(("brain mr", "brain"), ("multiple sclerosis lesion",)),
    "mr_brain_ms_unlabelled": shows(("brain mr", "brain"), ("multiple sclerosis lesion",)),
    "mr_hippocampus_msd": shows(("brain mr", "brain", "hippocampus")),
    "mr_spinal_cord_sct": shows(("mr", "spinal cord"), ("spine", "brain", "lesion")),
    "mr_heart_seg3d_unlabelled": shows(("heart mr",), ("heart", "lungs", "liver", "spine")),
    "ct_mr_totalseg_examples_unlabelled": shows(
        ("abdominal ct",), ("liver", "kidneys", "spleen", "lungs", "heart", "chest ct")
    ),
    "ct_head_template_unlabelled": shows(("brain ct", "brain")),
}
"""Folder of real images -> what they show."""

_NUCLEI = shows(("fluorescence microscopy", "cell nuclei"))
_FLUORESCENT = shows(("fluorescence microscopy",))
NAMES = (
    (r"mri_head", shows(("brain mr",), ("brain",))),
    (r"_em_|em_fly|em_mito", shows(("electron microscopy",))),
    (r"Worms", shows(("microscopy", "worms"))),
    (r"Yeast|WoundHealing|Vitra|Tumor|radar|embryo|funny|maize|plant|bead|rgb__cells|transmission", shows((), ("microscopy", "cells", "cell nuclei", "fluorescence microscopy", "tumour", "lesion", "tissue"))),
    (r"nucle|nuclear|dna|dapi|PLK|h2b|mitosis|mitotic|chromosome|PCNA|hela|BBBC|Human|Fly|Speckles|Comet", _NUCLEI),
    (r"", _FLUORESCENT),
)  # fmt: skip
"""Folders of many kinds: (pattern of the file's name, what it shows), the first that fits."""
MIXED = ("micro_neubias", "micro_cellprofiler", "micro_bioimage_notebooks")


def of_file(folder: str, name: str) -> Shows:
    """What a real image shows.

    Raises:
        KeyError: the folder is not known.
    """
    if folder == "ct_mr_totalseg_examples_unlabelled" and not name.startswith("example_ct"):
        return shows(("brain ct", "brain")) if "brain" in name else shows(("mr",), THINGS)
    if folder in MIXED:
        return next(what for pattern, what in NAMES if re.search(pattern, name, re.IGNORECASE))
    return FOLDERS[folder]
