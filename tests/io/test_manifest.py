"""Hashes, versions and JSON."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

import zeroseg
from bad_inputs import bundled
from zeroseg.io import file_sha256, versions, write_json


def test_sha256_of_small_large_and_empty_files(tmp_path):
    assert file_sha256(bundled("CT_small.dcm")) == hashlib.sha256(bundled("CT_small.dcm").read_bytes()).hexdigest()
    data = bytes(range(256)) * 12_345  # several pieces
    (tmp_path / "large").write_bytes(data)
    assert file_sha256(tmp_path / "large") == hashlib.sha256(data).hexdigest()
    (tmp_path / "empty").touch()
    assert file_sha256(str(tmp_path / "empty")).startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_versions_are_those_of_the_imported_packages():
    found = versions()
    assert found["zeroseg"] == zeroseg.__version__ and found["python"].count(".") == 2
    assert (found["torch"], found["numpy"], found["pydicom"]) == (
        torch.__version__,
        np.__version__,
        pydicom.__version__,
    )
    assert {"monai", "diffusers", "transformers", "nibabel"} <= set(found)


def test_json_of_everything_a_manifest_holds(tmp_path):
    @dataclass
    class Score:
        dice: float
        path: Path

    manifest = {
        "scores": np.float32([0.5, np.nan]),
        "count": np.int64(3),
        "ok": np.bool_(True),
        1: (Path("a/b.png"), {"y", "x"}),
        "worst": float("inf"),
        "nested": Score(0.25, Path("c")),
        "name": "Läsion",
    }
    assert write_json(tmp_path / "m.json", manifest) == tmp_path / "m.json"
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    assert "Läsion" in text and text.endswith("}\n")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "scores": [0.5, None],
        "count": 3,
        "ok": True,
        "1": ["a/b.png", ["x", "y"]],
        "worst": None,
        "nested": {"dice": 0.25, "path": "c"},
        "name": "Läsion",
    }


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "m.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "m.json", {"a": object()})
    assert json.loads((tmp_path / "m.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
