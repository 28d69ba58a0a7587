"""Attacks on the real server over HTTP; tests/monailabel_app/test_server.py has the mistakes of honest clients."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("monailabel")

from bad_inputs import gray, write_nifti
from serving import Server, serving

pytestmark = pytest.mark.slow

CLICK = json.dumps({"foreground": [[5, 5, 0]]})


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_pipeline):
    folder = tmp_path_factory.mktemp("attacked")
    studies = folder / "studies"
    (studies / "outside_series").parent.mkdir()
    Image.fromarray(gray()).save(studies / "photo.png")
    write_nifti(studies / "scan.nii.gz", np.arange(10 * 11 * 4, dtype=np.int16).reshape(10, 11, 4))
    (folder / "private").mkdir()
    Image.fromarray(gray()).save(folder / "private" / "secret.png")
    os.symlink(folder / "private" / "secret.png", studies / "link.png")
    os.symlink(folder / "private", studies / "linked_folder")
    os.symlink(studies / "circle.png", studies / "circle.png")
    (folder / "temporary").mkdir()
    environment = {"TMPDIR": str(folder / "temporary"), "ZEROSEG_MAX_UPLOAD_MB": "8"}
    options = ("--backbone", str(tiny_pipeline), "--resolution", "64")
    with serving(studies, folder, *options, environment=environment) as running:
        yield running


def folder_of(server: Server) -> Path:
    return server.log.parent


def snapshot(server: Server) -> dict[str, bytes]:
    """All files a request could have changed, but for the log and the datastore's own table and lock."""
    root = folder_of(server)
    while True:
        try:
            return {
                str(path.relative_to(root)): path.read_bytes() if path.is_file() else b""
                for path in sorted(root.rglob("*"))
                if path.name not in ("server.log", "datastore_v2.json", ".lock") and not path.is_symlink()
            }
        except FileNotFoundError:  # the server cleared something up while this looked
            continue


def archive(kind: str) -> bytes:
    """Archives that unpack to 100 MB, or to places outside."""
    out = io.BytesIO()
    if kind == "zip bomb":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.nii", bytes(100 << 20))
    elif kind == "zip of many":
        with zipfile.ZipFile(out, "w") as file:
            for k in range(100_001):
                file.writestr(f"{k}", b"")
    else:
        member = tarfile.TarInfo({"tar upwards": "../../evil.png", "tar of a link": "link"}.get(kind, "a.nii"))
        data = bytes(100 << 20) if kind == "tar bomb" else b"evil"
        member.size = len(data)
        if kind == "tar of a link":
            member.type, member.linkname, member.size, data = tarfile.SYMTYPE, "/etc/passwd", 0, b""
        if kind == "tar of a device":
            member.type, member.size, data = tarfile.CHRTYPE, 0, b""
        with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as file:
            file.addfile(member, io.BytesIO(data))
    return out.getvalue()


def upload(name: str, data: bytes = b"x") -> dict:
    return {"files": {"file": (name, data)}}


def session(kind: str) -> tuple:
    return "PUT", "/session/?uncompress=true", {"files": {"files": (f"a.{'zip' if 'zip' in kind else 'tar.gz'}", kind)}}


def infer(params: str, image: str = "photo", model: str = "points") -> tuple:
    return "POST", f"/infer/{model}?image={image}", {"data": {"params": params}}


ATTACKS: dict[str, tuple] = {
    # links
    "a link out of the studies": ("GET", "/datastore/image?image=link", {}),
    "inference on a link out of the studies": infer(CLICK, "link"),
    "a linked folder": ("GET", "/datastore/image?image=linked_folder", {}),
    "a link in a circle": ("GET", "/datastore/image?image=circle", {}),
    "an upload through a link": ("PUT", "/datastore/image?image=link", upload("a.png")),
    "a label through a link": ("PUT", "/datastore/label?image=link", {"files": {"label": ("a.png", b"x")}}),
    # names
    "the datastore's own table": ("PUT", "/datastore/image?image=datastore_v2", upload("a.json", b'{"objects": {}}')),
    "a page with a script": ("PUT", "/datastore/image?image=page", upload("a.html", b"<script>alert(1)</script>")),
    "a page as a label": ("PUT", "/datastore/label?image=photo", {"files": {"label": ("a.html", b"<script>")}}),
    "an upload without extension": ("PUT", "/datastore/image?image=x", upload("a")),
    "an upload of a long name": ("PUT", f"/datastore/image?image={'x' * 253}", upload("a.png")),
    "an upload of a long extension": ("PUT", "/datastore/image?image=x", upload("a." + "x" * 300)),
    "an image by another's temporary file": infer('{"foreground": [[5, 5, 0]], "image": "/tmp/tmpabcdefgh"}'),
    "a name of control characters": ("GET", "/datastore/image?image=a%00b", {}),
    "a name encoded twice": ("GET", "/datastore/image?image=%252e%252e%252fprivate%252fsecret", {}),
    "a name with a backslash": ("GET", "/datastore/image?image=..%5cprivate%5csecret", {}),
    "a session upwards": ("PUT", "/session/", {"files": {"files": ("..", b"x")}}),
    # archives and sizes
    "a zip bomb": session("zip bomb"),
    "a zip of many files": session("zip of many"),
    "a tar bomb": session("tar bomb"),
    "a tar upwards": session("tar upwards"),
    "a tar of a link": session("tar of a link"),
    "a tar of a device": session("tar of a device"),
    "more than may be sent": ("PUT", "/datastore/image?image=x", upload("a.png", bytes(9 << 20))),
    # numbers and nesting
    "parameters nested without end": infer("[" * 100_000),
    "an option nested without end": infer('{"select": ' * 50_000 + "1" + "}" * 50_000),
    "a click at infinity": infer('{"foreground": [[Infinity, 1, 0]]}'),
    "a click at no number": infer('{"foreground": [[NaN, NaN, NaN]]}'),
    "a click at 10^400": infer('{"foreground": [[1' + "0" * 400 + ", 1, 0]]}"),
    "a click of two numbers in a volume": infer('{"foreground": [[1, 1]]}', "scan"),
    "a box at infinity in a slice": infer('{"box": [0, 0, Infinity, 1, 1, 1], "extent": "slice"}', "scan"),
    "a box of words in a slice": infer('{"box": ["a", 0, 0, 1, 1, 1], "extent": "slice"}', "scan"),
    "a box of two in a slice": infer('{"box": [1, 2], "extent": "slice"}', "scan"),
    "a slice at 10^400": infer('{"extent": "slice", "slice": 1' + "0" * 400 + "}", "scan", "segments"),
    "segments without number": infer('{"max_segments": NaN}', model="segments"),
    "lines of a log beyond all bounds": ("GET", f"/logs/?lines={10**30}", {}),
    # other sites
    "a page of another site": ("GET", "/datastore/", {"headers": {"Origin": "https://evil.example"}}),
    "a form of another site": ("POST", "/infer/points?image=photo", {"headers": {"Origin": "null"}}),
    "another site asking for leave": (
        "OPTIONS",
        "/datastore/image?id=photo",
        {"headers": {"Origin": "https://evil.example", "Access-Control-Request-Method": "DELETE"}},
    ),
    "another name for this machine": ("GET", "/datastore/", {"headers": {"Host": "evil.example"}}),
    # what nobody has to ask for
    "loading the app anew": ("POST", "/reload", {}),
    "weights from outside": ("PUT", "/model/points", upload("a.pt")),
    "whole slides": ("POST", "/infer/wsi_v2/points?image=../x", {}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_with_a_reason_and_leaves_nothing(server, name):
    method, path, rest = ATTACKS[name]
    if isinstance((rest.get("files") or {}).get("files", (0, 0))[1], str):
        filename, kind = rest["files"]["files"]
        rest = {"files": {"files": (filename, archive(kind))}}
    before = snapshot(server)
    answer = requests.request(method, server.url + path, timeout=60, **rest)
    assert answer.status_code in (400, 403, 404, 405, 413, 422), (answer.status_code, answer.text[:500])
    detail = str(answer.json()["detail"])
    assert len(detail) > 5 and "Traceback" not in detail and str(folder_of(server)) not in detail
    end = time.monotonic() + 30  # the answer is sent before its request is cleared up
    while snapshot(server) != before and time.monotonic() < end:
        time.sleep(0.05)
    assert snapshot(server) == before


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
OPTIONS = ["foreground", "background", "box", "extent", "slice", "text", "certainty", "threshold", "max_segments"]
OPTIONS += ["refine", "select", "absent", "result_extension", "result_dtype", "result_compress", "label_tag", "device"]
OPTIONS += ["image", "model", "label", "session", "description"]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    model=st.sampled_from(["points", "segments", "text"]),
    image=st.sampled_from(["photo", "scan"]),
    params=st.dictionaries(st.sampled_from(OPTIONS), JUNK, max_size=4),
)
def test_junk_in_a_request_is_answered(server, model, image, params):
    """An answer or a reason, never a fault of the program (500)."""
    data = {"params": json.dumps(params)}
    answer = requests.post(f"{server.url}/infer/{model}?image={image}&output=json", data=data, timeout=60)
    assert answer.status_code in (200, 404, 422), (params, answer.text[:500])
    if answer.status_code != 200:
        assert answer.json()["detail"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(["GET", "PUT", "DELETE", "POST"]),
    path=st.sampled_from(
        ["/datastore/image", "/datastore/label", "/datastore/image/info", "/session/", "/model/", "/infer/"]
    ),
    extra=st.text(max_size=6),
    query=st.dictionaries(
        st.sampled_from(["image", "id", "label", "tag", "output", "uncompress", "expiry", "limit_cases"]),
        st.text(max_size=8) | st.sampled_from(["..", ".", "%2e%2e", "null", "-1", "9" * 40]),
        max_size=3,
    ),
)
def test_junk_in_an_address_is_answered(server, method, path, extra, query):
    address = server.url + path + requests.utils.quote(extra.encode("utf-8", "replace"))
    answer = requests.request(method, address, params=query, timeout=60)
    assert answer.status_code < 500, (method, path, extra, query, answer.text[:500])


def test_nothing_temporary_is_left(server):
    """A failed upload of a patient's image does not stay in the temporary folder, nor does an answer."""
    Image.fromarray(gray()).save(folder_of(server) / "own.png")
    for name, data in (("a.png", (folder_of(server) / "own.png").read_bytes()), ("a.nii.gz", b"broken")):
        for output in ("json", "image", "dicom_seg", "magic"):
            requests.post(f"{server.url}/infer/segments?output={output}", timeout=60, **upload(name, data))

    def left() -> set[str]:  # but MONAI Label's settings of its log, written when it starts
        files = (name for _, _, names in os.walk(folder_of(server) / "temporary") for name in names)
        return {name for name in files if not name.endswith(".json")}

    end = time.monotonic() + 30  # the answer is sent before its request is cleared up
    while left() and time.monotonic() < end:
        time.sleep(0.05)
    assert not left()


def test_it_listens_on_this_machine_only(server):
    listening = [c for c in psutil.Process(server.process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert listening and {c.laddr.ip for c in listening} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "junk", [b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000, b"\x16\x03\x01\x02"]
)
def test_what_is_no_http_is_answered_or_cut_off(server, junk):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(junk + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        assert line.recv(100)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 403")
    assert server.alive()


def test_its_own_pages_and_clients_without_a_browser_are_let_in(server):
    for headers in (
        {},
        {"Origin": server.url},
        {"Host": server.url.removeprefix("http://").replace("127.0.0.1", "localhost")},
    ):
        assert requests.get(f"{server.url}/datastore/", headers=headers, timeout=30).status_code == 200


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="limits of another process: Linux only")
def test_an_inference_that_runs_out_of_memory_is_503_and_the_next_one_works(server):
    """The process's address space is limited while it runs, so that torch or numpy really fail to allocate."""
    large = io.BytesIO()
    Image.new("RGB", (8000, 8000), (90, 20, 60)).save(large, "PNG")
    click = {"data": {"params": CLICK}}
    assert requests.post(f"{server.url}/infer/points?image=photo&output=json", timeout=60, **click).status_code == 200
    process = psutil.Process(server.process.pid)
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (500 << 20), before[1]))
    try:
        answer = requests.post(
            f"{server.url}/infer/points?output=json", timeout=120, **click, **upload("a.png", large.getvalue())
        )
    finally:
        process.rlimit(psutil.RLIMIT_AS, before)
    assert answer.status_code == 503 and "memory" in answer.json()["detail"], answer.text
    assert requests.post(f"{server.url}/infer/points?image=photo&output=json", timeout=60, **click).status_code == 200


def test_the_server_is_alive_after_all_that(server):
    assert server.alive()
    assert (folder_of(server) / "private" / "secret.png").is_file() and len(
        list((folder_of(server) / "private").iterdir())
    ) == 1
    log = server.log.read_text()
    assert "InternalError" not in log, log[-3000:]
