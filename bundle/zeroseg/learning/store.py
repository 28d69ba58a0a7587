"""Tensors and what is said of them, in one folder: whole at any time, checked by SHA-256 when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from zeroseg.errors import WeightsError
from zeroseg.io.manifest import write_json
from zeroseg.io.writing import atomic_path

CONFIG = "config.json"


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write ``head-<hash>.safetensors`` and then ``config.json``, which names it.

    A process that is killed leaves the old head or the new one, whole, and at most a file beside it that no config names.

    Raises:
        ZeroSegError: the folder cannot be written to.
    """
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"head-{digest[:12]}.safetensors"
    with atomic_path(folder / name) as part:
        part.write_bytes(content)
    write_json(folder / CONFIG, {**config, "weights": {"file": name, "sha256": digest}})
    for other in folder.glob("head-*.safetensors"):
        if other.name != name:
            with suppress(OSError):
                other.unlink()


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a folder.

    Raises:
        WeightsError: there is no head, or its file is missing, damaged or was changed.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, wanted = Path(config["weights"]["file"]).name, config["weights"]["sha256"]
        content = (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder.name} holds no learned head ({Path(error.filename).name} is missing): give the folder zeroseg learn wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot read the head in {folder.name}: {CONFIG} is damaged; learn it again") from error
    if hashlib.sha256(content).hexdigest() != wanted:
        raise WeightsError(
            f"{name} in {folder.name} does not match its SHA-256: it is damaged or was changed; learn it again"
        )
    try:
        return safetensors.torch.load(content), config
    except Exception as error:  # safetensors raises its own kinds, none documented
        raise WeightsError(f"cannot read {name} in {folder.name}: learn it again") from error
