"""Segment a cohort: a folder, a CSV of paths, or the series of a DICOMweb server, on several processes or a cluster.

    zeroseg batch IMAGES --output-dir OUT --workers 4
    zeroseg batch cohort.csv --output-dir OUT --config inference_tumor.yaml --set organ=liver
    zeroseg batch http://127.0.0.1:8042/dicom-web --output-dir OUT --modality CT --filter StudyDate=20260101-

Every case gets the files that zeroseg segment writes, and manifest.json lists them all. --set gives any setting of the
config, as on the bundle's command line. The columns of a CSV: path, and as needed case, select, points, labels, box, text
(tumour config: organ, tumor, modality).

The same command again takes up where the last one ended: what is done is known by the SHA-256 of its input (DICOMweb: the
UIDs of its instances), its prompt, the settings and the weights, and is skipped. A case that fails is listed with its
reason and stays failed until something about it changes or --retry-failed is given. A worker that dies is replaced, and
its case begun again, once.

Ray runs the workers (one loaded model each) on this machine, reachable from this machine only and with a token of its
own; --address joins a cluster instead. There the images, the output folder and the environment with this package must lie
at the same paths on every node.

Exit code: 0; 2 when something the user can mend went wrong, failed cases included; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from zeroseg.cli.parser import Parser
from zeroseg.cli.shared import add_json, add_set, print_json, spoken_to_stderr
from zeroseg.errors import ZeroSegError


def add_arguments(parser: Parser) -> None:
    parser.add_argument("input", help="folder, image, .csv, or URL of DICOMweb services")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder for the results")
    parser.add_argument("--config", default="inference.yaml", help="of the bundle, or a path (default %(default)s)")
    add_set(parser, "a setting; may be repeated")
    parser.add_argument("--prompts", help="prompts.json, as the bundle takes it")
    parser.add_argument("--retry-failed", action="store_true", help="do failed cases again")
    server = parser.add_argument_group("DICOMweb (a login is taken from ~/.netrc)")
    server.add_argument("--study", help="study instance UID")
    server.add_argument("--modality", help="such as CT")
    server.add_argument(
        "--filter", action="append", default=[], metavar="KEYWORD=VALUE", help="any attribute, e.g. PatientID=17"
    )
    pool = parser.add_argument_group("workers")
    pool.add_argument("--workers", type=int, default=1, help="processes, each with a model (default %(default)s)")
    pool.add_argument(
        "--cpus-per-worker", type=float, help="cores (and threads) of each (default: this machine's, shared out)"
    )
    pool.add_argument(
        "--gpus-per-worker", type=float, default=0, help="GPUs of each, 0.5 for two on one; 0, the default, hides them"
    )
    pool.add_argument("--address", help="of a Ray cluster (default: this machine)")
    add_json(parser, "manifest.json")


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return _run(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; finished cases are complete, the same command goes on") from None


def _run(args: argparse.Namespace) -> int:
    filters = read_filters(args)
    from zeroseg.cohort import batch
    from zeroseg.configs import parse_settings

    cohort = batch.Cohort(
        args.input,
        args.output_dir,
        args.config,
        parse_settings(args.set),
        args.prompts,
        args.retry_failed,
        filters,
        args.workers,
        args.cpus_per_worker,
        args.gpus_per_worker,
        args.address,
    )
    with spoken_to_stderr(args.json):
        report = batch.run(cohort)
    if args.json:
        print_json(report.manifest)
    return 2 if report.failed else 0


def read_filters(args: argparse.Namespace) -> dict[str, str]:
    """DICOM attribute -> value of what was asked of a server.

    Raises:
        ZeroSegError: a --filter is no pair.
    """
    filters = {"StudyInstanceUID": args.study, "Modality": args.modality}
    for pair in args.filter:
        keyword, separator, value = pair.partition("=")
        if not separator:
            raise ZeroSegError(f"--filter takes KEYWORD=VALUE, such as PatientID=17, not {pair!r}")
        filters[keyword] = value
    return {key: value for key, value in filters.items() if value}
