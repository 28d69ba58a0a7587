"""Where frozen weights come from: the embedded folder, a local folder, or a hub id with a revision.

Nothing is downloaded unless the caller names a hub id, and then only the files the model needs: a hub repository of
Stable Diffusion holds every weight several times over (root checkpoints, half precision, non-EMA, a safety checker).
Nothing but safetensors is read, and a folder that carries a ``SHA256SUMS`` file must match it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroseg.errors import WeightsError, first_line
from zeroseg.hashing import file_sha256
from zeroseg.places import MODELS

EMBEDDED = "embedded"
EMBEDDED_HEAD, EMBEDDED_LIMB, EMBEDDED_BODY = "embedded:head", "embedded:limb", "embedded:body"
EMBEDDED_SETS = {
    EMBEDDED: MODELS / "tumor",
    EMBEDDED_HEAD: MODELS / "tumor_head",
    EMBEDDED_LIMB: MODELS / "tumor_limb",
    EMBEDDED_BODY: MODELS / "tumor_body",
}
"""Names of the folders of tumour adapters that ship with the package, some with a text encoder of their own."""
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_SETTINGS = ("*.json", "*.txt")
"""Small files beside the weights: configs, vocabularies, shard indices."""

PIPELINE_PARTS = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "scheduler": "",
}
"""Folder of a diffusers pipeline that is read -> its class. The others (safety checker, feature extractor, image
encoder) do not take part."""

Chooser = Callable[[Iterable[str], Callable[[str], dict]], list[str]]
"""(names in a repository, reader of one of its JSON files) -> the names that are needed."""


# Which files ---------------------------------------------------------------------------------------------------------


def weight_files(names: Iterable[str], part: str, variant: str | None = None, where: str = "the folder") -> list[str]:
    """The safetensors files of one part of a model, whole or in shards.

    diffusers and transformers write ``diffusion_pytorch_model`` or ``model``, then ``.<variant>`` (fp16, non_ema), then
    ``-00001-of-00002`` (before or after the variant) for shards.

    Args:
        names: relative paths, with ``/``.
        part: folder of the part; "" for the top.
        variant: the copy to take. None: the plain one, or the only one there is.
        where: what is searched, in messages.

    Raises:
        WeightsError: there is no such copy, only pickles, or a shard is missing.
    """
    prefix = f"{part}/" if part else ""
    stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
    pattern = re.compile(
        re.escape(prefix + stem) + r"(?:\.(\w+))?(?:-(\d{5})-of-(\d{5}))?(?:\.(\w+))?\.safetensors", re.ASCII
    )
    copies: dict[str | None, dict[str, tuple[int, int]]] = {}
    tensors = False
    for name in sorted(names):
        tensors |= name.startswith(prefix) and "/" not in name[len(prefix) :] and name.endswith(".safetensors")
        if found := pattern.fullmatch(name):
            before, number, count, after = found.groups()
            copies.setdefault(before or after, {})[name] = (int(number or 1), int(count or 1))
    here = f"{where}/{part}" if part else where
    if not tensors:
        raise WeightsError(
            f"{here} holds no .safetensors file: pickle weights are refused; save it with safe_serialization=True"
        )
    if variant is None and None not in copies and len(copies) == 1:
        (variant,) = copies
    if variant not in copies:
        kinds = ", ".join(sorted(k or "the plain one" for k in copies)) or f"none named {stem}.safetensors"
        raise WeightsError(
            f"{here} holds no {variant or 'plain'} copy of its weights (there is: {kinds}); choose by variant"
        )
    files = copies[variant]
    whole = [name for name, (_, count) in files.items() if count == 1]
    if whole:
        return whole
    counts = {count for _, count in files.values()}
    if len(counts) > 1 or {number for number, _ in files.values()} != set(range(1, max(counts) + 1)):
        raise WeightsError(
            f"{here} lacks a shard of its weights ({len(files)} of {max(counts)}): copy the folder again"
        )
    return list(files)


def pipeline_parts(index: Mapping, where: str) -> list[str]:
    """The folders of a diffusers pipeline that its ``model_index.json`` names and that are read.

    Args:
        index: content of ``model_index.json``.
        where: the pipeline, in messages.

    Raises:
        WeightsError: the pipeline is of another kind than Stable Diffusion 1.x, 2.x or XL.
    """
    kind = str(index.get("_class_name", ""))
    named = {part: value for part, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    parts = [part for part in PIPELINE_PARTS if named.get(part, (None, None))[1]]
    lacking = [part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if part not in parts]
    if lacking:
        raise WeightsError(
            f"{where} is a {kind or 'pipeline'} without {lacking[0]}: only Stable Diffusion 1.x, 2.x and XL (base) fit"
        )
    if ("text_encoder_2" in parts) != ("tokenizer_2" in parts):
        raise WeightsError(f"{where} names one of text_encoder_2 and tokenizer_2 without the other: correct its index")
    for part in parts:
        wanted, given = PIPELINE_PARTS[part], str(named[part][1])
        if wanted and given.removesuffix("Fast") != wanted:
            raise WeightsError(f"the {part} of {where} is a {given}, and only {wanted} is supported")
    return parts


def choose_pipeline(variant: str | None = None, where: str = "the pipeline") -> Chooser:
    """What a Stable Diffusion pipeline needs of a repository: by its ``model_index.json``, one copy of each weight."""

    def choose(names: Iterable[str], read: Callable[[str], dict]) -> list[str]:
        names = sorted(names)
        if "model_index.json" not in names:
            raise WeightsError(f"{where} holds no model_index.json: it is no diffusers pipeline")
        parts = pipeline_parts(read("model_index.json"), where)
        chosen = ["model_index.json"]
        for part in parts:
            chosen += [n for n in names if any(fnmatch.fnmatch(n, f"{part}/{kind}") for kind in _SETTINGS)]
            if part in ("unet", "vae", "text_encoder", "text_encoder_2"):
                chosen += weight_files(names, part, variant, where)
        return chosen

    return choose


def choose_encoder(where: str = "the encoder") -> Chooser:
    """What a transformers encoder needs of a repository: its settings and one copy of its weights."""

    def choose(names: Iterable[str], read: Callable[[str], dict]) -> list[str]:
        names = sorted(names)
        settings = [n for n in names if "/" not in n and any(fnmatch.fnmatch(n, kind) for kind in _SETTINGS)]
        return settings + weight_files(names, "", None, where)

    return choose


# Where they are ------------------------------------------------------------------------------------------------------


def resolve_folder(
    source: str | Path,
    embedded: str = "attention",
    revision: str | None = None,
    what: str = "backbone",
    form: str = "a saved diffusers pipeline",
    choose: Chooser | None = None,
) -> Path:
    """The local folder that holds the weights ``source`` names.

    A download says how many gigabytes it is before it starts, shows a bar, and goes on where an earlier one ended.

    Args:
        source: ``"embedded"``, a local folder, or a hub id ``owner/name``; only the last may use the network.
        embedded: the folder below ``bundle/models`` that ``"embedded"`` stands for.
        revision: branch, tag or commit of a hub id. Required there, so that a result can be reproduced.
        what: the name of the model in messages.
        form: what the folder must be, in messages.
        choose: the files of a hub repository that are needed; None: those of a pipeline.

    Raises:
        WeightsError: the folder does not exist, or the hub id lacks a revision or cannot be fetched, or the repository
            does not hold what is needed.
    """
    name = str(source)
    if name == EMBEDDED:
        folder = MODELS / embedded
        if not (folder / "model_index.json").is_file():
            raise WeightsError(
                f"the embedded weights are missing in models/{embedded}: restore that folder of the bundle, "
                "or name another backbone"
            )
        return folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if not _HUB_ID.match(name) or name.startswith("."):
        raise WeightsError(
            f"{what} {name!r} is neither an existing folder nor a hub id (owner/name): give the folder of {form}"
        )
    if revision is None:
        raise WeightsError(
            f"{what} {name!r} is no local folder; to fetch it from the hub, name a revision (commit, tag or branch) "
            "as well"
        )
    return _from_hub(name, revision, what, choose or choose_pipeline(where=name))


def _from_hub(name: str, revision: str, what: str, choose: Chooser) -> Path:
    """Fetch what is needed of a hub repository, or find it in the cache when the hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import enable_progress_bars

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception:
            raise WeightsError(
                f"cannot fetch {what} {name!r} at revision {revision!r} ({type(error).__name__}): "
                "check the name and the network, or copy the folder here and give its path"
            ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    enable_progress_bars()  # transformers switches them off for everyone when it is told to be quiet
    try:

        def read(file: str) -> dict:
            return json.loads(Path(hf_hub_download(name, file, revision=info.sha)).read_text())

        files = choose(sizes, read)
        absent = snapshot_download(name, revision=info.sha, allow_patterns=_literal(files), dry_run=True)
        absent = [file.filename for file in absent if file.will_download]
        if absent:
            licence = getattr(info.card_data, "license", None) or "not stated; read its model card"
            print(
                f"fetching {name}: {sum(sizes[f] for f in absent) / 1e9:.2f} GB in {len(absent)} files "
                f"(its licence: {licence})",
                file=sys.stderr,
            )
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=_literal(files)))
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"the download of {what} {name!r} ended early ({type(error).__name__}): start again, it goes on from there"
        ) from error


def _literal(names: Iterable[str]) -> list[str]:
    """Patterns that match exactly these names."""
    return [re.sub(r"([\[*?])", r"[\1]", name) for name in names]


def relative_files(folder: Path) -> list[str]:
    """All files of a folder, as sorted relative paths with ``/``."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# What they hold ------------------------------------------------------------------------------------------------------


def verify_sums(folder: Path, files: Iterable[str] | None = None) -> dict[str, str]:
    """Check ``SHA256SUMS`` where the folder has one, and hash the weights.

    Args:
        folder: of the weights.
        files: relative paths of the safetensors files that are read; None: all. Other weights in the folder are left
            alone, for they may be many gigabytes.

    Returns:
        relative path -> SHA-256 of each of these files, sorted by path.

    Raises:
        WeightsError: a listed file is missing or differs, one that is read is not listed, or the list cannot be read.
    """
    wanted = [n for n in relative_files(folder) if n.endswith(".safetensors")] if files is None else sorted(files)
    hashes = {name: file_sha256(folder / name) for name in wanted}
    if not (folder / "SHA256SUMS").is_file():
        return hashes
    listed = _listed_sums(folder)
    for name, expected in listed.items():
        if files is not None and name not in hashes and name.endswith((".safetensors", ".bin", ".ckpt", ".pt")):
            continue
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{name} is listed in SHA256SUMS but missing from {folder.name}: copy the folder again")
        if (hashes.get(name) or file_sha256(path)) != expected:
            raise WeightsError(
                f"{name} in {folder.name} does not match its SHA-256: the file is damaged or was changed; copy it again"
            )
    for name in hashes:
        if name not in listed:
            raise WeightsError(f"{name} is not listed in SHA256SUMS of {folder.name}: copy the folder again")
    return hashes


def _listed_sums(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of ``SHA256SUMS``, as ``sha256sum`` writes it in all its ways: ``name``, ``*name``, ``./name``."""
    listed = {}
    try:
        for line in filter(str.strip, (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()):
            digest, name = line.split(maxsplit=1)
            listed[name.removeprefix("*").removeprefix("./")] = digest.lower()
    except ValueError as error:
        raise WeightsError(f"SHA256SUMS in {folder.name} is no list of sha256sum: copy it again") from error
    # What `find | xargs sha256sum` says of the list itself was true before it was written.
    listed.pop("SHA256SUMS", None)
    return listed


def write_sums(folder: Path) -> None:
    """List every file of a model folder but its README in ``SHA256SUMS``, as ``verify_sums`` reads it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "README.md"))
    sums = (f"{file_sha256(p)}  {p.relative_to(folder).as_posix()}\n" for p in files)
    (folder / "SHA256SUMS").write_text("".join(sums))


def fingerprint(hashes: dict[str, str]) -> str:
    """One SHA-256 over the sorted hashes of a weights folder, for manifests and cache keys."""
    return hashlib.sha256("\n".join(f"{h}  {n}" for n, h in sorted(hashes.items())).encode()).hexdigest()


def read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of one part of a model, from its safetensors file or shards.

    Raises:
        WeightsError: a file is damaged, or two of them hold the same key.
    """
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for name in files:
        try:
            part = load_file(folder / name)
        except Exception as error:  # safetensors raises its own kinds, none documented
            raise WeightsError(f"cannot read {name} in {folder.name}: {first_line(error)}") from error
        if twice := state.keys() & part.keys():
            raise WeightsError(f"{name} in {folder.name} repeats the key {min(twice)} of another shard: copy it again")
        state |= part
    return state


def fill(
    network: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    harmless: Iterable[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Give a network exactly the weights of a file: every key of the one must be a key of the other, of the same shape.

    Args:
        network: on the meta device, so that no weight exists that the file did not give, or on any other.
        state: key -> tensor; copied, so that the file may change afterwards.
        what: the part and where it comes from, in messages.
        harmless: patterns of keys that may be there in excess, because nothing that is computed depends on them.
        device, dtype: of the filled network; integer tensors keep their type.

    Raises:
        WeightsError: keys are missing, in excess, or of another shape. The message names the first ones.
    """
    own = network.state_dict()
    state = {k: v for k, v in state.items() if k in own or not any(fnmatch.fnmatch(k, h) for h in harmless)}
    for sentence, keys in (
        ("lacks {} of the weights it needs", own.keys() - state.keys()),
        ("holds {} weights of something else", state.keys() - own.keys()),
        ("holds {} weights of another shape", {k for k in own.keys() & state.keys() if own[k].shape != state[k].shape}),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (" ..." if len(keys) > 3 else "")
            raise WeightsError(f"{what} {sentence.format(len(keys))} ({shown}): they do not fit its config")
    ready = {k: v.to(device, dtype if v.is_floating_point() else v.dtype, copy=True) for k, v in state.items()}
    network.load_state_dict(ready, assign=True)
    return network.to(device).eval().requires_grad_(False)


def check_vocabulary(tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer without words: transformers 5 makes one where its file is missing, and all texts then mean the
    same.

    Args:
        tokenizer: of transformers.
        what: it belongs to, in messages.

    Raises:
        WeightsError: it knows its special tokens alone.
    """
    # Some kinds bring one or two pieces beside them that are no words, such as the mark of a word's start.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)) + 2:
        raise WeightsError(f"the tokenizer of {what} knows no words: copy its files (vocab.txt, tokenizer.json) again")
