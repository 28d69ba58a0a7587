"""What pyproject.toml promises: versions, extras, and that nothing is imported that nobody asked for."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from zeroseg.places import CONFIGS, MODELS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINNED = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-no-deps.txt"))
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", PINNED, re.MULTILINE))


def requirements(*extras: str) -> list[Requirement]:
    """Of the package and some extras, without its own name."""
    given = [*PROJECT["dependencies"], *(item for extra in extras for item in EXTRAS[extra])]
    return [asked for asked in map(Requirement, given) if asked.name != "zeroseg"]


def test_the_pins_are_inside_the_ranges_and_their_lower_ends():
    for asked in requirements(*EXTRAS):
        if asked.name != "torch":
            assert Version(PINS[asked.name]) in asked.specifier, asked
        for bound in asked.specifier:
            if bound.operator == ">=" and asked.name != "torch":
                assert PINS[asked.name].startswith(bound.version), f"{asked}: its lower end is what the tests run with"


def test_all_is_all():
    (everything,) = map(Requirement, EXTRAS["all"])
    # What "words" asks for brings sentence-transformers, which is not used: requirements-no-deps.txt leaves it out.
    assert everything.extras == set(EXTRAS) - {"all", "words"}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("bundle/zeroseg/cohort", ["batch"]),
        ("bundle/zeroseg/evaluation", ["measure"]),
        ("bundle/zeroseg/cli", []),
        ("monailabel_app", ["app"]),
    ],
)
def test_what_a_folder_imports_comes_with_its_extra(folder, extras):
    owners = metadata.packages_distributions()
    given = {asked.name.lower() for asked in requirements(*extras)}
    own = {"zeroseg"}
    if folder == "monailabel_app":
        pytest.importorskip("monailabel")
        # MONAI Label and its like come without their dependencies, and the app's own folder is on the path.
        given |= set(re.findall(r"^([\w-]+)==", (ROOT / "requirements-no-deps.txt").read_text(), re.MULTILINE))
        own.add("lib")
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in own:
                    assert given & {owner.lower() for owner in owners[name]}, f"{file.name} imports {name}"


def test_the_bundles_files_are_found():
    assert (CONFIGS / "inference.yaml").is_file() and (MODELS / "attention" / "model_index.json").is_file()
