"""The frozen text encoder: embeddings, unknown words, what is refused."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

from published import change_tensors
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import check_vocabulary
from zeroseg.errors import WeightsError, ZeroSegError


@pytest.fixture(scope="module")
def encoder(tiny_tumor_model):
    return TextEncoder(tiny_tumor_model / "text", device="cpu").load()


def refuses(message: str, error_type: type = WeightsError, **options) -> None:
    with pytest.raises(error_type, match=message) as error:
        TextEncoder(**{"device": "cpu", **options}).load()
    assert "\n" not in str(error.value)


def test_embeddings_have_length_one_and_do_not_depend_on_company(encoder):
    texts = ["liver tumour", "normal CT of liver with a long tail of words", ""]
    embeddings = encoder.embed(texts)
    assert embeddings.shape == (3, encoder.dim) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings[:1], encoder.embed(texts[:1]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-4)


def test_case_does_not_matter(encoder):
    torch.testing.assert_close(encoder.embed(["CT of Liver"]), encoder.embed(["ct of liver"]))


def test_unknown_words_are_one_word(encoder):
    a, b = encoder.embed(["purple bicycle", "flying carpet"])
    torch.testing.assert_close(a, b)
    assert encoder.unknown_words("purple bicycle") == ["purple", "bicycle"]
    assert encoder.unknown_words("liver bicycle in CT") == ["bicycle"]
    assert encoder.unknown_words("liver tumour") == encoder.unknown_words("  ") == []


def test_one_thread_at_a_time_has_the_tokenizer(tiny_tumor_model):
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu").load()
    tokenizer, inside, met = encoder.tokenizer, threading.Semaphore(1), []

    def alone(*args, **options):
        if not inside.acquire(blocking=False):
            met.append(args)
            return tokenizer(*args, **options)
        time.sleep(0.01)
        found = tokenizer(*args, **options)
        inside.release()
        return found

    alone.unk_token_id = tokenizer.unk_token_id
    encoder.tokenizer = alone
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(*((encoder.embed, ["liver"]), (encoder.unknown_words, "liver"))[i % 2]) for i in range(8)]
        for one in asked:
            one.result()
    assert not met


def test_too_many_words_are_cut(encoder):
    torch.testing.assert_close(encoder.embed(["liver " * 500]), encoder.embed(["liver " * 100]))


def test_mean_pooling_is_another_vector(tiny_tumor_model, encoder):
    mean = TextEncoder(tiny_tumor_model / "text", device="cpu", pooling="mean")
    first, together = mean.embed(["liver tumour"]), mean.embed(["liver tumour", "a far longer sentence of many words"])
    torch.testing.assert_close(first, together[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, encoder.embed(["liver tumour"]), atol=1e-3)


def test_what_is_refused(tiny_tumor_model, tmp_path):
    refuses("neither an existing folder nor a hub id .* transformers encoder", source=tmp_path / "none")
    refuses("name a revision", source="owner/name")
    refuses("pooling must be one of", ZeroSegError, source=tiny_tumor_model / "text", pooling="max")
    refuses("holds no .safetensors file: pickle weights are refused", source=tmp_path)
    folder = shutil.copytree(tiny_tumor_model / "text", tmp_path / "text")
    (folder / "config.json").unlink()
    refuses("cannot load the text encoder in text", source=folder)


@pytest.mark.parametrize("kind", ["bert", "t5", "deberta-v2"])
def test_a_folder_without_its_vocabulary_is_refused(kind, tiny_tumor_model, tmp_path):
    folder = shutil.copytree(tiny_tumor_model / "text", tmp_path / "text")
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    if kind == "bert":
        refuses("the tokenizer of the text encoder text knows no words: copy its files", source=folder)
    # Other kinds bring a few pieces of their own.
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(WeightsError, match="knows no words"):
        check_vocabulary(AutoTokenizer.from_pretrained(folder, local_files_only=True), "this")


def test_code_of_a_folder_is_not_run_though_somebody_would_say_yes(tiny_tumor_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_tumor_model / "text", tmp_path / "text")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    odd = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Config", "AutoModel": "odd.Model"}}
    (folder / "config.json").write_text(json.dumps(odd))
    refuses("cannot load the text encoder in text: .* custom code", source=folder)
    assert not (tmp_path / "ran").exists()


DAMAGED = {
    "half of the weights": ("model.safetensors", lambda data: data[: len(data) // 2]),
    "something else": ("model.safetensors", lambda data: b"x" * 100),
    "nothing": ("model.safetensors", lambda data: b""),
    "a list for a config": ("config.json", lambda data: b"[]"),
    "a word for a number": (
        "config.json",
        lambda data: json.dumps({**json.loads(data), "hidden_size": "16"}).encode(),
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_one_line(what, tiny_tumor_model, tmp_path):
    folder = shutil.copytree(tiny_tumor_model / "text", tmp_path / "text")
    file, change = DAMAGED[what]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    refuses("cannot load the text encoder in text: ", source=folder)


def test_a_lack_of_memory_is_no_damage(tiny_tumor_model, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(MemoryError):
        TextEncoder(tiny_tumor_model / "text", device="cpu").load()


def test_describe_names_no_folder(encoder, tiny_tumor_model):
    described = encoder.describe()
    assert described["source"] == "text" and described["dim"] == encoder.dim and len(described["sha256"]) == 64
    assert str(tiny_tumor_model) not in str(described)


def test_weights_that_are_missing_are_not_filled_in(tiny_tumor_model, encoder, tmp_path):
    def changed(change):
        folder = shutil.copytree(tiny_tumor_model / "text", tmp_path / "text", dirs_exist_ok=True)
        change_tensors(folder / "model.safetensors", change)
        return folder

    def without(part):
        return changed(lambda tensors: {k: v for k, v in tensors.items() if part not in k})

    refuses(
        "the text encoder text lacks 2 weights .encoder.layer.0.output.dense", source=without("layer.0.output.dense")
    )
    refuses(
        "holds in excess .* weights", source=changed(lambda t: {**t, "encoder.layer.7.output.bias": torch.zeros(1)})
    )
    refuses("lacks .* weights", source=changed(lambda tensors: {f"roberta.{k}": v for k, v in tensors.items()}))
    bert = changed(lambda t: {f"bert.{k}": v for k, v in t.items()} | {"cls.predictions.bias": torch.zeros(3)})
    torch.testing.assert_close(TextEncoder(bert, device="cpu").embed(["liver"]), encoder.embed(["liver"]))
    headless = TextEncoder(without("pooler"), device="cpu")
    torch.testing.assert_close(headless.embed(["liver"]), encoder.embed(["liver"]))
