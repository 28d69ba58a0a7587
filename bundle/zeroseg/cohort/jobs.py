"""What a cohort is made of: the images of a folder, the rows of a CSV, or the series of a DICOMweb server.

Each becomes a job that can travel to another process, says by which content it is known, and opens as cases to segment.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zeroseg.cases import load_prompts
from zeroseg.errors import ZeroSegError
from zeroseg.interaction.prompts import DRAWN
from zeroseg.io import Case, file_sha256, find_cases

JSON_COLUMNS = ("points", "labels", "box", "candidate")
NOT_IMAGES = {"SEG", "SR", "PR", "KO", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "DOC", "FID", "RWV", "PLAN"}
"""DICOM modalities without pixels to segment."""
STUDY_UID, SERIES_UID, SOP_UID, MODALITY = "0020000D", "0020000E", "00080018", "00080060"


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes:
        stem: names its output files and its record; unique within a cohort without regard to case.
        prompt: keyword arguments of the inferer's ``segment``.
    """

    stem: str
    prompt: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def identity(self) -> list:
        """What the input is known by: equal for equal content, and JSON.

        Raises:
            ZeroSegError, OSError: the input cannot be reached.
        """
        raise NotImplementedError

    @contextmanager
    def cases(self) -> Iterator[list[Case]]:
        """The cases to segment; they can be read as long as the block lasts.

        Raises:
            ZeroSegError: the input cannot be reached, or holds no image.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FileJob(Job):
    """Files at hand; known by their names and SHA-256.

    Attributes:
        path: what the user named.
        case: the case, where a listing of the folder found it; otherwise the path is looked at when its turn comes, so that
            one wrong row fails alone.
    """

    path: Path
    case: Case | None = None

    def identity(self) -> list:
        return [[path.name, file_sha256(path)] for path in self._case().paths]

    @contextmanager
    def cases(self) -> Iterator[list[Case]]:
        yield [self._case()]

    def _case(self) -> Case:
        if self.case is not None:
            return self.case
        if not self.path.exists():
            raise ZeroSegError(f"{self.path.name}: no such file or folder")
        try:
            found = find_cases(self.path)
        except ZeroSegError as error:  # the manifest that will hold this is nobody's list of folders
            raise ZeroSegError(str(error).replace(str(self.path), self.path.name)) from error
        if len(found) > 1:
            raise ZeroSegError(
                f"{self.path.name} holds {len(found)} images: name one file, or the folder of one series"
            )
        return replace(found[0], stem=self.stem)


@dataclass(frozen=True)
class SeriesJob(Job):
    """A series of a DICOMweb server; known by its SOP instance UIDs.

    ZeroSeg's choice, because an instance never changes under its UID (PS3.4) and hashing would mean to fetch everything
    again only to skip it. Pixels are fetched by the worker into a folder of its own, which goes with the job.

    A series of slices is one case, named by the series UID; of any other series each image is one, named by its SOP
    instance UID.

    Attributes:
        url: of the DICOMweb services.
        study: study instance UID.
    """

    url: str
    study: str

    def identity(self) -> list:
        with _server_errors(self.url):
            found = _client(self.url).search_for_instances(self.study, self.stem, get_remaining=True)
        return sorted(_value(instance, SOP_UID) for instance in found)

    @contextmanager
    def cases(self) -> Iterator[list[Case]]:
        with tempfile.TemporaryDirectory(prefix="zeroseg-series-") as folder:
            with _server_errors(self.url):
                for instance in _client(self.url).iter_series(self.study, self.stem):
                    instance.save_as(Path(folder, f"{_uid(str(instance.SOPInstanceUID))}.dcm"))
            try:
                found = find_cases(folder)
            except ZeroSegError:
                raise ZeroSegError("the server has no image in this series") from None
            yield [replace(case, stem=self.stem) if case.kind == "dicom_series" else case for case in found]


def list_jobs(
    source: str,
    prompts: str | None,
    keys: Sequence[str],
    exclude: Path | None = None,
    filters: Mapping[str, str] | None = None,
) -> tuple[list[Job], list[str]]:
    """The jobs of a cohort.

    Args:
        source: a folder, an image, a ``.csv``, or the URL of DICOMweb services.
        prompts: path of a ``prompts.json``, or None; a prompt in a row of the CSV goes before.
        keys: the prompt keys the inferer takes.
        exclude: folder to leave out of the listing, e.g. that of the results.
        filters: DICOM attributes a series must have, e.g. ``{"Modality": "CT"}``; for servers only.

    Returns:
        The jobs, and the names of prompts that match none of them.

    Raises:
        ZeroSegError: nothing can be listed there.
    """
    given = load_prompts(prompts, tuple(keys))
    jobs: Sequence[Job]
    remote = source.startswith(("http://", "https://"))
    if filters and not remote:
        raise ZeroSegError("filters of studies only go with the URL of a DICOMweb server")
    if remote:
        jobs = list_series(source, filters or {})
    elif source.lower().endswith(".csv"):
        jobs = list_rows(Path(source), keys)
    else:
        jobs = [FileJob(case.stem, case.paths[0], case) for case in find_cases(source, exclude=exclude)]
    jobs = [replace(job, prompt=job.prompt or given.get(job.stem, {})) for job in jobs]
    return jobs, sorted(set(given) - {job.stem for job in jobs})


def list_rows(path: Path, keys: Sequence[str]) -> Sequence[Job]:
    """One job per row of a CSV with the column ``path``.

    Paths count from the folder of the CSV. Further columns: ``case``, the name (default: the file's, with its folder's in
    front where two are alike), and prompt keys; ``points``, ``labels``, ``box`` and ``candidate`` as JSON, drawings as paths. Other
    columns are ignored.

    Raises:
        ZeroSegError: the file cannot be read, or a row has no path, a prompt that is no JSON, or a name taken already.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if "path" not in (reader.fieldnames or ()):
                raise ZeroSegError(f"{path.name}: the first line must name the columns, one of them 'path'")
            rows = [(reader.line_num, row) for row in reader if any(row.values())]
    except OSError as error:
        raise ZeroSegError(f"cannot read {path.name}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZeroSegError(f"{path.name} is not a CSV in UTF-8: {error}") from error
    if not rows:
        raise ZeroSegError(f"{path.name} has no rows")
    jobs: list[FileJob] = []
    named = set()
    for line, row in rows:
        where = f"{path.name}, line {line}"
        if not row["path"]:
            raise ZeroSegError(f"{where}: no path")
        target = path.parent / row["path"]
        name = row.get("case") or re.sub(r"(\.nii)?\.[A-Za-z]+$", "", target.name)
        if not name.isprintable() or Path(name).name != name or name.startswith("."):
            raise ZeroSegError(f"{where}: {name!r} cannot name a case; give letters and digits")
        if row.get("case"):
            named.add(name)
        jobs.append(FileJob(name, target, prompt=_row_prompt(row, keys, path.parent, where)))
    count = Counter(job.stem.casefold() for job in jobs)
    jobs = [
        replace(job, stem=f"{job.path.resolve().parent.name}_{job.stem}")
        if count[job.stem.casefold()] > 1 and job.stem not in named
        else job
        for job in jobs
    ]
    (twice, times), *_ = Counter(job.stem.casefold() for job in jobs).most_common(1)
    if times > 1:
        raise ZeroSegError(f"{path.name}: {times} rows are the case {twice!r}; name them in a column 'case'")
    return jobs


def _row_prompt(row: Mapping[str, str], keys: Sequence[str], folder: Path, where: str) -> dict[str, Any]:
    prompt: dict[str, Any] = {key: row[key] for key in keys if row.get(key)}
    prompt |= {key: str(folder.resolve() / prompt[key]) for key in set(DRAWN) & set(prompt)}
    for key in set(JSON_COLUMNS) & set(prompt):
        try:
            prompt[key] = json.loads(prompt[key])
        except ValueError:
            raise ZeroSegError(f"{where}: {key} must be JSON such as [[30, 20]], not {prompt[key]!r}") from None
    return prompt


def list_series(url: str, filters: Mapping[str, str]) -> Sequence[Job]:
    """One job per series of images a DICOMweb server (QIDO-RS) has for the given attributes.

    Args:
        url: of the services, e.g. ``http://127.0.0.1:8042/dicom-web``. A login is taken from ``~/.netrc``.
        filters: DICOM keyword -> value to match, wildcards and date ranges as the server knows them.

    Raises:
        ZeroSegError: the server cannot be reached, refuses, or has no such series.
    """
    study = {key: value for key, value in filters.items() if key != "StudyInstanceUID"}
    with _server_errors(url):
        found = _client(url).search_for_series(
            filters.get("StudyInstanceUID"), search_filters=study, fields=["Modality"], get_remaining=True
        )
    jobs = {
        (series := _value(item, SERIES_UID)): SeriesJob(series, url, _value(item, STUDY_UID))
        for item in found
        if item.get(MODALITY, {}).get("Value", [""])[0] not in NOT_IMAGES
    }
    if not jobs:
        raise ZeroSegError(f"{url} has no series of images that match; check the filters")
    return [jobs[uid] for uid in sorted(jobs)]


def _client(url: str):
    from dicomweb_client import DICOMwebClient

    client = DICOMwebClient(url)
    client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=500)  # its own: half a minute of silence
    return client


@contextmanager
def _server_errors(url: str) -> Iterator[None]:
    """Whatever goes wrong in talking to a server as one line."""
    import requests

    try:
        yield
    except requests.HTTPError as error:
        raise ZeroSegError(f"{url} refused: {error.response.status_code} {error.response.reason}") from error
    except requests.ConnectionError as error:
        raise ZeroSegError(f"{url} cannot be reached: check the address, and that the server runs") from error
    except (requests.RequestException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, ZeroSegError):
            raise
        raise ZeroSegError(f"{url} did not answer as a DICOMweb server does: {type(error).__name__}") from error


def _value(item: Mapping[str, Any], tag: str) -> str:
    return _uid(item[tag]["Value"][0])


def _uid(text: str) -> str:
    """A UID that may become a file name: servers are not trusted with paths."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", text) or len(text) > 64:
        raise ZeroSegError("the server gave something that is no UID")
    return text
