"""The command line: what it understands, how it answers, and that it is quick to answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import zeroseg
from bad_inputs import color
from zeroseg.cli import main
from zeroseg.cli.main import COMMANDS, build_parser
from zeroseg.cli.parser import hyphens
from zeroseg.cli.serve import bound

HEAVY = {"torch", "monai", "numpy", "ray", "monailabel", "PIL", "scipy"}


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "images" / "photo.png"
    path.parent.mkdir()
    Image.fromarray(color(64, 64)).save(path)
    return path


@pytest.fixture
def tiny(tiny_pipeline) -> list[str]:
    return ["--backbone", str(tiny_pipeline), "--resolution", "64", "--device", "cpu"]


def refused(capsys, *argv: object) -> str:
    """Run, and return the one line of the refusal."""
    assert main([*map(str, argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zeroseg: ")]
    return line


@pytest.mark.parametrize("argv", [[], *([name] for name in COMMANDS), ["evaluate", "--inferer", "tumor"]])
def test_help_imports_nothing_heavy(argv):
    code = (
        "import sys; from zeroseg.cli import main\n"
        f"try: main({[*argv, '--help']})\n"
        f"finally: print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: zeroseg") and done.stderr == "[]\n"


@pytest.mark.parametrize(("given", "kept"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_that_wait_leave_their_core_unless_told_otherwise(given, kept):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    code = (
        "import os; from zeroseg.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split()[-1] == kept


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and all(f" {name}" in printed for name in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"zeroseg {zeroseg.__version__}\n"


def test_every_option_has_two_spellings():
    assert hyphens("--output_dir=a_b") == "--output-dir=a_b" and hyphens("a_b") == "a_b"
    for spelling in ("--output-dir", "--output_dir"):
        args = build_parser(["segment"]).parse_args(["segment", "x", spelling, "o", "--max_segments=3"])
        assert (args.output_dir, args.max_segments) == ("o", 3)


def test_completion_knows_the_commands(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("segment", "--output-dir", "--retry-failed"))


def test_one_click_through_the_bundles_config(picture, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["segment", str(picture), "--output_dir", str(out), "--points", "30,20", *tiny]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (case,) = manifest["cases"]
    assert case["prompt"] == {"points": [[30, 20]]} and case["select"] == "points"
    assert {p.name for p in out.iterdir()} == {*case["files"], "manifest.json"}
    assert "1 of 1 cases segmented" in capsys.readouterr().out


def test_json_is_all_that_is_on_stdout(picture, tiny, tmp_path, capsys):
    (picture.parent / "bad.png").write_bytes(b"no picture")
    given = ["segment", str(picture.parent), "--output-dir", str(tmp_path / "out"), "--select", "auto", "--json", *tiny]
    assert main(given) == 2
    printed = capsys.readouterr()
    assert [case["status"] for case in json.loads(printed.out)["cases"]] == ["failed", "done"]
    assert "1 of 2 cases segmented" in printed.err


def test_a_preset_and_words_while_reading(picture, tiny, tmp_path, capsys):
    given = ["segment", picture, "--output-dir", tmp_path / "out", "--preset", "diffseg", *tiny]
    assert main([*map(str, given), "--condition", "a cell"]) == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["refine"], settings["assign"], settings["condition"]) == ("none", "argmax", "a cell")
    assert "words cannot begin with $" in refused(capsys, *given, "--condition", "$1/0")


def test_a_tumour_by_words(tiny_tumor_model, picture, tmp_path):
    model = ["--backbone", str(tiny_tumor_model), "--adapters", str(tiny_tumor_model)]
    model += ["--text-encoder", str(tiny_tumor_model / "text"), "--stages", "aova", "--device", "cpu"]
    out = tmp_path / "out"
    assert main(["tumor", str(picture), "--output-dir", str(out), "--organ", "liver", "--modality", "ct", *model]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["settings"]["organ"], manifest["settings"]["stages"]) == ("liver", ["aova"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paint"], "invalid choice: 'paint'"),
        (["segment"], "the following arguments are required: IMAGES, --output-dir"),
        (["segment", "{picture}", "--output-dir", "{out}", "--outputs", "x"], "unrecognized arguments: --outputs"),
        (["segment", "nowhere", "--output-dir", "{out}"], "nowhere"),
        (["segment", "{picture}", "--output-dir", "{out}", "--select", "magic"], "invalid choice: 'magic'"),
        (["segment", "{picture}", "--output-dir", "{out}", "--points", "a,b"], "--points takes numbers with commas"),
        (["segment", "{picture}", "--output-dir", "{out}", "--box", "1,2,3"], "--box takes 4 numbers"),
        (
            ["segment", "{picture}", "--output-dir", "{out}", "--points", "1,2", "--text", "cell"],
            "go neither with --text",
        ),
        (["segment", "{picture}", "--output-dir", "{out}", "--set", "output_dir=x"], "has an option of its own"),
        (["segment", "{picture}", "--output-dir", "{out}", "--set", "speed=9"], "has no setting 'speed'"),
        (["segment", "{picture}", "--output-dir", "{out}", "--backbone", "nowhere"], "'nowhere' is neither"),
        (["tumor", "{picture}", "--output-dir", "{out}", "--organ", "$1/0"], "words cannot begin with $"),
        (["tumor", "{picture}", "--output-dir", "{out}", "--unet", "nowhere.pt"], "autoencoder"),
        (["serve", "--studies", "nowhere"], "neither a folder nor a URL"),
        (["serve", "--app", "nowhere"], "there is no app in"),
        (["serve", "--port", "99999"], "'99999' is no whole number from 0 to 65535"),
        (["serve", "--threads", "-3"], "'-3' is no whole number from 1 to 1024"),
        (["serve", "--cache-mb", "-1"], "'-1' is no whole number of at least 0"),
        # An address for documentation, of no machine.
        (
            ["serve", "--host", "203.0.113.5", "--studies", "{picture.parent}"],
            "cannot listen on port 8000 of 203.0.113.5 (",
        ),
        (["evaluate", "--images", "x", "--out", "{out}"], "give either --images with --masks, or --suite"),
        (["evaluate", "--suite", "nowhere", "--out", "{out}", "--protocol", "guess"], "unknown protocol 'guess'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(picture, tmp_path, capsys, argv, message):
    out = tmp_path / "out"
    assert message in refused(capsys, *(word.format(picture=picture, out=out) for word in argv))
    assert not out.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_is_started_where_its_port_is_free(picture, capfd, monkeypatch, host):
    pytest.importorskip("monailabel")
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append(command))
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_SEARCH_FILTER", "{}")
    given = ["serve", "--studies", picture.parent, "--host", host]
    try:
        taken = bound(host, 0)
    except OSError:
        pytest.skip(f"this machine has no address {host}")
    with taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of {host} is taken" in refused(capfd, *given, "--port", port)
        monkeypatch.setenv("ZEROSEG_MAX_UPLOAD_MB", "4G")
        assert "ZEROSEG_MAX_UPLOAD_MB must be a positive whole number" in refused(capfd, *given, "--port", 0)
        assert not started
        monkeypatch.delenv("ZEROSEG_MAX_UPLOAD_MB")
        main([*map(str, given), "--port", "0"])
    (command,) = started
    chosen = command[command.index("--port") + 1]
    assert (
        int(chosen) not in (0, port)
        and f"http://{host if host[0] != ':' else '[::1]'}:{chosen}" in capfd.readouterr().out
    )


def test_clicks_are_for_one_image(picture, tiny, tmp_path, capsys):
    Image.fromarray(color(64, 64)).save(picture.with_name("second.png"))
    given = ["segment", picture.parent, "--output-dir", tmp_path / "out", "--points", "1,2", *tiny]
    assert "for one image, here are 2" in refused(capsys, *given)


@pytest.mark.parametrize("name", ["batch", "rerun", "evaluate", "serve", "benchmark"])
@pytest.mark.slow
def test_the_old_scripts_still_answer(name):
    script = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")


def test_what_is_said_beside_a_preset_holds_though_it_is_the_default(picture, tiny, tmp_path):
    given = ["segment", picture, "--output-dir", tmp_path / "out", "--preset", "diffseg", "--refine", "guided", *tiny]
    assert main([*map(str, given)]) == 0
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert (settings["refine"], settings["assign"]) == ("guided", "argmax")


def test_values_that_begin_with_a_minus_are_values(picture, tiny, tmp_path):
    given = ["segment", picture, "--output-dir", tmp_path / "out", "--window", "-600,1500", *tiny]
    assert main([*map(str, given)]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]["window"] == [-600, 1500]


def test_clicks_on_one_image_leave_results_in_its_folder_out(picture, tiny, tmp_path):
    given = ["segment", picture.parent, "--output-dir", picture.parent / "out", "--points", "30,30", *tiny]
    for _ in range(2):
        assert main([*map(str, given)]) == 0


def test_few_shot_takes_no_half(picture, tmp_path, capsys):
    given = ["evaluate", "--images", picture.parent, "--masks", picture.parent, "--out", tmp_path / "o"]
    assert "leave --half and --control out" in refused(capsys, *given, "--protocol", "few-shot", "--half", "test")
