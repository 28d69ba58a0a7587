"""Adapters, attention over prompts, fusion and its calibration."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from zeroseg.tumor.adapters import ROLES, AovaAdapters, ScanNorm, local_mean, role_margin, top_mean

CHANNELS, DIM = (4, 6, 8), 10


def adapters(**options) -> AovaAdapters:
    torch.manual_seed(0)
    return AovaAdapters(CHANNELS, DIM, **{"hidden": 2, "context": ((3,), (3,), ()), **options})


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, c, 16 >> n, 8 >> n, 12 >> n, generator=generator) for n, c in enumerate(CHANNELS)]


@pytest.fixture
def prompts():
    return F.normalize(torch.randn(3, DIM, generator=torch.Generator().manual_seed(2)), dim=1)


def test_alpha_zero_is_the_identity(features):
    for adapted, raw in zip(adapters(alpha=0.0).adapt(features), features, strict=True):
        assert torch.equal(adapted, raw[0].movedim(0, -1))


def test_the_residual_ratio_is_the_papers(features):
    net, one = adapters(alpha=0.3), adapters(alpha=1.0)
    for mixed, full, raw in zip(net.adapt(features), one.adapt(features), features, strict=True):
        torch.testing.assert_close(mixed, 0.3 * full + 0.7 * raw[0].movedim(0, -1))


def test_without_context_t_is_two_linear_layers_on_the_voxel(features):
    net = adapters(alpha=1.0, context=((), (), ()))
    linear = [m for m in net.stages[0].adapt if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 2 and linear[0].in_features == CHANNELS[0]
    changed = [f.clone() for f in features]
    changed[0][..., 0] += 1
    assert torch.equal(net.adapt(changed)[0][:, :, 1:], net.adapt(features)[0][:, :, 1:])


def test_shapes_and_attention(features, prompts):
    output = adapters()(features, prompts)
    assert [tuple(level.shape) for level in output.levels] == [(3, 16, 8, 12), (3, 8, 4, 6), (3, 4, 2, 3)]
    for level in output.levels:
        torch.testing.assert_close(level.sum(0), torch.ones_like(level[0]))
    assert output.margin.shape == (16, 8, 12) and output.image_logit.shape == () and output.pooled.shape == (3, DIM)
    torch.testing.assert_close(output.probability, output.margin.sigmoid())
    assert output.probability.min() >= 0 and output.probability.max() <= 1


def test_prompts_alone_decide_when_they_agree(features, prompts):
    """Equal prompts in all roles: no voxel speaks for the abnormal one, whatever the features."""
    net = adapters()
    net.bias.data.zero_()
    same = net(features, prompts[:1].expand(3, -1))
    torch.testing.assert_close(same.margin, torch.full_like(same.margin, -math.log(2)))
    torch.testing.assert_close(same.null_contrast, torch.tensor(0.0), atol=1e-5, rtol=0)


def test_the_margin_is_the_product_of_experts(features, prompts):
    net = adapters()
    net.log_temperature.data.copy_(torch.tensor([0.5, -0.5, 0.2]))
    adapted = net.adapt(features)
    logits = sum(
        t * F.interpolate(stage.logits(values, prompts)[None], (16, 8, 12), mode="trilinear")[0]
        for stage, values, t in zip(net.stages, adapted, net.log_temperature.exp(), strict=True)
    )
    share = logits.softmax(0)
    expected = torch.log(share[1] / (share[0] + share[2])) + net.bias
    torch.testing.assert_close(net.attend(adapted, prompts).margin, expected, rtol=1e-3, atol=1e-4)


def test_a_synonym_more_changes_nothing(features, prompts):
    net = adapters()
    doubled = torch.cat([prompts[:1], prompts[1:2], prompts[1:2], prompts[2:]])
    roles = ("normal", "abnormal", "abnormal", "null")
    torch.testing.assert_close(net(features, doubled, roles).margin, net(features, prompts).margin)


def test_order_of_prompts_does_not_matter(features, prompts):
    net = adapters()
    turned = net(features, prompts.flip(0), ROLES[::-1])
    torch.testing.assert_close(turned.margin, net(features, prompts).margin)
    torch.testing.assert_close(turned.image_logit, net(features, prompts).image_logit)


def test_calibration_standardises(features):
    net = adapters(alpha=0.0)
    scaled = [5 * f + 100 for f in features]
    net.calibrate(scaled)
    for values in net.adapt(scaled):
        torch.testing.assert_close(values.flatten(0, 2).mean(0), torch.zeros(values.shape[-1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(values.flatten(0, 2).std(0), torch.ones(values.shape[-1]), atol=1e-3, rtol=0)
    samples = adapters(alpha=0.0)
    samples.calibrate([f[0].flatten(1) for f in scaled])
    for a, b in zip(samples.stages, net.stages, strict=True):
        torch.testing.assert_close(a.center, b.center)
        torch.testing.assert_close(a.spread, b.spread)
    assert "stages.0.center" in net.state_dict(), "statistics travel with the weights"


def test_everything_learns(features, prompts):
    net = adapters()
    output = net(features, prompts)
    (output.margin.mean() + output.image_logit + output.pooled.sum()).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(n.startswith("image_head.0") for n in idle), idle  # behind a layer that starts at zero


def test_a_few_steps_find_a_lesion(prompts):
    """The Dice and cross-entropy of a bright cube can be driven down: probability 0.5 separates it."""
    features = [
        torch.randn(1, c, 16 >> n, 16 >> n, 16 >> n, generator=torch.Generator().manual_seed(n)) * 0.3
        for n, c in enumerate(CHANNELS)
    ]
    mask = torch.zeros(16, 16, 16)
    mask[4:10, 4:10, 4:10] = 1
    for values in features:
        values[0, 0] += 3 * F.interpolate(mask[None, None], values.shape[2:])[0, 0]
    net = adapters()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.02)
    for _ in range(40):
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(net(features, prompts).margin, mask).backward()
        optimiser.step()
    found = net(features, prompts).probability > 0.5
    assert 2 * (found * mask).sum() / (found.sum() + mask.sum()) > 0.8


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (("normal", "abnormal"), "3 prompts need 3 roles"),
        (("normal", "abnormal", "odd"), "unknown role 'odd'"),
        (("normal", "null", "null"), "at least one abnormal"),
        (("abnormal",) * 3, "at least one abnormal"),
    ],
)
def test_roles_that_do_not_fit(features, prompts, roles, message):
    with pytest.raises(ValueError, match=message):
        adapters()(features, prompts, roles)


def test_wrong_options():
    with pytest.raises(ValueError, match="alpha must lie"):
        adapters(alpha=1.5)
    with pytest.raises(ValueError, match="one list of cube sides per stage"):
        adapters(context=((3,),))
    assert AovaAdapters(**adapters().options).options == adapters().options


def test_local_mean_is_a_cube_mean():
    values = torch.rand(1, 2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    mean = local_mean(values, 3)
    torch.testing.assert_close(mean[0, 1, 2, 3, 4], values[0, 1, 1:4, 2:5, 3:6].mean())
    torch.testing.assert_close(mean[0, 0, 0, 0, 0], values[0, 0, :2, :2, :2].mean())
    whole = local_mean(values, 31)
    torch.testing.assert_close(whole, values.mean((2, 3, 4), keepdim=True).expand_as(values))


def test_role_margin_and_top_mean():
    logits = torch.log(torch.tensor([0.2, 0.5, 0.3]))
    torch.testing.assert_close(role_margin(logits, ROLES), torch.log(torch.tensor(1.0)), atol=1e-6, rtol=0)
    values = torch.arange(100.0)
    assert top_mean(values, 4) == 97.5 and top_mean(values, 1) == 99 and top_mean(values[:2], 20) == 0.5


def test_a_unet_may_be_the_adapter_of_all_stages(features, prompts):
    net = adapters(alpha=0.5, deeper=(10, 12))
    assert [tuple(a.shape) for a in net.adapt(features)] == [(16, 8, 12, 4), (8, 4, 6, 6), (4, 2, 3, 8)]
    assert not any(hasattr(stage, "adapt") for stage in net.stages)
    output = net(features, prompts)
    assert output.margin.shape == (16, 8, 12)
    output.image_logit.backward()
    assert all(p.grad is not None for p in net.surroundings.parameters())
    again = AovaAdapters(**net.options)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(features, prompts).margin, output.margin)


@pytest.mark.parametrize("deeper", [(), (10, 12)], ids=["layers", "unet"])
def test_volumes_of_one_shape_are_adapted_at_once(features, deeper):
    net = adapters(alpha=0.5, deeper=deeper).eval()
    other = [f.flip(2) for f in features]
    together = net.adapt_many([features, other])
    for found, alone in zip(together, (net.adapt(features), net.adapt(other)), strict=True):
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_unet_looks_further_than_a_voxel(features):
    net = adapters(alpha=1.0, deeper=(10, 12)).eval()
    changed = [f.clone() for f in features]
    changed[0][..., :2] += 1
    far = (net.adapt(changed)[0] - net.adapt(features)[0]).abs()[:, :, -1]
    assert far.max() == 0, "the finest level passes on what lies at the voxel itself"
    changed = [f.clone() for f in features]
    changed[2][..., :1] += 1
    assert (net.adapt(changed)[0] - net.adapt(features)[0]).abs()[:, :, -1].max() > 0


def test_read_as_a_whole_a_scan_is_seen_by_its_own_mean_and_deviation(features):
    net = adapters(alpha=1.0, deeper=(10, 12), whole_mm=4.0).eval()
    with torch.no_grad():
        for norm in (m for m in net.modules() if isinstance(m, ScanNorm)):
            seen = norm(3 * features[0][:, :1].expand(1, norm.gain.shape[1], -1, -1, -1) + 7)
            torch.testing.assert_close(seen.mean((2, 3, 4)), torch.zeros(1, norm.gain.shape[1]), atol=1e-5, rtol=0)
            torch.testing.assert_close(seen.std((2, 3, 4), correction=0), torch.ones(1, norm.gain.shape[1]))
    # Small scans end in maps of one voxel.
    single = [f[..., : 4 >> n, : 4 >> n, : 4 >> n] for n, f in enumerate(features)]
    assert all(torch.isfinite(level).all() for level in net.train().adapt(single))


@pytest.mark.parametrize(
    ("shape", "voxel_ml", "size"),
    [
        ((48, 48, 48), 0.027, (32, 32, 32)),
        ((64, 96, 16), 0.064, (64, 96, 16)),
        ((32, 32, 32), 0.512, (64, 64, 64)),
        ((192, 192, 192), 0.064, (96, 96, 96)),
    ],
    ids=["coarser", "as it is", "finer", "large"],
)
def test_the_grid_of_a_scan_read_as_a_whole(shape, voxel_ml, size):
    assert adapters(deeper=(10, 12), whole_mm=4.0).whole_size(shape, voxel_ml, 16) == size
