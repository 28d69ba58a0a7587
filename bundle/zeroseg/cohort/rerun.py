"""Run the cases of a manifest again: same settings, prompts, weights and input, and so the same masks."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zeroseg.cases import CaseRunner
from zeroseg.configs import build_runner, find_config
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import DRAWN
from zeroseg.io import Case, file_sha256, find_cases, write_json

CONFIGS = {
    "AttentionSegmentationInferer": "inference.yaml",
    "TumorSegmentationInferer": "inference_tumor.yaml",
}
FILES = ("adapters", "text_encoder", "vocabulary")
"""Settings that describe files, of weights or words: given by --set, and checked."""


def run(
    manifest_file: Path,
    dataset_dir: Path,
    output_dir: Path,
    only: Sequence[str] | None = None,
    compare: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[int, int]:
    """Run the cases again; returns how many failed, and how many masks differ from the manifest's.

    Args:
        manifest_file: ``manifest.json`` of a run.
        dataset_dir: folder with the images of that run.
        output_dir: folder for the results.
        only: names of cases; None: all that were done.
        compare: say of every case whether the mask is the same bit for bit.
        settings: config settings that say where weights are, and the device.

    Raises:
        ZeroSegError: the manifest, the settings, the weights or the folders are wrong; nothing was run.
    """
    manifest = read_manifest(manifest_file)
    entries = [e for e in manifest["cases"] if (e["case"] in only if only else e["status"] == "done")]
    missing = sorted(set(only or ()) - {entry["case"] for entry in entries})
    if missing or not entries:
        raise ZeroSegError(f"{manifest_file.name} lists no case {missing[0] if missing else 'that is done'}")
    if output_dir.resolve() in (dataset_dir.resolve(), manifest_file.resolve().parent):
        raise ZeroSegError("output_dir holds the images or the results to compare with: give another folder")
    runner = rebuild_runner(manifest, settings or {}, output_dir)
    header = runner.header()
    for name, then, now in differences(manifest, header):
        print(f"zeroseg: {name} was {then}, is {now}: masks may differ in a few voxels", file=sys.stderr)
    cases = find_cases(dataset_dir, exclude=output_dir)
    found = [find_input(entry, cases, runner.prompt_keys) for entry in entries]
    output_dir.mkdir(parents=True, exist_ok=True)
    again, failed, differing = [], 0, 0
    for entry, case in zip(entries, found, strict=True):
        new = runner.segment_case(case, entry.get("prompt", {}), output_dir)
        again.append(new)
        failed += new["status"] == "failed"
        same = new.get("mask_sha256") == entry.get("mask_sha256")
        differing += not same
        verdict = f"the mask {'is the same bit for bit' if same else 'DIFFERS'}" if compare else "done"
        print(f"{entry['case']}: {new.get('reason') or verdict}", flush=True)
    write_json(output_dir / "manifest.json", {**header, "unused_prompts": [], "cases": again})
    return failed, differing


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, checked as far as a run is built from it: it may come from anyone.

    Raises:
        ZeroSegError: it cannot be read, or is no manifest of this version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZeroSegError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ZeroSegError(f"{path.name} is not valid JSON: {error}") from error
    try:
        if manifest["inferer"] == "LearnedInferer":
            raise ZeroSegError(
                f"{path.name} is of a learned head: run zeroseg segment with --learned or --exemplar again"
            )
        known = manifest["inferer"] in CONFIGS
        for key in ("settings", "backbone"):
            known &= isinstance(manifest[key], dict)
        for entry in manifest["cases"]:
            stem = entry["case"]
            known &= isinstance(stem, str) and bool(stem) and Path(stem).name == stem and stem[0] != "."
            known &= entry["status"] in ("done", "failed") and isinstance(entry.get("prompt", {}), dict)
            known &= all(isinstance(i["file"], str) and isinstance(i["sha256"], str) for i in entry.get("inputs", []))
    except (KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ZeroSegError(f"{path.name} is no manifest that this version of ZeroSeg writes")
    return manifest


def rebuild_runner(manifest: Mapping[str, Any], settings: Mapping[str, Any], output: Path) -> CaseRunner:
    """The runner that a manifest describes, with its weights loaded.

    Values of the manifest become attributes; they never go through the config, where text can be a program.

    Args:
        manifest: as ``read_manifest`` returns it.
        settings: config settings that say where weights are, and the device.
        output: folder for results.

    Raises:
        ZeroSegError: the settings or the weights cannot be made those of the manifest.
    """
    given, described = dict(settings), manifest["backbone"]
    if described.get("dtype") in ("fp32", "bf16", "fp16"):
        given.setdefault("dtype", described["dtype"])
    given.setdefault("untrained", described.get("untrained") is True)
    runner = build_runner(find_config(CONFIGS[manifest["inferer"]]), given, output)
    changed = {key.replace("::", "#").split("#")[-1] for key in settings}
    own = set(runner.inferer.settings()) - {*FILES, *changed}
    mine = {name: value for name, value in manifest["settings"].items() if name in own and name not in runner.options}
    for name, value in manifest["settings"].items():
        if name in runner.options:
            setattr(runner, name, value)
    runner.inferer = runner.inferer.replace(**mine)
    threads = manifest.get("threads")
    if isinstance(threads, int) and 1 <= threads <= 1024:
        torch.set_num_threads(threads)  # sums are rounded in the order they are shared out
    runner.inferer.check()
    then, now = _identity(manifest), _identity(json.loads(json.dumps(runner.header())))
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            raise ZeroSegError(
                f"{name} is not that of the manifest: it has {then.get(name)!r}, here it is {now.get(name)!r}; "
                "--set backbone=FOLDER and the like say where the weights are"
            )
    return runner


def _identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for masks to be equal: settings, and the hashes of all weights."""
    identity = {f"setting {name}": value for name, value in header["settings"].items() if name not in FILES}
    for name in FILES:
        described = header["settings"].get(name)
        identity[f"sha256 of {name}"] = described.get("sha256") if isinstance(described, dict) else described
    identity |= {f"backbone {name}": header["backbone"].get(name) for name in ("sha256", "untrained", "dtype")}
    return identity


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What may change the last bits: versions, device and threads that are not as they were: (name, then, now)."""
    pairs = [(name, (then.get("versions") or {}).get(name), value) for name, value in now["versions"].items()]
    pairs.append(("device", then["backbone"].get("device"), now["backbone"]["device"]))
    pairs.append(("threads", then.get("threads"), now["threads"]))
    return [pair for pair in pairs if pair[1] != pair[2]]


def find_input(entry: Mapping[str, Any], cases: Sequence[Case], prompt_keys: Sequence[str]) -> Case:
    """The case made of the very files an entry of a manifest names, under the name it had.

    Raises:
        ZeroSegError: no case has files of these names, or theirs have changed.
    """
    unknown = sorted(set(entry.get("prompt", {})) - set(prompt_keys))
    if unknown:
        raise ZeroSegError(f"{entry['case']}: unknown prompt key {unknown[0]!r}; it takes {', '.join(prompt_keys)}")
    drawn = sorted(set(DRAWN) & set(entry.get("prompt", {})))
    if drawn:
        raise ZeroSegError(
            f"{entry['case']}: it was prompted by a drawn {drawn[0]}, which no manifest holds; segment it anew"
        )
    wanted = [(item["file"], item["sha256"]) for item in entry.get("inputs", [])]
    named = [case for case in cases if [path.name for path in case.paths] == [name for name, _ in wanted]]
    for case in named:
        if all(file_sha256(path) == digest for path, (_, digest) in zip(case.paths, wanted, strict=True)):
            return replace(case, stem=entry["case"])
    names = ", ".join(name for name, _ in wanted[:3]) + (" ..." if len(wanted) > 3 else "")
    if named:
        raise ZeroSegError(f"{entry['case']}: {names} is not what it was: the SHA-256 differs from the manifest's")
    raise ZeroSegError(f"{entry['case']}: no image in dataset_dir is made of {names or 'its files'}")
