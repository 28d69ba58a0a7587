"""What a cohort is made of: rows of a CSV, files of a folder, series of a real DICOMweb server."""

from __future__ import annotations

import json
import pickle

import pytest
from PIL import Image

import dicom_series
from bad_inputs import color, ct_series, gray
from orthanc import missing, orthanc
from zeroseg.cases import PROMPT_KEYS
from zeroseg.cohort.jobs import list_jobs
from zeroseg.errors import ZeroSegError
from zeroseg.io import read_image
from zeroseg.tumor.cases import TUMOR_PROMPT_KEYS


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for patient in ("a", "b"):
        (folder / patient).mkdir(parents=True)
        Image.fromarray(color()).save(folder / patient / "scan.png")
    Image.fromarray(gray()).save(folder / "third.png")
    ct_series(folder / "series", count=3)
    return folder


def rows(folder, text: str, keys=PROMPT_KEYS, prompts=None):
    (folder / "cohort.csv").write_text(text)
    return list_jobs(str(folder / "cohort.csv"), prompts, keys)[0]


def opened(job):
    with job.cases() as cases:
        return [(case.stem, case.kind, read_image(case).shape) for case in cases]


def test_a_folder(images, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"third": {"box": [1, 2, 30, 20]}, "fourth": {"text": "cell"}}))
    jobs, unused = list_jobs(str(images), str(prompts), PROMPT_KEYS)
    assert [job.stem for job in jobs] == ["a_scan", "b_scan", "series", "third"] and unused == ["fourth"]
    assert jobs[3].prompt == {"box": [1, 2, 30, 20]} and jobs[0].prompt == {}
    assert opened(jobs[2]) == [("series", "dicom_series", (128, 128, 3))]
    assert len(jobs[2].identity()) == 3 and jobs[0].identity()[0][1] == jobs[1].identity()[0][1]
    assert pickle.loads(pickle.dumps(jobs)) == jobs, "jobs travel"


def test_rows_of_a_csv(images):
    jobs = rows(
        images,
        "path,case,points,note,text\n"
        'third.png,,"[[30, 20]]",left,\n'
        "a/scan.png,,,,nucleus\n"
        "b/scan.png,,,,\n"
        "b/scan.png,again,,,\n"
        "\n"
        "series,,,,\n",
    )
    assert [job.stem for job in jobs] == ["third", "a_scan", "b_scan", "again", "series"]
    assert [job.prompt for job in jobs[:3]] == [{"points": [[30, 20]]}, {"text": "nucleus"}, {}]
    assert opened(jobs[4]) == [("series", "dicom_series", (128, 128, 3))]
    assert opened(jobs[3]) == [("again", "picture", (40, 60))]
    tumor = rows(images, "path,organ,tumor,text\nthird.png,liver,,kept out\n", TUMOR_PROMPT_KEYS)
    assert tumor[0].prompt == {"organ": "liver"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns, one of them 'path'"),
        ("file\na.png\n", "one of them 'path'"),
        ("path\n", "has no rows"),
        ("path,text\n,cell\n", "line 2: no path"),
        ("path,points\na/scan.png,30 20\n", "line 2: points must be JSON such as [[30, 20]], not '30 20'"),
        ("path,case\na/scan.png,../../etc\n", "line 2: '../../etc' cannot name a case"),
        ("path,case\na/scan.png,One\nb/scan.png,one\n", "2 rows are the case 'one'; name them in a column 'case'"),
        ("path\n\x00\n", "cannot name a case"),
    ],
)
def test_a_csv_that_cannot_be_used_is_one_line(images, text, message):
    with pytest.raises(ZeroSegError) as error:
        rows(images, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_row_that_cannot_be_opened_fails_alone(images):
    (images / "note.txt").write_text("no image")
    gone, unknown, several = rows(images, "path\ngone.png\nnote.txt\nmany\n")
    with pytest.raises(ZeroSegError, match=r"^gone.png: no such file"):
        gone.identity()
    with pytest.raises(ZeroSegError, match=r"^note.txt: not a known image format"):
        unknown.identity()
    (images / "many").mkdir()
    for name in "xy":
        Image.fromarray(gray()).save(images / "many" / f"{name}.png")
    with pytest.raises(ZeroSegError, match=r"^many holds 2 images: name one file, or the folder of one series"):
        several.identity()


@pytest.mark.parametrize(
    ("source", "filters", "message"),
    [
        ("nowhere", None, "no such file or folder"),
        ("none.csv", None, "cannot read none.csv: No such file"),
        ("http://127.0.0.1:9/dicom-web", None, "cannot be reached"),
        ("nowhere", {"Modality": "CT"}, "only go with the URL of a DICOMweb server"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_listed_is_one_line(source, filters, message):
    with pytest.raises(ZeroSegError) as error:
        list_jobs(source, None, PROMPT_KEYS, filters=filters)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_series_of_a_dicomweb_server(tmp_path):
    with orthanc(tmp_path / "orthanc") as server:
        with pytest.raises(ZeroSegError, match="has no series of images that match"):
            list_jobs(server.dicom_web, None, PROMPT_KEYS)
        ct, mr, cr = (write(tmp_path / write.__name__) for write in (dicom_series.ct, dicom_series.mr, dicom_series.cr))
        for one in (ct, mr, cr):
            server.push(one.folder)
        jobs, _ = list_jobs(server.dicom_web, None, PROMPT_KEYS)
        assert [job.stem for job in jobs] == sorted(one.uid for one in (ct, mr, cr))
        (job,), _ = list_jobs(server.dicom_web, None, PROMPT_KEYS, filters={"Modality": "CT"})
        assert job.stem == ct.uid and job.identity() == sorted(ct.instances)
        assert opened(job) == [(ct.uid, "dicom_series", ct.volume.shape)]
        (job,), _ = list_jobs(server.dicom_web, None, PROMPT_KEYS, filters={"StudyInstanceUID": cr.study})
        assert opened(job) == [(cr.instances[0], "dicom", (128, 160))]
        with job.cases() as (case,):
            folder = case.paths[0].parent
            assert folder.is_dir()
        assert not folder.exists(), "nothing of a patient is left behind"
        with pytest.raises(ZeroSegError, match=r"refused: 4\d\d|did not answer as a DICOMweb server"):
            list_jobs(server.url + "/nothing", None, PROMPT_KEYS)
    with pytest.raises(ZeroSegError, match="cannot be reached"):
        job.identity()
