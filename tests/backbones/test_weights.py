"""Where weights come from and that damaged ones are noticed."""

from __future__ import annotations

import hashlib

import pytest

from zeroseg.backbones import file_sha256, fingerprint, resolve_folder, verify_sums, weights
from zeroseg.errors import WeightsError, ZeroSegError, first_line


@pytest.fixture
def folder(tmp_path):
    """A folder with two weight files, a config, and a SHA256SUMS that lists all of them."""
    for name, data in {"unet/a.safetensors": b"one", "vae/b.safetensors": b"two", "unet/config.json": b"{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    listed = ["unet/a.safetensors", "unet/config.json", "vae/b.safetensors"]
    lines = [f"{hashlib.sha256((tmp_path / n).read_bytes()).hexdigest()}  {n}\n" for n in listed]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    return tmp_path


def test_hash_of_a_file_is_sha256(tmp_path):
    data = bytes(range(256)) * 5000  # more than one read
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_local_folder_is_taken_as_it_is(tmp_path):
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder(str(tmp_path), revision="main") == tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "neither an existing folder nor a hub id"),
        ("nowhere", "neither an existing folder nor a hub id"),
        ("../owner/name", "neither an existing folder nor a hub id"),
        ("", "neither an existing folder nor a hub id"),
        ("owner/name", "name a revision"),
    ],
)
def test_an_unknown_source_is_one_line_and_no_download(source, message):
    with pytest.raises(WeightsError, match=message) as error:
        resolve_folder(source)
    assert "\n" not in str(error.value)


def test_a_hub_id_without_network_names_the_remedy():
    with pytest.raises(WeightsError, match="check the name and the network, or copy the folder") as error:
        resolve_folder("owner/name", revision="0123abc")  # conftest switches the hub off
    assert "\n" not in str(error.value)


def test_missing_embedded_weights_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MODELS", tmp_path)
    with pytest.raises(WeightsError, match="embedded weights are missing in models/attention: restore"):
        resolve_folder("embedded")
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention" / "model_index.json").write_text("{}")
    assert resolve_folder("embedded") == tmp_path / "attention"


def test_sums_that_match_give_every_weight_file(folder):
    hashes = verify_sums(folder)
    assert list(hashes) == ["unet/a.safetensors", "vae/b.safetensors"]
    assert hashes["vae/b.safetensors"] == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("name", ["unet/a.safetensors", "unet/config.json"])
def test_a_changed_or_missing_file_is_noticed(folder, name):
    (folder / name).write_bytes(b"changed")
    with pytest.raises(WeightsError, match=f"{name} in .* does not match its SHA-256"):
        verify_sums(folder)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=f"{name} is listed in SHA256SUMS but missing"):
        verify_sums(folder)


def test_blank_lines_of_a_sums_file_mean_nothing(folder):
    sums = folder / "SHA256SUMS"
    sums.write_text("\n" + sums.read_text() + "\n")
    assert len(verify_sums(folder)) == 2


@pytest.mark.parametrize("between", ["  ", " *", "  ./", " *./", "\t"])
def test_every_way_of_sha256sum_to_write_names_is_read(folder, between):
    sums = folder / "SHA256SUMS"
    lines = [line.split("  ") for line in sums.read_text().splitlines()]
    lines.append(["0" * 64, "SHA256SUMS"])
    sums.write_text("".join(f"{digest}{between}{name}\n" for digest, name in lines))
    assert len(verify_sums(folder)) == 2
    (folder / "vae/b.safetensors").write_bytes(b"changed")
    with pytest.raises(WeightsError, match=r"vae/b.safetensors in .* does not match its SHA-256"):
        verify_sums(folder)


def test_weights_that_no_sum_covers_are_refused(folder):
    (folder / "unet/c.safetensors").write_bytes(b"three")
    with pytest.raises(WeightsError, match=r"unet/c.safetensors is not listed in SHA256SUMS"):
        verify_sums(folder)
    assert list(verify_sums(folder, ["unet/a.safetensors"])) == ["unet/a.safetensors"], "the others are not read"
    with pytest.raises(WeightsError, match=r"unet/c.safetensors is not listed in SHA256SUMS"):
        verify_sums(folder, ["unet/c.safetensors"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"0123abc\n"])
def test_a_list_that_is_none_is_one_line(folder, content):
    (folder / "SHA256SUMS").write_bytes(content)
    with pytest.raises(WeightsError, match=r"SHA256SUMS in .* is no list of sha256sum") as error:
        verify_sums(folder)
    assert "\n" not in str(error.value)


def test_fingerprint_depends_on_names_and_contents_not_on_order():
    one = fingerprint({"a": "1", "b": "2"})
    assert one == fingerprint({"b": "2", "a": "1"})
    assert len({one, fingerprint({"a": "1", "b": "3"}), fingerprint({"a": "1", "c": "2"}), fingerprint({})}) == 4


def test_a_weights_error_is_one_the_user_can_mend():
    assert issubclass(WeightsError, ZeroSegError) and issubclass(ZeroSegError, ValueError)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("one\ntwo", "one"),
        ("\n  one  \n", "one"),
        ("Error(s) in loading state_dict for Net:\n\tMissing key(s): a", "Missing key(s): a"),
        ("only this:", "only this:"),
        (" \n", "ValueError"),
    ],
)
def test_what_an_error_says_in_one_line(said, line):
    assert first_line(ValueError(said)) == line
