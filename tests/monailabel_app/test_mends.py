"""What MONAI Label itself does, without the app: once a test here fails, its mend in ``lib/mends`` can go.

Every mend has the test of its name. That the mends work is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import os
import tempfile
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastapi import BackgroundTasks, HTTPException

pytest.importorskip("monailabel")

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import UploadFile

MENDS = Path(__file__).resolve().parents[2] / "monailabel_app" / "lib" / "mends"


def test_every_mend_has_its_test_and_names_it():
    mends = [path for path in MENDS.glob("*.py") if path.stem != "__init__"]
    assert len(mends) == 13
    for path in mends:
        first = path.read_text().splitlines()[0]
        assert "MONAI Label" in first and f"until test_mends.py::test_{path.stem}." in first, path.name
        assert callable(globals()[f"test_{path.stem}"])


def test_archives(tmp_path):
    """It unpacks more than an upload may hold."""
    from monailabel.utils.sessions import Sessions

    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("zeros", bytes(4 << 20))
    session, _ = Sessions(str(tmp_path / "store")).add_session(str(archive), uncompress=True)
    (unpacked,) = (path for path in (tmp_path / "store" / session).rglob("zeros"))
    assert unpacked.stat().st_size == 4 << 20 > 100 * archive.stat().st_size


def test_authentication(monkeypatch):
    """It does not accept a valid token."""
    from monailabel.endpoints.user import auth

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    pem = f"-----BEGIN PUBLIC KEY-----\n{base64.b64encode(public).decode()}\n-----END PUBLIC KEY-----"
    monkeypatch.setattr(auth.settings, "MONAI_LABEL_AUTH_ENABLE", True)
    monkeypatch.setattr(auth, "get_public_key", lambda realm: pem)
    with pytest.raises(jwt.exceptions.DecodeError, match="algorithms"):
        auth.from_token(jwt.encode({"name": "Anna"}, key, algorithm="RS256"))


def test_background(monkeypatch):
    """It starts the training of a model that is not there."""
    from monailabel.utils.async_tasks import task

    class App:
        def info(self):
            return {}

        def bundle_path(self, model):
            return None

    started = []
    monkeypatch.setattr(task, "app_instance", App)
    monkeypatch.setattr(task, "run_background_task", lambda request, method: started.append(request))
    task.AsyncTask.run("train", {"model": "nothing"})
    assert started == [{"model": "nothing"}]


def test_batch(monkeypatch):
    """It divides by the number of GPUs, and runs one image after the other without a net."""
    from monailabel.interfaces.tasks import batch_infer

    monkeypatch.setattr(batch_infer.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ZeroDivisionError):
        batch_infer.BatchInferTask()({"images": ["a"]}, None, lambda request, store: {})

    def fails(request, store):
        raise ValueError("an image that cannot be segmented")

    with pytest.raises(ValueError, match="cannot be segmented"):
        batch_infer.BatchInferTask()({"images": ["a"], "multi_gpu": False}, None, fails)


def test_confidence():
    """It knows the image, its parameters, both, and a DICOM SEG."""
    from monailabel.endpoints.infer import ResultType

    assert {one.value for one in ResultType} == {"image", "json", "all", "dicom_seg"}


def test_dicom_seg(tmp_path):
    """It answers an empty mask by no file at all."""
    from monailabel.datastore.utils.convert import nifti_to_dicom_seg

    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    assert nifti_to_dicom_seg(str(tmp_path), str(tmp_path / "mask.nii.gz"), [{"name": "lesion"}], use_itk=True) == ""


def test_errors(tmp_path):
    """It calls a mistake of the client's an internal error, and writes where a name leads."""
    from monailabel.datastore.local import LocalDatastore
    from monailabel.endpoints import infer

    with pytest.raises(HTTPException) as error:
        infer.run_inference(BackgroundTasks(), "points", "", "", "{}", None, None, None)
    assert error.value.status_code == 500
    (tmp_path / "studies").mkdir()
    (tmp_path / "image.nii.gz").write_bytes(b"x")
    store = LocalDatastore(str(tmp_path / "studies"), extensions=["*.nii.gz"], auto_reload=False)
    store.add_image("../outside", str(tmp_path / "image.nii.gz"), {})
    assert (tmp_path / "outside.nii.gz").is_file()


def test_fetching(tmp_path):
    """What it fetched before it broke off lies where a whole series would."""
    from monailabel.datastore.utils.dicom import dicom_web_download_series
    from pydicom.dataset import Dataset

    class Client:
        def retrieve_series(self, study, series):
            yield one
            raise OSError("the disk is full")

    one = Dataset()
    one.SOPInstanceUID, one.is_little_endian, one.is_implicit_VR = "1.2.3", True, True
    with pytest.raises(OSError, match="full"):
        dicom_web_download_series("1", "1.2", str(tmp_path / "1.2"), Client())
    assert os.listdir(tmp_path / "1.2") == ["1.2.3.dcm"]


def test_files(monkeypatch, tmp_path):
    """It leaves what was uploaded with a request that fails."""
    from monailabel.endpoints import infer

    class App:
        def info(self):
            return {}

        def infer(self, request):
            raise ValueError(request["image"])

    monkeypatch.setattr(infer, "app_instance", App)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "upload").write_bytes(b"a patient's image")
    with open(tmp_path / "upload", "rb") as file, pytest.raises(ValueError, match="scan") as error:
        upload = UploadFile(file, filename="x.scan")
        infer.run_inference(BackgroundTasks(), "points", "", "", "{}", upload, None, None)
    assert os.path.isfile(str(error.value))


def test_limits():
    """Pages of all sites may use it, under any name, and its middleware counts no bytes."""
    from monailabel.app import app

    (middleware,) = app.user_middleware
    assert middleware.cls.__name__ == "CORSMiddleware" and "*" in middleware.kwargs["allow_origins"]


def test_ohif():
    """It answers a file in a folder by the viewer's page."""
    from monailabel.endpoints import ohif

    root = Path(ohif.__file__).parent / "static" / "ohif"
    file = next(path for path in sorted(root.rglob("*")) if path.is_file() and path.parent != root)
    assert Path(ohif.get_ohif(file.relative_to(root).as_posix()).path).name == "index.html"


def test_responsive(monkeypatch):
    """It infers inside its event loop."""
    from monailabel.endpoints import infer

    threads = {}

    def work(*args):
        threads["work"] = threading.current_thread()
        return {}

    monkeypatch.setattr(infer, "run_inference", work)

    async def request():
        threads["loop"] = threading.current_thread()
        answer = infer.api_run_inference(BackgroundTasks(), "model", "image", "", "{}", None, None, None, None)
        return await answer if asyncio.iscoroutine(answer) else answer

    asyncio.run(request())
    assert asyncio.iscoroutinefunction(infer.api_run_inference) and threads["work"] is threads["loop"]


def test_storing(tmp_path, monkeypatch):
    """A table that cannot be written leaves a cut one behind."""
    from monailabel.datastore import local

    store = local.LocalDatastore(str(tmp_path), auto_reload=False)

    class Full:
        def __enter__(self):
            self.file = open(tmp_path / "datastore_v2.json", "w")
            return self

        def write(self, text):
            self.file.write(text[:9])
            raise OSError("the disk is full")

        def __exit__(self, *error):
            self.file.close()

    store.set_name("whole")
    monkeypatch.setattr(local, "open", lambda path, mode="r": Full(), raising=False)
    with pytest.raises(OSError, match="full"):
        store.set_name("cut")
    assert (tmp_path / "datastore_v2.json").stat().st_size == 9
