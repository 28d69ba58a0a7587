"""A series of a DICOMweb server is there whole or not at all; no server."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import pydicom
import pytest

pytest.importorskip("monailabel")

from dicom_studies import Series, oblique, write
from lib.datastore import StudyDatastore
from lib.mends.errors import NotFound
from lib.mends.storing import Storing
from lib.sources import read_source, source_of
from lib.submissions import read_all
from phantom_studies import SHAPE, phantom

HALF = SHAPE[2] // 2


class Store:
    """A DICOMweb client of one series that breaks off after half of it, until it is mended."""

    base_url = "http://store/dicom-web"

    def __init__(self, series: Series):
        self.series, self.broken, self.fetched = series, True, 0
        self.slices = [pydicom.dcmread(path) for path in sorted(series.folder.iterdir())]

    def search_for_series(self, search_filters):
        found = search_filters.get("SeriesInstanceUID") == self.series.uid
        keep = ("SeriesInstanceUID", "StudyInstanceUID", "Modality")
        return [
            {k: v for k, v in self.slices[0].to_json_dict().items() if pydicom.datadict.keyword_for_tag(k) in keep}
        ] * found

    def retrieve_series(self, study, series):
        self.fetched += 1
        for number, one in enumerate(self.slices):
            if self.broken and number == HALF:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield one

    def retrieve_series_metadata(self, study, series):
        self.fetched += 1
        return [{k: v for k, v in one.to_json_dict().items() if k != "7FE00010"} for one in self.slices]

    def retrieve_instance_frames(self, sop_instance_uid, **rest):
        number = self.series.instances.index(sop_instance_uid)
        if self.broken and number >= HALF:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return [next(one.PixelData for one in self.slices if one.SOPInstanceUID == sop_instance_uid)]


@pytest.fixture
def store(tmp_path) -> Store:
    affine = oblique((1.5, 1.5, 4.0), (20, -15), (60, 90, -30))
    return Store(write(tmp_path / "ct", "CT", phantom(), affine, numbers=range(SHAPE[2], 0, -1)))


def of(store: Store, folder: Path, by_frame: bool = False) -> StudyDatastore:
    return StudyDatastore(client=store, search_filter={}, cache_path=str(folder), fetch_by_frame=by_frame)


@pytest.mark.parametrize("by_frame", [False, True])
def test_what_broke_off_is_fetched_again(store, tmp_path, by_frame):
    datastore, uid = of(store, tmp_path / "cache", by_frame), store.series.uid
    folder = Path(datastore._datastore_path)
    # Of a process that was killed.
    (folder / ".zeroseg-0123456789abcdef" / uid).mkdir(parents=True)
    with pytest.raises(OSError, match="space"):
        datastore.get_image_uri(uid)
    assert not (folder / uid).exists() and not list(folder.glob("*.nii.gz")) and not list(folder.glob(".zeroseg-*"))
    datastore.refresh()
    assert datastore.json()["objects"] == {}
    store.broken = False
    path = datastore.get_image_uri(uid)
    assert len(list((folder / uid).iterdir())) == SHAPE[2] and store.fetched == 2
    if not by_frame:  # what MONAI Label makes of frames is another matter
        assert nib.load(path).shape == SHAPE
        assert source_of(Path(path)) == folder / uid and read_source(folder / uid).image.shape == SHAPE
    assert datastore.get_image_info(uid)["Modality"] == "CT" and store.fetched == 2


def test_those_who_ask_at_once_get_one_series(store, tmp_path):
    store.broken = False
    processes = [of(store, tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda one: one.get_image_uri(store.series.uid), processes))
    assert len(paths) == 1 and nib.load(paths.pop()).shape == SHAPE and store.fetched == 1


def test_a_label_that_broke_off_is_no_label(store, tmp_path):
    datastore, uid = of(store, tmp_path / "cache"), store.series.uid
    with pytest.raises(OSError, match="space"):
        datastore.get_label_uri(uid, "final", "image")
    assert not (Path(datastore._datastore_path) / "labels" / "final" / uid).exists()


def test_a_series_that_is_not_there_is_said(store, tmp_path):
    with pytest.raises(NotFound, match=r"no series '1\.2\.3'"):
        of(store, tmp_path / "cache").get_image_uri("1.2.3")


class Listed:
    """A DICOMweb client of one series and of DICOM SEGs that refer to it, some without metadata."""

    base_url = "http://listed/dicom-web"

    def __init__(self):
        self.segs, self.empty, self.asked = ["9.1"], [], []

    def search_for_series(self, search_filters):
        found = self.segs if search_filters.get("Modality") == "SEG" else ["2.1"]
        return [{"0020000D": {"vr": "UI", "Value": ["1"]}, "0020000E": {"vr": "UI", "Value": [uid]}} for uid in found]

    def retrieve_series_metadata(self, study, series):
        self.asked.append(series)
        refers = {"00081115": {"vr": "SQ", "Value": [{"0020000E": {"vr": "UI", "Value": ["2.1"]}}]}}
        return [] if series in self.empty else [refers]


def test_a_dicom_seg_counts_while_it_is_on_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.datastore.LIST_SECONDS", -1)
    client = Listed()
    datastore = of(client, tmp_path / "cache")
    assert datastore.get_labeled_images() == datastore.get_labeled_images() == ["2.1"] and client.asked == ["9.1"]
    client.segs = []
    assert datastore.get_labeled_images() == [] and datastore.get_unlabeled_images() == ["2.1"]
    client.segs, client.empty = ["9.2"], ["9.2"]
    assert datastore.status()["completed"] == 0
    client.empty = []
    assert datastore.status()["completed"] == 1


def test_a_submitted_label_is_served_and_left_out_once_its_series_is_gone(store, tmp_path, caplog):
    store.broken = False
    datastore, uid = of(store, tmp_path / "cache"), store.series.uid
    image = nib.load(datastore.get_image_uri(uid))
    nib.save(nib.Nifti1Image(image.get_fdata().astype("uint8") * 0 + 1, image.affine), tmp_path / "label.nii.gz")
    # Without the DICOM SEG, which this server takes none of.
    Storing.save_label(datastore, uid, str(tmp_path / "label.nii.gz"), "final", {})
    served = Path(datastore.get_label_uri(uid, "final"))
    assert served.read_bytes() == (tmp_path / "label.nii.gz").read_bytes() and store.fetched == 1
    engine = SimpleNamespace(open=lambda path: read_source(source_of(Path(path))))
    assert [one.image for one in read_all(datastore, engine)] == [uid]
    shutil.rmtree(Path(datastore._datastore_path) / uid)
    store.search_for_series = lambda search_filters: []
    assert read_all(datastore, engine) == [] and f"the label of {uid} is left out" in caplog.text
