"""Requests run outside the event loop; queued jobs of clients that left are dropped."""

from __future__ import annotations

import asyncio
import threading

import pytest

pytest.importorskip("monailabel")


from lib.mends.responsive import OffLoop, _is_job, stop_if_abandoned

# Seconds until a test that hangs says so; no machine is that slow.
PATIENCE = 60


class Application:
    """ASGI application whose jobs block their thread, as MONAI Label's do, until they may finish."""

    def __init__(self):
        self.started: list[str] = []
        self.abandoned = threading.Event()
        self.finish = threading.Event()

    async def __call__(self, scope, receive, send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        name = scope["path"].rsplit("/", 1)[-1]
        self.started.append(name)
        try:
            while scope["path"].startswith("/infer/") and not self.finish.wait(0.01):
                stop_if_abandoned(3, 8)
        except Exception:
            self.abandoned.set()
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body[::-1]})


async def started(inner: Application, name: str) -> None:
    while name not in inner.started:
        await asyncio.sleep(0.01)


async def ask(app, path: str, body: bytes = b"", leave_after: float | None = None) -> bytes | None:
    """One request; the answer's body, or None when the client left before there was one."""
    answer = []
    chunks = [body[i : i + 1000] for i in range(0, len(body), 1000)] or [b""]
    sent = iter([{"type": "http.request", "body": c, "more_body": i < len(chunks) - 1} for i, c in enumerate(chunks)])

    async def receive():
        message = next(sent, None)
        if message is None:
            await asyncio.sleep(leave_after if leave_after is not None else 60)
            return {"type": "http.disconnect"}
        return message

    async def send(message):
        answer.append(message)

    scope = {"type": "http", "path": path, "query_string": b"", "method": "POST", "headers": []}
    await app(scope, receive, send)
    return b"".join(m.get("body", b"") for m in answer) if answer else None


def test_a_request_reaches_the_application_whole_and_so_does_the_answer():
    body = bytes(range(256)) * 20000  # more than a chunk
    inner = Application()
    inner.finish.set()
    assert asyncio.run(ask(OffLoop(inner), "/session/", body)) == body[::-1]
    assert asyncio.run(ask(OffLoop(inner), "/infer/x", body)) == body[::-1]


def test_files_are_sent_whole(tmp_path):
    """Starlette's FileResponse listens for the client's leaving while it sends."""
    from starlette.responses import FileResponse

    (tmp_path / "mask").write_bytes(bytes(range(256)) * 5000)
    for path in ("/datastore/image", "/infer/x"):
        answer = asyncio.run(asyncio.wait_for(ask(OffLoop(FileResponse(tmp_path / "mask")), path), 10))
        assert answer == (tmp_path / "mask").read_bytes()


def test_others_are_answered_while_a_job_runs():
    inner = Application()

    async def story():
        app = OffLoop(inner)
        job = asyncio.ensure_future(ask(app, "/infer/long"))
        await started(inner, "long")
        for _ in range(5):
            assert await asyncio.wait_for(ask(app, "/info/"), PATIENCE) == b""
        assert not job.done()
        inner.finish.set()
        assert await job == b""

    asyncio.run(story())


def test_jobs_wait_for_each_other_and_those_of_clients_that_left_never_run():
    inner = Application()

    async def story():
        app = OffLoop(inner, jobs=1)
        first = asyncio.ensure_future(ask(app, "/infer/first"))
        await started(inner, "first")
        gone = asyncio.ensure_future(ask(app, "/infer/gone", leave_after=0.1))
        await asyncio.sleep(0.05)
        last = asyncio.ensure_future(ask(app, "/infer/last"))
        assert await gone is None and not first.done()  # its place is free while the first still runs
        inner.finish.set()
        assert await first == b"" and await last == b""

    asyncio.run(story())
    assert inner.started == ["first", "last"]


@pytest.mark.parametrize(
    ("path", "query", "job"),
    [
        ("/train/learned", "", False),
        ("/train/learned", "run_sync=true", True),
        ("/train/learned", "a=b&run_sync=1", True),
        ("/scoring/learned", "run_sync=yes", True),
        ("/batch/infer/segments", "run_sync=On", True),
        ("/batch/infer/segments", "run_sync=off", False),
        ("/batch/infer/segments", "run_sync=perhaps", False),
        ("/batch/infer/segments", "run_sync=yes&run_sync=no", False),
        ("/datastore/", "run_sync=true", False),
        ("/infer/points", "", True),
    ],
)
def test_what_runs_a_model_in_this_process_is_a_job(path, query, job):
    assert _is_job({"path": path, "query_string": query.encode()}) is job


def test_what_runs_and_what_waits_can_be_asked():
    inner = Application()

    async def story():
        app = OffLoop(inner, jobs=1)
        first = asyncio.ensure_future(ask(app, "/infer/first"))
        await started(inner, "first")
        second = asyncio.ensure_future(ask(app, "/infer/second"))
        while len(app.queue()) < 2 or not app.queue()[0]["total"]:
            await asyncio.sleep(0.01)
        running, waiting = app.queue()
        assert running.pop("seconds") >= 0
        assert running == {"path": "/infer/first", "done": 3, "total": 8}
        assert waiting == {"path": "/infer/second", "seconds": None, "done": 0, "total": 0}
        inner.finish.set()
        await asyncio.gather(first, second)
        assert app.queue() == []

    asyncio.run(story())


def test_a_running_job_is_told_that_its_client_left():
    inner = Application()
    assert asyncio.run(asyncio.wait_for(ask(OffLoop(inner), "/infer/x", leave_after=0.2), PATIENCE)) is None
    assert inner.abandoned.wait(PATIENCE)
