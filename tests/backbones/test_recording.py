"""Reading attention out of a UNet: same output, true probabilities, nothing left behind, no large tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zeroseg.backbones import record, recording


@pytest.fixture(scope="module")
def upcast_unet():
    """A UNet whose attention is computed in float32 whatever its dtype, with heads given per level, as in SD 2.x."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        norm_num_groups=8,
        use_linear_projection=True,
        upcast_attention=True,
    )
    return unet.eval().requires_grad_(False)


@pytest.fixture(params=["stable_diffusion_1", "upcast"])
def unet(request, tiny_backbone, upcast_unet):
    return tiny_backbone.unet if request.param == "stable_diffusion_1" else upcast_unet


def inputs(batch: int = 2, size: int = 16) -> tuple:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, size, size, generator=generator)
    return latents, 300, torch.randn(batch, 7, 16, generator=generator)


@torch.inference_mode()
def forward(unet, *given) -> torch.Tensor:
    return unet(*(given or inputs())).sample


@torch.inference_mode()
def explicit_attention(unet, layer_name: str) -> dict[int, torch.Tensor]:
    """Mean over heads and layers of the scores that diffusers' own ``get_attention_scores`` gives in a plain pass."""
    found: dict[int, list[torch.Tensor]] = {}

    def look(attn, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        context = kwargs.get("encoder_hidden_states")
        context = hidden if context is None else context
        query, key = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden), attn.to_k(context)))
        scores = attn.get_attention_scores(query, key).unflatten(0, (-1, attn.heads))
        found.setdefault(hidden.shape[1], []).append(scores.mean(1))

    layers = [module for name, module in unet.named_modules() if name.endswith(f".{layer_name}")]
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        forward(unet)
    finally:
        for handle in handles:
            handle.remove()
    return {tokens: torch.stack(scores).mean(0) for tokens, scores in found.items()}


def test_recording_changes_nothing_in_the_output(unet):
    plain = forward(unet)
    with record(unet, self_attention=True, cross_attention=True, features=True):
        captured = forward(unet)
    assert plain.abs().max() > 0.1
    assert (captured - plain).abs().max() <= 1e-4
    assert torch.equal(forward(unet), plain), "the UNet is as before"


@pytest.mark.parametrize("block", [recording.BLOCK_ELEMENTS, 3000])
def test_probabilities_equal_an_explicit_softmax(unet, block, monkeypatch):
    monkeypatch.setattr(recording, "BLOCK_ELEMENTS", block)  # the small one: many blocks, the last one incomplete
    with record(unet, self_attention=True, cross_attention=True) as recorded:
        forward(unet)
    for maps, layer in ((recorded.self_attention, "attn1"), (recorded.cross_attention, "attn2")):
        expected = explicit_attention(unet, layer)
        assert sorted(maps) == sorted(expected)
        for tokens, attention in maps.items():
            assert attention.dtype == torch.float32
            assert attention.shape == expected[tokens].shape == (2, tokens, tokens if layer == "attn1" else 7)
            torch.testing.assert_close(attention, expected[tokens], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(attention.sum(-1), torch.ones(2, tokens), atol=1e-5, rtol=0)


def test_several_passes_are_averaged(tiny_backbone):
    unet, (latents, step, context) = tiny_backbone.unet, inputs()
    singles = []
    for shift in (0.0, 1.0):
        with record(unet) as recorded:
            forward(unet, latents + shift, step, context)
        singles.append(recorded.self_attention[256])
    with record(unet) as both:
        for shift in (0.0, 1.0):
            forward(unet, latents + shift, step, context)
    assert (singles[0] - singles[1]).abs().max() > 1e-4
    torch.testing.assert_close(both.self_attention[256], (singles[0] + singles[1]) / 2)


def test_only_what_is_asked_for_is_recorded(tiny_backbone):
    unet = tiny_backbone.unet
    with record(unet) as recorded:
        forward(unet)
    assert recorded.self_attention and not recorded.cross_attention and not recorded.features
    with record(unet, self_attention=False, cross_attention=True) as recorded:
        replaced = {n for n, p in unet.attn_processors.items() if type(p).__module__ == recording.__name__}
        forward(unet)
    assert recorded.cross_attention and not recorded.self_attention
    assert replaced and all(name.endswith("attn2.processor") for name in replaced), "the other layers keep their kernel"
    with record(unet, self_attention=False, features=True) as recorded:
        forward(unet)
        forward(unet)
    assert not recorded.self_attention
    assert [f.shape[-1] for f in recorded.features] == [4, 8, 16, 16], "of the last pass, coarse to fine"


@pytest.mark.parametrize("cross", [False, True])
def test_a_pass_that_ends_early_leaves_the_same(unet, cross):
    with record(unet, cross_attention=cross) as whole:
        forward(unet)
    reached = []
    handle = unet.conv_out.register_forward_hook(lambda *_: reached.append(1))
    try:
        with record(unet, cross_attention=cross, end_early=True) as recorded:
            for _ in range(2):
                with pytest.raises(recording.PassEnded):
                    forward(unet)
        assert not reached, "nothing is computed behind the last layer"
        forward(unet)
        assert reached, "the UNet is as before"
    finally:
        handle.remove()
    for kind in ("self_attention", "cross_attention"):
        maps = getattr(recorded, kind)
        assert sorted(maps) == sorted(getattr(whole, kind))
        for tokens, attention in maps.items():
            torch.testing.assert_close(attention, getattr(whole, kind)[tokens], atol=1e-7, rtol=1e-6)


def test_a_pass_that_is_needed_to_its_end_does_not_end_early(unet):
    with record(unet, features=True, end_early=True) as recorded:
        forward(unet)
    assert recorded.features[-1].shape[-1] == 16


@pytest.mark.parametrize("fails", [False, True])
def test_the_unet_is_restored(unet, fails):
    def state() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()]
        return {n: id(p) for n, p in unet.attn_processors.items()}, hooks

    before = state()
    try:
        with record(unet, self_attention=True, cross_attention=True, features=True):
            assert state() != before
            forward(unet)
            if fails:
                raise RuntimeError("midway")
    except RuntimeError as error:
        assert str(error) == "midway"
    assert state() == before


class Largest(TorchDispatchMode):
    """Sizes of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.shapes.add(tuple(value.shape))
        return result


def test_no_tensor_of_all_heads_and_tokens_ever_exists(tiny_backbone):
    unet, size = tiny_backbone.unet, 48
    tokens = size * size
    heads = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads
    assert heads * tokens * tokens > 2 * recording.BLOCK_ELEMENTS, "the case must be one that needs blocks"
    with Largest() as seen, record(unet):
        forward(unet, *inputs(1, size))
    sizes = {torch.Size(shape).numel() for shape in seen.shapes}
    assert {n for n in sizes if n > recording.BLOCK_ELEMENTS} == {tokens * tokens}, "nothing but the running sum"


def test_fused_projections_are_refused(upcast_unet):
    fused = copy.deepcopy(upcast_unet)
    fused.fuse_qkv_projections()
    before = dict(fused.attn_processors)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), record(fused):
        pass
    assert fused.attn_processors == before
