#!/usr/bin/env python
"""Load a running server with several clients at once, and report failures, latencies and memory.

    zeroseg serve &
    python scripts/benchmarks/soak.py http://127.0.0.1:8000 --seconds 300 --clients 8

With --train the server learns from the labels it has, meanwhile: python scripts/benchmarks/soak.py --clients 0 --train is what a
training alone makes of the time of /info.

Every client asks for clicks and automatic masks on images of the datastore; one more asks for /info all the time. A request has
failed when it is answered with anything but 200. Exit code 1 when one has.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from typing import Any

import numpy as np
import psutil
import requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="server (default %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="clients at once (default 8)")
    parser.add_argument("--seconds", type=float, default=300, help="duration (default 300)")
    parser.add_argument("--pid", type=int, help="process of the server; its memory is reported")
    parser.add_argument("--train", action="store_true", help="train learned from the submitted labels meanwhile")
    args = parser.parse_args()
    report = soak(args.url, args.clients, args.seconds, args.pid, args.train)
    print(json.dumps(report, indent=1))
    raise SystemExit(1 if report["failed"] else 0)


def soak(url: str, clients: int, seconds: float, pid: int | None = None, train: bool = False) -> dict[str, Any]:
    """Run the load.

    Args:
        url: of the server.
        clients: threads that send one request after the other.
        seconds: how long.
        pid: process of the server on this machine, or None.
        train: whether ``learned`` is trained as long; labels must have been submitted.

    Returns:
        ``requests`` answered, how many ``failed`` and the first ``failures``, seconds at the median and the 95th percentile
        of inference and of /info, ``memory_growth_mb`` from half of the time (the caches fill first) to the end.
    """
    url = url.rstrip("/")
    images = list(requests.get(f"{url}/datastore/?output=all", timeout=60).json()["objects"])
    if not images:
        raise SystemExit(f"soak: {url} serves no images of a folder")
    if train:
        asked = {"seconds": max(1, seconds), "steps": 10_000}
        requests.post(f"{url}/train/learned", json=asked, timeout=60).raise_for_status()
    end = time.monotonic() + seconds
    times: dict[str, list[float]] = {"infer": [], "info": []}
    failures: list[str] = []
    lock = threading.Lock()

    def client(number: int) -> None:
        dice = random.Random(number)
        with requests.Session() as session:
            while time.monotonic() < end:
                image = dice.choice(images)
                model, params = dice.choice(PROMPTS)
                data = {"params": json.dumps({**params, "extent": "slice"})}
                ask(session, "infer", "POST", f"/infer/{model}?output=image", params={"image": image}, data=data)

    def watcher() -> None:
        with requests.Session() as session:
            while time.monotonic() < end:
                ask(session, "info", "GET", "/info/")
                time.sleep(0.05)

    def ask(session: requests.Session, kind: str, method: str, path: str, **rest: Any) -> None:
        start = time.perf_counter()
        try:
            answer = session.request(method, url + path, timeout=120, **rest)
            failure = None if answer.status_code == 200 else f"{answer.status_code} {path} {answer.text[:200]}"
        except requests.RequestException as error:
            failure = f"{type(error).__name__} {path}"
        with lock:
            times[kind].append(time.perf_counter() - start)
            if failure:
                failures.append(failure)

    threads = [threading.Thread(target=client, args=(i,), daemon=True) for i in range(clients)]
    threads.append(threading.Thread(target=watcher, daemon=True))
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    before = memory(pid)
    for thread in threads:
        thread.join()
    trained = requests.get(f"{url}/info/", timeout=60).json()["train_stats"].get("learned", {}) if train else None
    return {
        "clients": clients,
        **({"training": trained} if train else {}),
        "seconds": seconds,
        "requests": sum(map(len, times.values())),
        "failed": len(failures),
        "failures": failures[:5],
        **{f"{kind}_p50_seconds": quantile(times[kind], 0.5) for kind in times},
        **{f"{kind}_p95_seconds": quantile(times[kind], 0.95) for kind in times},
        "memory_mb": memory(pid),
        "memory_growth_mb": round(memory(pid) - before, 1),
    }


# Clicks near the corner of the first slice lie inside every image.
PROMPTS = [
    ("points", {"foreground": [[3, 3, 0]], "background": []}),
    ("points", {"foreground": [[9, 7, 0]], "background": [[2, 2, 0]]}),
    ("segments", {"select": "auto", "slice": 0}),
    ("segments", {"select": "segments", "slice": 0, "max_segments": 6}),
]


def memory(pid: int | None) -> float:
    """Resident memory of a process in MB; 0 when it is not known."""
    return round(psutil.Process(pid).memory_info().rss / 1e6, 1) if pid else 0.0


def quantile(seconds: list[float], share: float) -> float:
    return round(float(np.quantile(seconds, share)), 4) if seconds else 0.0


if __name__ == "__main__":
    main()
