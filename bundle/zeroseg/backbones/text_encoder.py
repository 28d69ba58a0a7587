"""A frozen text encoder: any ``transformers`` encoder folder or hub id, the embedded small one by default."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.backbones.frozen import FrozenModel
from zeroseg.backbones.weights import (
    EMBEDDED,
    EMBEDDED_SETS,
    check_vocabulary,
    choose_encoder,
    fingerprint,
    relative_files,
    resolve_folder,
    verify_sums,
    weight_files,
)
from zeroseg.errors import WeightsError, ZeroSegError, first_line, is_out_of_memory

POOLINGS = ("cls", "mean")
UNUSED = ("pooler.*",)
"""Weights that a file may lack: ``embed`` reads the tokens' last states, which the pooler comes after."""
HARMLESS = ("*position_ids", "pooler.*", "*pooler.*", "cls.*", "lm_head.*", "classifier.*")
"""Keys that a file may hold in excess: the numbers 0, 1, 2 ..., and heads of the task it was trained by."""


class TextEncoder(FrozenModel):
    """Sentences to unit-length vectors, by an encoder whose weights never change.

    The paper's encoder is unknown; a third-party account uses Bio_ClinicalBERT and its [CLS] state. Both choices are
    followed here as defaults of shape, not of weights: the embedded encoder is a two-layer BERT trained on the prompt
    grammar of ``zeroseg.tumor.prompts`` alone. It knows only that grammar's words; what else is said becomes [UNK].

    The weights load on first use, once. Adapters are trained with one text encoder and fit only that one.

    Args:
        source: ``"embedded"``, a folder as ``save_pretrained`` writes it (safetensors), or a hub id (then ``revision``
            is required).
        revision: of a hub id.
        device: auto, or as torch spells it.
        pooling: ``cls``, the first token's state, or ``mean`` over the tokens.
    """

    def __init__(
        self, source: str | Path = EMBEDDED, revision: str | None = None, device: str = "auto", pooling: str = "cls"
    ):
        super().__init__(device)
        self.source, self.revision, self.pooling = str(source), revision, pooling

    def _load(self) -> None:
        import transformers

        if self.pooling not in POOLINGS:
            raise ZeroSegError(f"pooling must be one of {', '.join(POOLINGS)}, not {self.pooling!r}")
        self._place()
        if self.source in EMBEDDED_SETS:
            folder = EMBEDDED_SETS[self.source] / "text"
            if not folder.is_dir():
                raise WeightsError(
                    f"the embedded text encoder is missing in models/{folder.parent.name}/text: restore that folder of the bundle"
                )
            sums = verify_sums(folder.parent)  # one list covers the whole embedded folder
            self.weights = {n: h for n, h in sums.items() if n.startswith("text/")}
        else:
            form = "a saved transformers encoder"
            choose = choose_encoder(f"text encoder {self.source}")
            folder = resolve_folder(self.source, revision=self.revision, what="text encoder", form=form, choose=choose)
            files = weight_files(relative_files(folder), "", where=f"text encoder {folder.name}")
            self.weights = verify_sums(folder, files)
        given_a_folder = self.source not in EMBEDDED_SETS and Path(self.source).expanduser().is_dir()
        self.name = folder.name if given_a_folder else self.source
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            # Left out, trust_remote_code asks on the terminal whether to run the folder's own code.
            only = {"local_files_only": True, "trust_remote_code": False}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **only)
            model, loaded = transformers.AutoModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **only
            )
        except Exception as error:  # transformers and safetensors raise many kinds, few of them documented
            if is_out_of_memory(error):
                raise
            raise WeightsError(f"cannot load the text encoder in {self.name}: {first_line(error)}") from error
        check_vocabulary(self.tokenizer, f"the text encoder {self.name}")
        # transformers fills what is missing with random numbers and says so in its log only.
        for what, keys, allowed in (
            ("lacks", loaded["missing_keys"], UNUSED),
            ("holds in excess", loaded["unexpected_keys"], HARMLESS),
            ("has in another shape", [k if isinstance(k, str) else k[0] for k in loaded["mismatched_keys"]], ()),
        ):
            odd = sorted(k for k in keys if not any(fnmatch.fnmatch(k, a) for a in allowed))
            if odd:
                shown = ", ".join(odd[:3]) + (" ..." if len(odd) > 3 else "")
                raise WeightsError(
                    f"the text encoder {self.name} {what} {len(odd)} weights ({shown}): it does not fit its config"
                )
        if not hasattr(model.config, "hidden_size"):
            raise WeightsError(f"{self.name} is no text encoder (no hidden_size): give a BERT-like transformers folder")
        self.model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.weights)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        self.load()
        return int(self.model.config.hidden_size)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> Tensor:
        """Sentences -> (n, dim) float32 of length 1. Words the tokenizer does not know count as [UNK]; too long ones
        are cut."""
        self.load()
        limit = min(512, int(getattr(self.model.config, "max_position_embeddings", 512)))
        # A fast tokenizer keeps how it pads and cuts: no other thread's call may come in between.
        with self._lock:
            tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.device)
        states = self.model(**tokens).last_hidden_state.float()
        if self.pooling == "cls":
            return F.normalize(states[:, 0], dim=-1)
        weight = tokens["attention_mask"][..., None].float()
        return F.normalize((states * weight).sum(1) / weight.sum(1).clamp_min(1), dim=-1)

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that the tokenizer does not know at all, in order.

        Tokenizers with sub-words know nearly everything in pieces: this is evidence of ignorance, never of knowledge.
        """
        self.load()
        words = text.split()
        with self._lock:
            tokens = [self.tokenizer(word, add_special_tokens=False).input_ids for word in words]
        unknown = self.tokenizer.unk_token_id
        return [word for word, ids in zip(words, tokens, strict=True) if all(i == unknown for i in ids)]

    def describe(self) -> dict:
        """What a manifest records of the encoder."""
        self.load()
        return {
            "source": self.name,
            "revision": self.revision,
            "sha256": self.fingerprint,
            "pooling": self.pooling,
            "dim": self.dim,
        }
