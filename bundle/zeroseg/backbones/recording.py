"""Reading attention and features out of a frozen diffusers UNet during one forward pass.

Default attention kernels never form the probabilities, so the recorded layers run a processor of their own: it computes
the same output block of query rows by block, and adds the probabilities of every block to a running sum over heads. At no
time does a per-head n x n tensor of a whole layer exist; what is kept is one (B, n, n) sum per token grid. A pass whose
output nobody wants may end where the last recorded layer has been read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

BLOCK_ELEMENTS = 1 << 19
"""Probabilities held at once: 2 MB in float32."""


@dataclass
class Recording:
    """What one or more forward passes left behind.

    Attributes:
        self_attention: number of tokens n -> (B, n, n) float32, rows sum to 1, averaged over heads, layers and passes.
        cross_attention: number of tokens n -> (B, n, L) float32 over the L text tokens, averaged alike.
        features: outputs of the decoder's up blocks, finest last, each (B, C, h, w) float32; of the last pass.
    """

    self_attention: dict[int, Tensor] = field(default_factory=dict)
    cross_attention: dict[int, Tensor] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)
    _maps: dict[tuple[str, int], int] = field(default_factory=dict)

    def _sum(self, kind: str, shape: tuple[int, int, int], heads: int, device) -> Tensor:
        """What a layer adds the probabilities of all its heads to."""
        store = getattr(self, kind)
        n = shape[1]
        self._maps[kind, n] = self._maps.get((kind, n), 0) + heads
        if n not in store:
            store[n] = torch.zeros(shape, dtype=torch.float32, device=device)
        return store[n]

    @torch.inference_mode()  # the passes may have run in it, and then only it may change what they left
    def _average(self) -> None:
        for (kind, n), maps in self._maps.items():
            getattr(self, kind)[n].div_(maps)
        self._maps.clear()


class PassEnded(Exception):
    """Raised out of a UNet where all that is recorded has been read: what it would still compute, nobody looks at."""


def _read_together(query: Tensor, key: Tensor, value: Tensor, total: Tensor, output: Tensor | None) -> None:
    """Attention of all heads at once, some query rows after the other: few kernels, as a GPU wants it.

    Args:
        query: (heads, n, d), scaled.
        key: (heads, d, m).
        value: (heads, m, d).
        total: (n, m), which the probabilities are added to.
        output: (heads, n, d), written; None: not wanted.
    """
    rows = max(1, BLOCK_ELEMENTS // (len(query) * key.shape[-1]))
    for start in range(0, query.shape[1], rows):
        block = slice(start, start + rows)
        probabilities = torch.matmul(query[:, block], key).softmax(-1)
        total[block] += probabilities.sum(0, dtype=total.dtype)
        if output is not None:
            output[:, block] = torch.matmul(probabilities.to(value.dtype), value)


def _read_by_heads(query: Tensor, key: Tensor, value: Tensor, total: Tensor, output: Tensor | None) -> None:
    """The same, one head after the other in one piece of memory: a CPU's products want many rows and a full cache."""
    tokens, width = query.shape[1], key.shape[-1]
    rows = min(tokens, max(1, BLOCK_ELEMENTS // width))
    scratch = query.new_empty(rows, width)
    for start in range(0, tokens, rows):
        block = slice(start, start + rows)
        part = scratch[: min(rows, tokens - start)]
        for head in range(len(query)):
            torch.mm(query[head, block], key[head], out=part)
            torch.softmax(part, -1, out=part)
            total[block] += part
            if output is not None:
                output[head, block] = torch.mm(part.to(value.dtype), value[head])


class _RecordingProcessor:
    """A diffusers attention processor that equals the default one and adds its probabilities to a recording; ``last``: then
    the pass ends."""

    def __init__(self, recording: Recording, kind: str, last: bool = False):
        self.recording, self.kind, self.last = recording, kind, last

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        heads = attn.heads
        query, key, value = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states) * attn.scale, attn.to_k(context), attn.to_v(context))
        )
        batch, _, tokens, _ = query.shape
        dtype = query.dtype
        if attn.upcast_attention or attn.upcast_softmax:
            query, key = query.float(), key.float()
        total = self.recording._sum(self.kind, (batch, tokens, key.shape[2]), heads, query.device)
        output = None if self.last else torch.empty_like(query, dtype=dtype)
        read = _read_by_heads if query.device.type == "cpu" else _read_together
        for b in range(batch):
            read(
                query[b],
                key[b].transpose(-1, -2).contiguous(),
                value[b],
                total[b],
                None if output is None else output[b],
            )
        if output is None:
            raise PassEnded
        output = output.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


@contextmanager
def record(
    unet: nn.Module,
    self_attention: bool = True,
    cross_attention: bool = False,
    features: bool = False,
    end_early: bool = False,
) -> Iterator[Recording]:
    """Record the forward passes made inside the ``with`` block; the UNet is restored whatever happens in it.

    Args:
        unet: a diffusers ``UNet2DConditionModel``.
        self_attention: record every ``attn1`` layer.
        cross_attention: record every ``attn2`` layer.
        features: record the output of every up block.
        end_early: end each pass, by ``PassEnded``, where the last layer recorded has been read, so that it gives no output; not
            with ``features``, which need all of it, nor where no layer of the decoder is recorded.

    Yields:
        A Recording whose averages are ready when the block is left.

    Raises:
        ValueError: a layer has fused projections (``fuse_qkv_projections``), whose parts cannot be read.
    """
    recording = Recording()
    wanted = {"attn1": "self_attention"} if self_attention else {}
    if cross_attention:
        wanted["attn2"] = "cross_attention"
    previous = unet.attn_processors
    processors = dict(previous)
    last = None
    for name in previous:
        layer = name.removesuffix(".processor")
        kind = wanted.get(layer.rsplit(".", 1)[-1])
        if kind is None:
            continue
        if getattr(unet.get_submodule(layer), "fused_projections", False):
            msg = f"{layer} has fused projections: call unfuse_qkv_projections() before recording attention"
            raise ValueError(msg)
        processors[name] = _RecordingProcessor(recording, kind)
        # The decoder comes last, and lists its layers in the order they run in; the middle block is listed after it.
        if name.startswith("up_blocks."):
            last = processors[name]
    if last is not None:
        last.last = end_early and not features
    hooks = []
    unet.set_attn_processor(processors)
    try:
        if features:
            hooks.append(unet.register_forward_pre_hook(lambda *_: recording.features.clear()))
            for up_block in unet.up_blocks:
                hooks.append(
                    up_block.register_forward_hook(lambda _m, _a, out: recording.features.append(out.detach().float()))
                )
        yield recording
    finally:
        unet.set_attn_processor(previous)
        for hook in hooks:
            hook.remove()
        recording._average()
