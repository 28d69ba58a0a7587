"""The bundle's configs as runners: what the command line, cohorts and repeated runs are built from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from zeroseg.cases import CaseRunner
from zeroseg.errors import ZeroSegError
from zeroseg.places import BUNDLE, CONFIGS

OWN_OPTIONS = ("dataset_dir", "dataset", "output_dir", "prompts", "bundle_root")


def find_config(name: str) -> Path:
    """The config a user means: a path, or the name of one in the bundle's ``configs`` folder.

    Raises:
        ZeroSegError: there is none.
    """
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("inference*.yaml")))
    raise ZeroSegError(f"no config {name}: give a path, or one of the bundle's: {known}")


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values read as the bundle's command line reads them: ``[1, 2]``, ``None``, ``0.5``, words.

    Raises:
        ZeroSegError: a pair is no pair, or sets what has an option of its own.
    """
    from fire.parser import DefaultParseValue

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ZeroSegError(f"--set takes KEY=VALUE, such as select=auto, not {pair!r}")
        if key in OWN_OPTIONS:
            raise ZeroSegError(f"--set cannot give {key}: it has an option of its own")
        settings[key] = DefaultParseValue(value)
    return settings


def build_runner(config: Path, settings: Mapping[str, Any], output: Path) -> CaseRunner:
    """The evaluator of a bundle config; nothing is loaded yet.

    Args:
        config: path of the YAML file.
        settings: config id -> value, ``inferer#refine`` reaches inside an object.
        output: folder for results.

    Raises:
        ZeroSegError: the config has no such id, or its objects refuse the value.
    """
    return build(config, settings, "evaluator", output_dir=str(output))


def build(config: Path, settings: Mapping[str, Any], content: str, **own: Any) -> Any:
    """What a bundle config makes under an id; where it leaves the making to a call (``_mode_: callable``), that is made here.

    Args:
        config: path of the YAML file.
        settings: config id -> value, as the user gave them.
        content: the id.
        own: settings of options of their own; a config need not know them.

    Raises:
        ZeroSegError: the config has no such setting, or its objects refuse the value.
    """
    parser = ConfigParser()
    parser.read_config(str(config))
    for key in settings:
        if key.replace("::", "#").split("#")[0] not in parser.config:
            raise ZeroSegError(f"{config.name} has no setting {key!r}")
    try:
        parser.update({**settings, "bundle_root": str(BUNDLE), **own})
        made = parser.get_parsed_content(content)
        return made() if isinstance(made, partial) else made
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, ZeroSegError):
            cause = cause.__cause__
        raise ZeroSegError(f"{config.name} with these settings: {cause}") from error
