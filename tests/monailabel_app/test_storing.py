"""The table of images, and the files beside it, under full disks, several users and odd folders; no server."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monailabel")

from lib.datastore import FolderDatastore
from lib.mends import storing
from lib.strategies.plain import First
from phantom_studies import phantom, write_series
from zeroseg.errors import ZeroSegError

NAMES = {"label_info": [{"name": "liver", "idx": 1}]}


def volume(path: Path, value: int = 1) -> Path:
    nib.save(nib.Nifti1Image(np.full((4, 4, 4), value, np.uint8), np.eye(4)), path)
    return path


def until(true, seconds: float = 20) -> bool:
    """Whether something becomes true while one waits: the watcher of a folder is a thread of its own."""
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "studies").mkdir()
    volume(tmp_path / "studies" / "v.nii.gz")
    return tmp_path / "studies"


def test_a_full_disk_cuts_neither_table_nor_label(folder, tmp_path, monkeypatch):
    store = FolderDatastore(str(folder), auto_reload=False)
    store.save_label("v", str(volume(tmp_path / "a.nii.gz")), "final", NAMES)
    label, table = folder / "labels" / "final" / "v.nii.gz", folder / "datastore_v2.json"
    before, full = (label.read_bytes(), table.read_bytes()), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def breaks_off(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:40])
        raise full

    with monkeypatch.context() as disk:
        disk.setattr(storing.shutil, "copyfile", breaks_off)
        for attempt in (
            lambda: store.save_label("v", str(volume(tmp_path / "b.nii.gz", 2)), "final", NAMES),
            lambda: store.add_image("w", str(tmp_path / "b.nii.gz"), {}),
        ):
            with pytest.raises(ZeroSegError, match="No space"):
                attempt()
    with monkeypatch.context() as disk:
        disk.setattr(
            Path, "write_text", lambda path, text: path.write_bytes(text[:40].encode()) and breaks_off(path, path)
        )
        with pytest.raises(ZeroSegError, match="No space"):
            store.update_image_info("v", {"strategy": {"first": {"ts": 1}}})
    assert (label.read_bytes(), table.read_bytes()) == before
    assert not list(folder.rglob(".zeroseg-*")) and not (folder / "w.nii.gz").exists()
    assert FolderDatastore(str(folder), auto_reload=False).get_label_info("v", "final")["label_info"]


def test_files_that_are_renamed_into_place_are_seen_and_hidden_ones_are_not(folder):
    store = FolderDatastore(str(folder))
    volume(folder / ".part.nii.gz")
    store.refresh()
    assert store.list_images() == ["v"]
    (folder / ".part.nii.gz").rename(folder / "w.nii.gz")
    assert until(lambda: "w" in json.loads((folder / "datastore_v2.json").read_text())["objects"])
    # As a batch does, in a process of its own.
    other = FolderDatastore(str(folder), auto_reload=False)
    other.update_image_info("w", {"of": "another process"})
    assert until(lambda: store.get_image_info("w").get("of") == "another process")


def test_what_another_process_wrote_into_the_table_is_kept(folder):
    server, batch = (FolderDatastore(str(folder), auto_reload=False) for _ in range(2))
    server.update_image_info("v", {"of": "the server"})
    batch.update_image_info("v", {"too": "the batch"})
    known = FolderDatastore(str(folder), auto_reload=False).get_image_info("v")
    assert (known["of"], known["too"]) == ("the server", "the batch")


def test_an_image_that_comes_while_the_folder_is_looked_through_is_kept(folder, tmp_path, monkeypatch):
    store = FolderDatastore(str(folder), auto_reload=False)
    file = str(volume(tmp_path / "w.nii.gz"))
    user = threading.Thread(target=lambda: store.add_image("w", file, {"of": "a user"}))

    def filename(self, name, extension):
        if not user.ident:
            user.start()
            # Long enough to add it, were it not for its turn.
            user.join(0.5)
        return name + extension

    monkeypatch.setattr(FolderDatastore, "_filename", filename)
    store.refresh()
    user.join()
    assert sorted(store.list_images()) == ["v", "w"] and store.get_image_info("w")["of"] == "a user"
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}


def test_the_folder_is_watched_on_after_a_look_that_failed(folder, monkeypatch):
    store = FolderDatastore(str(folder))
    failed = []
    with monkeypatch.context() as disk:
        disk.setattr(FolderDatastore, "_list_files", lambda *_: failed.append(1) or os.listdir(folder / "gone"))
        volume(folder / "w.nii.gz")
        assert until(lambda: failed)
    volume(folder / "x.nii.gz")
    assert until(lambda: sorted(store.list_images()) == ["v", "w", "x"])


def test_names_that_are_not_utf8_and_folders_that_may_not_be_read_are_left_out(folder, monkeypatch, caplog):
    try:
        os.rename(volume(folder / "x.nii.gz"), os.fsencode(folder) + b"/\xdcber.nii.gz")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (folder / "lost+found").mkdir()
    real = os.listdir

    def listdir(path="."):
        if Path(path).name == "lost+found":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    # In place of permissions, which do not hold for root.
    monkeypatch.setattr(os, "listdir", listdir)
    assert [FolderDatastore(str(folder), auto_reload=False).list_images() for _ in range(2)] == [["v"]] * 2
    assert "not UTF-8" in caplog.text


def test_what_is_said_of_a_dicom_folder_is_a_file_that_viewers_can_load(folder, monkeypatch):
    """As ``POST /activelearning/first`` answers: 3D Slicer loads ``path``, or downloads a file called ``name``."""
    from monailabel.endpoints import activelearning
    from monailabel.interfaces.app import MONAILabelApp

    write_series(folder / "CT1", phantom())
    (folder / "v.nii.gz").unlink()
    store = FolderDatastore(str(folder), auto_reload=False)
    assert not Path(store.get_image_info("CT1")["path"]).exists(), "asked of every image, it converts none"
    app = MONAILabelApp.__new__(MONAILabelApp)
    app._strategies, app._datastore, app._auto_update_scoring = {"first": First()}, store, False
    monkeypatch.setattr(app, "info", dict)
    monkeypatch.setattr(activelearning, "app_instance", lambda: app)
    answer = activelearning.sample("first")
    assert (answer["id"], answer["name"]) == ("CT1", "CT1.nii.gz")
    assert answer["path"] == store.get_image_uri("CT1") and nib.load(answer["path"]).shape == phantom().shape


def test_dicom_folders_come_and_go_while_the_server_runs(folder, tmp_path):
    store = FolderDatastore(str(folder))
    write_series(tmp_path / "CT1", phantom())
    first, *others = sorted((tmp_path / "CT1").iterdir())
    (folder / "CT1").mkdir()
    # The kernel's clock ticks in steps of some ms.
    os.utime(folder / "CT1", (0, 0))
    assert store.list_images() == ["v"]
    for path in (first, *others):
        path.rename(folder / "CT1" / path.name)
    assert sorted(store.get_unlabeled_images()) == sorted(store.list_images()) == ["CT1", "v"]
    twin = Path(store.get_image_uri("CT1"))
    assert sorted(path.name for path in twin.parent.iterdir()) == ["CT1.nii.gz", "CT1.stamp"]
    store.remove_image("CT1")
    assert store.list_images() == ["v"] and store.get_image_uri("CT1") == ""
    assert not (folder / "CT1").exists() and not list(twin.parent.iterdir())
