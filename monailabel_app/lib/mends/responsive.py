"""MONAI Label infers inside its event loop, so that nothing else is answered; until test_mends.py::test_responsive.

For as long as one of its endpoints works, `/info`, OHIF's files and OHIF's DICOM proxy wait. ``OffLoop`` wraps the whole ASGI application and runs each request in a worker thread, in an event
loop of its own: inference in one small pool, whose length is the job queue, everything else in another. MONAI Label's code is
not touched.
"""

from __future__ import annotations

import asyncio
import contextvars
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from pydantic import TypeAdapter, ValidationError
from starlette.responses import JSONResponse

from lib.mends.files import of_one_request
from lib.mends.limits import upload_limit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

IN_MEMORY = 1 << 24
"""Bytes of a request's body kept in memory; larger ones (uploads) wait on disk."""
CHUNK = 1 << 20


@dataclass(eq=False)
class Job:
    """A request that runs, or waits for its turn.

    Attributes:
        path: what was asked for.
        gone: set once the client has disconnected.
        started: ``time.monotonic()`` when it began to run; None: it waits.
        done, total: its steps; 0 of 0 where it says nothing of them.
    """

    path: str
    gone: threading.Event = field(default_factory=threading.Event)
    started: float | None = None
    done: int = 0
    total: int = 0


_job: contextvars.ContextVar[Job | None] = contextvars.ContextVar("job", default=None)


class Abandoned(Exception):
    """The client of the running job has gone."""


def stop_if_abandoned(done: int = 0, total: int = 0) -> None:
    """Called between the steps of a long job.

    Args:
        done, total: how many of how many steps are done, for those who ask; 0 of 0: unknown, what was said before holds.

    Raises:
        Abandoned: the client that waits for it has disconnected.
    """
    job = _job.get()
    if job is None:
        return
    if total:
        job.done, job.total = done, total
    if job.gone.is_set():
        raise Abandoned


class OffLoop:
    """ASGI application that runs another one's requests in threads.

    A client that disconnects while its job is queued frees its place at once; a running job is told, see
    ``stop_if_abandoned``. The answer of a job is sent after the job has left its thread, so that a slow line delays nobody.

    Args:
        app: the application; it sees one request per event loop.
        jobs: inferences at a time; more wait in order of arrival.
        threads: other requests at a time.
    """

    def __init__(self, app: App, jobs: int = 1, threads: int = 16):
        self.app = app
        self.jobs = ThreadPoolExecutor(jobs, thread_name_prefix="job")
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="request")
        self._queue: list[Job] = []

    def queue(self) -> list[dict[str, Any]]:
        """The inferences that run and those that wait, in order of arrival: ``path``, ``seconds`` (None: it waits), ``done``, ``total``."""
        now = time.monotonic()
        return [
            {
                "path": job.path,
                "seconds": None if job.started is None else round(now - job.started, 1),
                "done": job.done,
                "total": job.total,
            }
            for job in list(self._queue)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _on_loop(scope):
            await self.app(scope, receive, send)
            return
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as body:
            try:
                if not await _read_body(receive, body):
                    return
            except TooLarge as error:
                await JSONResponse({"detail": str(error)}, 413)(scope, receive, send)
                return
            pool = self.jobs if _is_job(scope) else self.threads
            work = Job(scope["path"])
            answer: list[Message] = []
            loop = asyncio.get_running_loop()

            def deliver(message: Message) -> None:
                if pool is self.jobs:
                    answer.append(message)
                else:
                    asyncio.run_coroutine_threadsafe(send(message), loop).result()

            if pool is self.jobs:
                self._queue.append(work)
            job = pool.submit(_run, self.app, scope, body, deliver, work)
            watch = asyncio.ensure_future(_disconnected(receive))
            waiting = asyncio.wrap_future(job)
            try:
                await asyncio.wait({watch, waiting}, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    work.gone.set()
                    if job.cancel():
                        return
                else:
                    watch.cancel()
                await waiting
            except Abandoned:
                return
            finally:
                if pool is self.jobs:
                    self._queue.remove(work)
            for message in answer:
                await send(message)


def _on_loop(scope: Scope) -> bool:
    """Requests that MONAI Label answers without blocking: files of the viewer and of the documentation."""
    return scope["path"].startswith(("/ohif", "/static", "/docs", "/openapi.json", "/favicon.ico"))


def _is_job(scope: Scope) -> bool:
    """Requests that run a model in this process: the strategies that look at images among them."""
    path = scope["path"]
    return path.startswith(("/infer/", "/activelearning/")) or (
        path.startswith(("/batch/infer/", "/train/", "/scoring/")) and _is_synchronous(scope["query_string"])
    )


def _is_synchronous(query: bytes) -> bool:
    """Whether ``run_sync`` is true, read as FastAPI does: by pydantic, the last where it is given twice."""
    try:
        return TypeAdapter(bool).validate_python(dict(parse_qsl(query.decode("latin-1"))).get("run_sync", "false"))
    except ValidationError:
        return False


class TooLarge(Exception):
    """The request is longer than is allowed."""


async def _read_body(receive: Receive, body) -> bool:
    """Read the whole body; False when the client went away meanwhile.

    Raises:
        TooLarge: there is more of it than ``upload_limit``.
    """
    limit = upload_limit()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return False
        body.write(message.get("body", b""))
        if body.tell() > limit:
            raise TooLarge(f"the request is longer than the {limit >> 20} MB accepted: send less at a time")
        if not message.get("more_body"):
            body.seek(0)
            return True


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _run(app: App, scope: Scope, body, deliver: Callable[[Message], None], job: Job) -> None:
    """One request from start to end, in this thread."""

    ended = False

    async def receive() -> Message:
        nonlocal ended
        if not ended:
            chunk = body.read(CHUNK)
            ended = len(chunk) < CHUNK
            return {"type": "http.request", "body": chunk, "more_body": not ended}
        # Who asks on, a file being sent for one, wants to know when the client leaves.
        while not job.gone.is_set():
            await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        deliver(message)

    job.started = time.monotonic()
    _job.set(job)
    with of_one_request():
        asyncio.run(app(scope, receive, send))
