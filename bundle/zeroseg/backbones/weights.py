"""Where frozen weights come from: the embedded folder, a local folder, or a hub id with a revision.

Nothing is downloaded unless the caller names a hub id, nothing but safetensors is read, and a folder that carries a
``SHA256SUMS`` file must match it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from zeroseg.errors import WeightsError
from zeroseg.hashing import file_sha256
from zeroseg.places import MODELS

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_HUB_FILES = ["*.json", "*.txt", "*.safetensors"]


def resolve_folder(
    source: str | Path,
    embedded: str = "attention",
    revision: str | None = None,
    what: str = "backbone",
    form: str = "a saved diffusers pipeline",
) -> Path:
    """The local folder that holds the weights ``source`` names.

    Args:
        source: ``"embedded"``, a local folder, or a hub id ``owner/name``; only the last may use the network.
        embedded: the folder below ``bundle/models`` that ``"embedded"`` stands for.
        revision: branch, tag or commit of a hub id. Required there, so that a result can be reproduced.
        what: the name of the model in messages.
        form: what the folder must be, in messages.

    Raises:
        WeightsError: the folder does not exist, or the hub id lacks a revision or cannot be fetched.
    """
    name = str(source)
    if name == EMBEDDED:
        folder = MODELS / embedded
        if not (folder / "model_index.json").is_file():
            msg = f"the embedded weights are missing in models/{embedded}: restore that folder of the bundle, or name another backbone"
            raise WeightsError(msg)
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not _HUB_ID.match(name) or name.startswith("."):
        msg = f"{what} {name!r} is neither an existing folder nor a hub id (owner/name): give the folder of {form}"
        raise WeightsError(msg)
    if revision is None:
        msg = f"{what} {name!r} is no local folder; to fetch it from the hub, name a revision (commit, tag or branch) as well"
        raise WeightsError(msg)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        msg = (
            f"cannot fetch {what} {name!r} at revision {revision!r} ({type(error).__name__}): "
            "check the name and the network, or copy the folder here and give its path"
        )
        raise WeightsError(msg) from error


def verify_sums(folder: Path) -> dict[str, str]:
    """Check ``SHA256SUMS`` where the folder has one, and hash every safetensors file.

    Returns:
        relative path -> SHA-256 of each safetensors file, sorted by path.

    Raises:
        WeightsError: a listed file is missing or differs.
    """
    hashes = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*.safetensors"))}
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        for line in filter(None, sums.read_text().splitlines()):
            expected, _, name = line.partition("  ")
            path = folder / name
            if not path.is_file():
                msg = f"{name} is listed in SHA256SUMS but missing from {folder.name}: copy the folder again"
                raise WeightsError(msg)
            if (hashes.get(name) or file_sha256(path)) != expected:
                msg = f"{name} in {folder.name} does not match its SHA-256: the file is damaged or was changed; copy it again"
                raise WeightsError(msg)
    return hashes


def write_sums(folder: Path) -> None:
    """List every file of a model folder but its README in ``SHA256SUMS``, as ``verify_sums`` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "README.md"))
    sums = (f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    (folder / "SHA256SUMS").write_text("".join(sums))


def fingerprint(hashes: dict[str, str]) -> str:
    """One SHA-256 over the sorted hashes of a weights folder, for manifests and cache keys."""
    return hashlib.sha256("\n".join(f"{h}  {n}" for n, h in sorted(hashes.items())).encode()).hexdigest()
