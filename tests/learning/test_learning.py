"""A head learned from a few images: that it learns, is kept whole, and refuses what is not its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from zeroseg.attention import AttentionSegmentationInferer
from zeroseg.errors import WeightsError, ZeroSegError
from zeroseg.learning import Case, Exemplar, LearnedHead, Stopped, fit
from zeroseg.learning.augmentation import augment
from zeroseg.learning.cases import MOST_SLICES, chosen_slices, labelled_slices
from zeroseg.learning.features import find_components, read_encoded
from zeroseg.learning.fitting import fit_shown, shares
from zeroseg.learning.head import expected_dice
from zeroseg.learning.inputs import Shown, show_encoded, squeeze
from zeroseg.learning.network import FOUND, MIRRORS, FewShotNet, class_shares, joined
from zeroseg.learning.store import read_folder

LABELS = {"disc": 1, "square": 3}


def scene(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc (1) and a dark square (3) somewhere on noisy ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    row, column = rng.integers(16, 48), rng.integers(12, 20)
    label = np.zeros((size, size), np.uint8)
    label[(y - row) ** 2 + (x - column) ** 2 < 100] = 1
    top = rng.integers(6, 40)
    label[top : top + 16, 40:56] = 3
    image = np.choose(np.minimum(label, 2), [0.5, 0.9, 0.9])
    image = np.where(label == 3, 0.1, image) + 0.02 * rng.standard_normal((3, size, size))
    return image.clip(0, 1).astype(np.float32), label


@pytest.fixture(scope="module")
def inferer(tiny_backbone):
    return AttentionSegmentationInferer(tiny_backbone, resolution=64)


@pytest.fixture(scope="module")
def few_steps():
    """Steps that are not ended by a clock, so that heads are equal on every machine."""
    return {"left": lambda: 1.0, "steps": 3}


@pytest.fixture(scope="module")
def learned_from(inferer) -> tuple[list[Shown], list[torch.Tensor]]:
    image, label = scene(0)
    # What the tiny model finds is chance, so the scene's own mask is shown.
    shown = replace(show_encoded(inferer, inferer.encode(image)), foreground=squeeze(torch.from_numpy(label > 0)[None]))
    return [shown], [shares(torch.tensor([0, 1, 0, 2])[label.astype(int)], 3)]


@pytest.fixture(scope="module")
def head(inferer, learned_from, few_steps) -> LearnedHead:
    network, facts = fit_shown(*learned_from, **few_steps)
    return LearnedHead(inferer, network, LABELS, {"shots": 1, **facts})


@pytest.mark.slow
def test_it_learns_from_two_images_over_the_embedded_model(embedded_backbone):
    inferer = AttentionSegmentationInferer(embedded_backbone, resolution=128)
    seen: list[tuple[int, int, float]] = []
    cases = [Case(*scene(seed)) for seed in (0, 1)]
    parts = labelled_slices(cases, LABELS, -1)
    shown = [show_encoded(inferer, inferer.encode_prepared(part.image)) for part in parts]
    classes = [shares(part.classes, 3) for part in parts]
    network, facts = fit_shown(shown, classes, left=lambda: 1.0, steps=40, progress=lambda *now: seen.append(now))
    # Two networks make 40 steps each.
    assert [now[:2] for now in seen] == [(n, 80) for n in range(10, 90, 10)] and facts["steps"] == 80
    learned = LearnedHead(inferer, network, LABELS, facts)
    image, label = scene(2)
    found = learned.predict(image)
    for value in (1, 3):
        mask, truth = found.label_map == value, label == value
        assert 2 * np.count_nonzero(mask & truth) / (mask.sum() + truth.sum()) > 0.6
    assert set(np.unique(found.label_map)) <= {0, 1, 3}


def test_fit_takes_images_and_volumes_and_says_what_it_did(inferer):
    image, label = scene(0)
    volume, labels = np.stack([image[:1]] * 3, -1), np.stack([label, label, 0 * label], -1)
    head = fit([Case(image, label), Case(volume, labels)], inferer, labels=LABELS, seconds=0.01)
    facts = head.describe()
    assert (facts["shots"], facts["slices"], facts["steps"], facts["labels"]) == (2, 4, 2, LABELS)
    found = head.predict(volume)
    assert found.label_map.shape == (64, 64, 3) and found.probabilities.shape == (3, 64, 64, 3)
    assert found.certainty.shape == (64, 64, 3) and 0 <= found.confidence <= 1
    np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)


@pytest.mark.slow
def test_equal_seeds_give_equal_heads_and_go_on_from_where_they_are(head, learned_from, few_steps):
    again, _ = fit_shown(*learned_from, **few_steps)
    for a, b in zip(again.state_dict().values(), head.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    further, _ = fit_shown(*learned_from, **few_steps, start=head)
    assert torch.equal(further.prior, head.network.prior)
    for name in ("guided", "plain"):
        now, before = (getattr(network, name).final_conv.weight for network in (further, head.network))
        assert not torch.equal(now, before)


def test_an_encoding_and_its_image_give_the_same_answer(head, inferer):
    image, _ = scene(1)
    direct, encoded = head.predict(image), head.predict(inferer.encode(image))
    np.testing.assert_allclose(direct.probabilities, encoded.probabilities, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(head, inferer, tmp_path):
    head.save(tmp_path / "head")
    loaded = LearnedHead.load(tmp_path / "head", inferer)
    image, _ = scene(1)
    same = np.array_equal(loaded.predict(image).probabilities, head.predict(image).probabilities)
    assert same
    assert loaded.describe() == head.describe()
    head.save(tmp_path / "head")
    assert len(list((tmp_path / "head").iterdir())) == 2


def test_a_head_of_another_backbone_or_other_settings_is_refused(head, inferer, tmp_path, embedded_backbone):
    head.save(tmp_path)
    with pytest.raises(WeightsError, match="another timestep"):
        LearnedHead.load(tmp_path, inferer.replace(timestep=10))
    with pytest.raises(WeightsError, match="another refiner"):
        LearnedHead.load(tmp_path, inferer.replace(refiner="rules"))
    with pytest.raises(WeightsError, match="another backbone") as refused:
        LearnedHead.load(tmp_path, AttentionSegmentationInferer(embedded_backbone, resolution=64))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["weights", "labels", "config", "nothing"])
def test_what_was_tampered_with_is_refused(head, inferer, tmp_path, what):
    head.save(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    config = tmp_path / "config.json"
    if what == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif what == "labels":
        config.write_text(config.read_text().replace('"disc"', '"ring"'))
    elif what == "config":
        config.write_text("{}")
    else:
        weights.unlink()
    with pytest.raises(WeightsError):
        LearnedHead.load(tmp_path, inferer)


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_old_head(head, inferer, tmp_path):
    head.save(tmp_path)
    before = read_folder(tmp_path)[1]
    code = (
        "import sys, time, torch; from pathlib import Path; from zeroseg.learning import store\n"
        "def hang(*_): print('written', flush=True); time.sleep(60)\n"
        "store.write_json = hang\n"
        "store.write_folder(Path(sys.argv[1]), {'a': torch.zeros(3)}, {})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert read_folder(tmp_path)[1] == before
    LearnedHead.load(tmp_path, inferer)
    head.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_stopped_when_asked(inferer):
    asked = []

    def cancelled() -> bool:
        asked.append(time.perf_counter())
        return len(asked) > 3

    with pytest.raises(Stopped, match="nothing was saved"):
        fit([Case(*scene(0))], inferer, labels=LABELS, cancelled=cancelled)
    assert len(asked) == 4 and issubclass(Stopped, ZeroSegError)


@pytest.mark.parametrize(
    ("label", "labels", "message"),
    [
        (np.zeros((64, 64), np.uint8), LABELS, "empty"),
        (np.ones((64, 63), np.uint8), LABELS, "must be equal"),
        (np.full((64, 64), 2, np.uint8), LABELS, "holds the value 2"),
        (np.full((64, 64), 0.5), LABELS, "whole numbers"),
        (np.full((64, 64), np.nan), LABELS, "whole numbers"),
        (np.ones((64, 64), np.uint8), {}, "no labels"),
        (np.ones((64, 64), np.uint8), {"a": 0}, "1 to 255"),
        (np.ones((64, 64), np.uint8), {"a": True}, "1 to 255"),
        (np.ones((64, 64), np.uint8), {"a": 1, "b": 1}, "same value"),
    ],
)
def test_labels_that_do_not_fit_are_refused(inferer, label, labels, message):
    with pytest.raises(ZeroSegError, match=message):
        fit([Case(scene(0)[0], label)], inferer, labels=labels, seconds=1)


def test_bool_labels_are_labels():
    image, label = scene(0)
    (part,) = labelled_slices([Case(image, label == 1)], {"disc": 1}, -1)
    assert torch.equal(part.classes, torch.from_numpy((label == 1).astype(np.int64)))


def test_slices_that_are_kept_do_not_keep_their_volume():
    volume, label = np.random.default_rng(0).random((1, 16, 12, 9), np.float32), np.zeros((16, 12, 9), np.uint8)
    label[4:8, 4:8, 2:5] = 1
    parts = labelled_slices([Case(volume, label)], {"disc": 1}, -1)
    assert len(parts) > 1 and any(part.classes.any() for part in parts)
    for part in parts:
        assert part.classes.dtype == torch.int64
        for kept in (part.image, part.classes):
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_nothing_to_learn_from_and_other_labels_to_go_on_from(inferer, head):
    with pytest.raises(ZeroSegError, match="at least one"):
        fit([], inferer, labels=LABELS)
    with pytest.raises(ZeroSegError, match="other labels"):
        fit([Case(*scene(0))], inferer, labels={"disc": 1, "square": 3, "more": 4}, start=head)
    with pytest.raises(ZeroSegError, match="seconds"):
        fit([Case(*scene(0))], inferer, labels=LABELS, seconds=0)
    with pytest.raises(ZeroSegError, match="an image must be"):
        fit([Case(np.zeros((64, 64)), np.zeros((64, 64)))], inferer, labels=LABELS)


def test_slices_of_a_volume_are_spread_over_what_is_labelled():
    label = np.zeros((100, 4, 4), bool)
    label[30:80] = True
    chosen = chosen_slices(label, MOST_SLICES)
    assert len(chosen) == MOST_SLICES and chosen == sorted(set(chosen))
    assert sum(30 <= k < 80 for k in chosen) == 18 and {30, 79} <= set(chosen)


def test_expected_dice_is_that_of_the_probabilities():
    shares = np.zeros((2, 2, 2), np.float32)
    shares[1] = [[0.9, 0.6], [0.3, 0.0]]
    shares[0] = 1 - shares[1]
    assert expected_dice(shares) == pytest.approx(2 * 1.5 / (1.8 + 2))
    assert expected_dice(np.stack([np.full((2, 2), 0.8), np.full((2, 2), 0.2)])) == pytest.approx(0.8)


def test_changes_keep_image_and_maps_together():
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 1, 32).expand(4, 1, 32, 32).clone()
    image, maps = augment(ramp.expand(4, 3, 32, 32), torch.cat([1 - ramp, ramp], 1), generator)
    torch.testing.assert_close(maps.sum(1), torch.ones(4, 32, 32))
    agree = [np.corrcoef(i.flatten(), m.flatten())[0, 1] for i, m in zip(image[:, 0], maps[:, 1], strict=True)]
    assert sum(a > 0.8 for a in agree if np.isfinite(a)) >= 3


def test_a_network_begins_at_what_the_labels_say_of_the_foreground():
    truth = torch.zeros(1, 2, 32, 32)
    truth[:, 1, :, 16:] = 1
    truth[:, 0] = 1 - truth[:, 1]
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def begin(foreground: torch.Tensor) -> torch.Tensor:
        network = FewShotNet(class_shares(foreground, truth), 1.0).eval()
        with torch.inference_mode():
            return network(image, foreground).softmax(1)[0, 1]

    # Right, exactly wrong, and half of all that is the object.
    assert torch.equal(begin(truth[:, 1:]) > 0.5, truth[0, 1] > 0.5)
    assert torch.equal(begin(truth[:, :1]) > 0.5, truth[0, 1] > 0.5)
    nowhere = begin(torch.zeros(1, 1, 32, 32))
    torch.testing.assert_close(nowhere, torch.full((32, 32), 0.5))


def test_the_second_network_sees_the_image_alone_and_both_are_asked(head):
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.rand(3, 32, 32, generator=generator), torch.zeros(1, 32, 32)
    guided, guided_inside = (head.network(image[None], seen[None]) for seen in (mask, 1 - mask))
    assert not torch.allclose(guided, guided_inside)
    found = head.network.probabilities(image, mask)
    torch.testing.assert_close(found.sum(0), torch.ones(32, 32))
    turned = head.network.probabilities(image.flip(-2, -1), mask)
    torch.testing.assert_close(found, turned.flip(-2, -1), atol=1e-5, rtol=1e-5)


def test_what_finds_nothing_that_is_labelled_is_not_shown(tmp_path, inferer):
    truth = torch.zeros(2, 32, 32)
    truth[1, 4:12, 4:12] = 1
    truth[0] = 1 - truth[1]
    elsewhere, near = torch.zeros(1, 128, 128), torch.zeros(1, 128, 128)
    elsewhere[:, 80:, 80:], near[:, 30:60, 30:60] = 1, 1
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    for foreground, guided in ((elsewhere, False), (near, True)):
        shown = [Shown(image, foreground, (32, 32))]
        network, facts = fit_shown(shown, [truth], left=lambda: 1.0, steps=1)
        assert (facts["found"] >= FOUND) is guided and facts["steps"] == 1 + guided
        head = LearnedHead(inferer, network, {"object": 1}, facts)
        head.save(tmp_path / "head")
        again = LearnedHead.load(tmp_path / "head", inferer)
        assert (again.network.guided is not None) is guided and again.found == head.found
        assert np.array_equal(again.probabilities(shown[0]), head.probabilities(shown[0]))
        # The second network, here alone, sees the image alone.
        inside_out = replace(shown[0], foreground=1 - foreground)
        assert guided or np.array_equal(head.probabilities(inside_out), head.probabilities(shown[0]))
        # It is gone on with as it is.
        on, _ = fit_shown(shown, [truth], left=lambda: 1.0, steps=1, start=again)
        assert (on.guided is not None) is guided


class Says(torch.nn.Module):
    """Sure of a mask (S, S), whatever it is shown."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        turned = [self.mask.flip(axes) for axes in MIRRORS]
        return torch.stack([torch.stack([-5.0 * m, 5.0 * m - 2.5]) for m in turned])


@pytest.mark.parametrize(
    ("found", "classes", "aside", "taken"),
    [(0.9, 2, 12, True), (0.9, 2, 1, False), (0.55, 2, 12, False), (0.9, 3, 12, False)],
)
def test_where_the_networks_contradict_each_other_a_foreground_that_was_good_is_the_answer(
    found, classes, aside, taken
):
    one, foreground = torch.zeros(32, 32), torch.zeros(1, 32, 32)
    one[4:20, 4:20], foreground[:, 6:24, 6:24] = 1, 1
    shares = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    if classes == 3:
        shares = torch.cat([shares, torch.full((2, 1), 1e-3)], 1)
    network = FewShotNet(shares, found).eval()
    # The guided network begins at the shares; what the two say is laid in its place.
    network.guided, network.plain = Says(one), Says(one.roll(aside, 0))
    network.prior = torch.zeros_like(network.prior)
    if classes == 3:
        for part in (network.guided, network.plain):
            part.register_forward_hook(lambda module, args, out: torch.cat([out, torch.full_like(out[:, :1], -9)], 1))
    said = network.probabilities(torch.rand(3, 32, 32), foreground)
    torch.testing.assert_close(said.sum(0), torch.ones(32, 32))
    assert torch.equal(said.argmax(0) > 0, foreground[0] > 0) is taken


def test_a_foreground_taken_as_the_answer_is_as_sure_as_it_was_right():
    network = FewShotNet(torch.tensor([[0.9, 0.1], [0.55, 0.45]]), 0.9)
    said = network._as_found(torch.tensor([[[0.0, 1.0]]]))[1, 0]
    torch.testing.assert_close(said, torch.tensor([0.1, 0.51]))


def test_a_network_that_finds_hardly_any_of_a_label_is_not_asked_about_it():
    def network(*areas: int) -> torch.Tensor:
        """Surely so many of ten pixels, in two bands side by side."""
        shares = torch.zeros(3, 10, 2)
        for k, area in enumerate(areas):
            shares[k + 1, :area, k] = 0.9
        shares[0] = 1 - shares[1:].sum(0)
        return shares

    full, little, half = network(9, 9), network(9, 2), network(4, 9)
    for one, other in ((full, little), (little, full)):
        found = joined(one, other)
        torch.testing.assert_close(found, full)
    # Of what both find, the mean.
    found = joined(full, half)
    torch.testing.assert_close(found, (full + half) / 2)
    torch.testing.assert_close(joined(network(0, 0), network(0, 0)), network(0, 0))
    crowded = joined(torch.tensor([[[0.1]], [[0.9]], [[0.0]]]), torch.tensor([[[0.1]], [[0.0]], [[0.9]]]))
    torch.testing.assert_close(crowded.flatten(), torch.tensor([0.0, 0.5, 0.5]))


def test_components_have_a_deviation_of_one(inferer):
    readings = [read_encoded(inferer, inferer.encode(scene(seed)[0])) for seed in (0, 1)]
    components = find_components(readings, 4)
    maps = torch.stack([components(r) for r in readings])
    torch.testing.assert_close(maps.std((0, 2, 3)), torch.ones(4), atol=0.15, rtol=0)


def test_an_exemplar_needs_no_fitting(embedded_backbone):
    inferer = AttentionSegmentationInferer(embedded_backbone, resolution=128)
    image, label = scene(0)
    exemplar = Exemplar(Case(image, label), inferer, LABELS)
    other, truth = scene(3)
    found = exemplar.predict(other)
    for value in (1, 3):
        mask = found.label_map == value
        assert 2 * np.count_nonzero(mask & (truth == value)) / (mask.sum() + (truth == value).sum()) > 0.5
    assert exemplar.describe() == {"labels": LABELS}
    with pytest.raises(ZeroSegError, match="empty"):
        Exemplar(Case(image, 0 * label), inferer, LABELS)


def test_the_folder_of_a_head_names_no_folder_of_this_machine(head, tmp_path):
    head.save(tmp_path)
    assert (
        str(Path.home()) not in (tmp_path / "config.json").read_text()
        and str(tmp_path) not in (tmp_path / "config.json").read_text()
    )
