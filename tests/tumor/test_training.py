"""Training of the embedded 3-D model: adapters by the bundle's config, backbone by its script, each in a few steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image
from torch.utils.data import DataLoader

import train_tumor_backbone
from phantoms3d import HELD_OUT, write_volumes
from tumor_model import save_tiny_model
from zeroseg.backbones.maisi import MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import MODELS, verify_sums
from zeroseg.errors import ZeroSegError
from zeroseg.tumor import AovaAdapters, TumorSegmentationInferer
from zeroseg.tumor.adapters import ROLES
from zeroseg.tumor.aova import load_adapters
from zeroseg.tumor.prompts import ORGANS
from zeroseg.tumor.training import (
    AdapterTrainer,
    Questions,
    Sampling,
    Schedule,
    TrainingCase,
    cropped,
    gather_cases,
    read_cases,
    refuse_held_out,
    volume_terms,
)
from zeroseg.tumor.training.cases import phantoms_and_real
from zeroseg.tumor.training.fusion import FusionFitter
from zeroseg.tumor.training.samples import CaseReader, as_picture, augmented, beside
from zeroseg.tumor.training.trainer import IDENTITY, Steps

CONFIG = MODELS.parent / "configs" / "train_tumor.yaml"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Six phantoms, and the same volumes again as a folder of "real" MR without facts."""
    root = tmp_path_factory.mktemp("material")
    write_volumes(root / "phantoms", 6, first_seed=20, largest=24)
    write_volumes(root / "mr", 2, first_seed=60, largest=24, lesion=True, modality="mr", scene="limb")
    (root / "mr" / "cases.json").unlink()
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def trainer(model, material, out, leave_out=None, steps=3, volume_steps=2, initial=None):
    real = [{"folder": material / "mr", "organ": "limb", "modality": "mr"}]
    return AdapterTrainer(
        MaisiBackbone(model, device="cpu"),
        TextEncoder(model / "text", device="cpu"),
        gather_cases(material / "phantoms", real, leave_out=leave_out),
        out=out,
        work=out / "work",
        schedule=Schedule(steps=steps, volume_steps=volume_steps, volumes=2, batch=1, save_every=2),
        sampling=Sampling(voxels=64, variants=2, crop=16),
        adapters={"hidden": 2, "context": [[], [3], [3]]},
        initial=initial,
        fusion_volumes=0,
    )


@pytest.mark.slow
def test_the_config_trains_and_the_result_segments(model, material, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(model, out)
    parser = ConfigParser()
    parser.read_config(CONFIG)
    real = [{"folder": str(material / "mr"), "organ": "limb", "modality": "mr"}]
    parser.update(
        {"phantoms": str(material / "phantoms"), "real": real, "out": str(out), "work": str(tmp_path / "work")}
    )
    parser.update(
        {"backbone": str(model), "text_encoder": str(model / "text"), "device": "cpu", "steps": 3, "crop": 16}
    )
    parser.update(
        {
            "beside": str(model),
            "variants": 1,
            "fusion_volumes": 2,
            "volume_steps": 1,
            "dtype": "fp32",
            "initial": str(model),
        }
    )
    parser.get_parsed_content("run")
    verify_sums(out)
    config = json.loads((out / "config.json").read_text())
    assert config["fusion"] and set(config["fusion"]) <= {"ct", "mr", "pet"}
    assert all(set(weights) >= {"aova", "aova+feature+pixel"} for weights in config["fusion"].values())
    record = json.loads((out / "training.json").read_text())["adapters"]
    assert record["steps"] == {"voxels": 3, "volumes": 1} and record["phantoms"] == 6 and len(record["real"]) == 2
    assert record["held_out"]["kinds"] == list(HELD_OUT)
    inferer = TumorSegmentationInferer(MaisiBackbone(out, device="cpu"), TextEncoder(out / "text"), out, steps=2)
    volume = torch.rand(1, 20, 20, 20) * 400
    assert inferer.segment(volume, np.diag([3, 3, 3, 1]), "mr", "limb").labels.shape == (20, 20, 20)


def test_what_answers_beside_others_is_fitted_with_them(model, material, tmp_path):
    run = trainer(model, material, tmp_path, initial=model)
    found = []
    for other in (None, load_adapters(model)):
        inferer = FusionFitter(run.reader, run.encoder, load_adapters(model), run.cases, 2, beside=other).inferer
        values, affine, _ = run.cases[0].load()
        encoded = inferer.encode(values, affine, run.cases[0].modality)
        found.append(inferer.maps(encoded, run.cases[0].organ, stages=("aova",)).aova.margin)
    torch.testing.assert_close(found[1], 2 * found[0])


def test_what_cannot_be_trained_ends_the_config_in_one_line(model, tmp_path, capsys):
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({"folder": str(tmp_path / "none"), "out": str(tmp_path), "work": str(tmp_path / "work")})
    parser.update({"backbone": str(model), "text_encoder": str(model / "text"), "device": "cpu"})
    with pytest.raises(SystemExit) as end:
        parser.get_parsed_content("run")
    assert end.value.code == 2
    assert (
        capsys.readouterr().err
        == f"zeroseg: {tmp_path}/none holds no images/*.nii.gz: give a folder with images and masks\n"
    )


def test_steps_change_the_adapters_and_a_seed_fixes_them(model, material, tmp_path):
    runs = [trainer(model, material, tmp_path / name) for name in ("a", "b")]
    before = {k: v.clone() for k, v in runs[0].adapters.state_dict().items()}
    for run in runs:
        run.run()
    first, second = (run.adapters.state_dict() for run in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    changed = {k for k in first if not torch.equal(first[k], before[k])}
    assert {"log_temperature", "bias", "stages.0.center", "stages.2.adapt.0.weight"} <= changed


@pytest.mark.slow
def test_a_run_resumes_where_it_stopped(model, material, tmp_path):
    whole = trainer(model, material, tmp_path / "whole")
    whole.run()

    class Stop(Exception):
        pass

    part = trainer(model, material, tmp_path / "part")
    terms = part._voxel_step
    calls = []

    def stop_in_the_third_step(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise Stop
        return terms(*arguments)

    part._voxel_step = stop_in_the_third_step
    with pytest.raises(Stop):
        part.run()
    again = trainer(model, material, tmp_path / "part")
    again.run()
    expected = whole.adapters.state_dict()
    assert all(torch.allclose(v, expected[k], atol=1e-6) for k, v in again.adapters.state_dict().items())


@pytest.fixture(scope="module")
def begun(model, material, tmp_path_factory):
    """A training of one step, and what makes the same one anew, or another."""
    folder = tmp_path_factory.mktemp("begun")

    def make(cases=None, work="work", steps=1, **other):
        options = {"adapters": {"hidden": 2, "context": [[], [3], [3]]}, "fusion_volumes": 0, **other}
        return AdapterTrainer(
            MaisiBackbone(model, device="cpu"),
            TextEncoder(model / "text", device="cpu"),
            gather_cases(real=[{"folder": material / "mr", "organ": "limb", "modality": "mr"}])
            if cases is None
            else cases,
            out=folder / "out",
            work=folder / work,
            schedule=Schedule(steps=steps, volumes=2),
            sampling=Sampling(voxels=32, variants=1, crop=16),
            **options,
        )

    make().train()
    return make


@pytest.mark.parametrize("what", ["cases", "organ", "adapters", "seed", "initial"])
def test_a_work_folder_of_another_training_is_not_resumed(begun, model, material, tmp_path, what):
    shutil.copytree(material / "mr", tmp_path / "mr")
    if what == "cases":
        mask = sorted((tmp_path / "mr" / "masks").iterdir())[0]
        stored = nib.load(mask)
        nib.save(nib.Nifti1Image(np.zeros(stored.shape, np.uint8), stored.affine), mask)
    organ = "brain" if what == "organ" else "limb"
    cases = gather_cases(real=[{"folder": tmp_path / "mr", "organ": organ, "modality": "mr"}])
    other = {"adapters": {"hidden": 3}, "seed": 1, "initial": model}
    run = begun(cases, steps=2, **{what: other[what]} if what in other else {})
    names = {"organ": "cases, organ", "initial": "adapters, initial"}.get(what, what)
    with pytest.raises(ZeroSegError, match=rf"differs in {names}: give another folder as work .* or remove it$"):
        run.train()


def test_the_same_cases_elsewhere_and_in_another_order_go_on(begun, material, tmp_path):
    shutil.copytree(material / "mr", tmp_path / "moved")
    cases = gather_cases(real=[{"folder": tmp_path / "moved", "organ": "limb", "modality": "mr"}])
    cases.cases.reverse()
    begun(work="second").train()
    run = begun(cases, work="second", steps=2)
    run.train()
    saved = torch.load(run.work / "adapters.pt", weights_only=True)
    assert saved["state"]["voxels"] == 2


def test_a_work_folder_of_before_goes_on(begun):
    run = begun(work="third")
    run.train()
    (run.work / IDENTITY).unlink()
    begun(work="third", seed=1, steps=2).train()
    (run.work / IDENTITY).write_text("{")
    with pytest.raises(ZeroSegError, match="damaged"):
        begun(work="third", steps=3).train()


def test_what_trains_nothing_leaves_work_alone(begun):
    run = begun(work="fourth", steps=0)
    run.train()
    assert not run.work.exists()


def test_left_out_cases_are_measured_and_not_trained_on(model, material, tmp_path):
    run = trainer(model, material, tmp_path, leave_out=[1, 2], steps=1, volume_steps=1)
    (left,) = run.sets.left_out
    assert left not in run.sets.cases and left not in run.sets.fusion
    record = run.run()
    assert left.stem not in record["adapters"]["real"] and left.stem not in record["fusion"]["real"]
    assert record["fusion"]["left_out_dice"].keys() == {left.stem}
    assert 0 <= record["fusion"]["left_out_dice"][left.stem] <= 1


def test_another_process_reads_the_same(model, material, tmp_path):
    run = trainer(model, material, tmp_path, steps=0)
    steps = Steps(run, phantoms_and_real(run.cases), first=3, last=5)
    beside = DataLoader(steps, batch_size=None, num_workers=1)
    for alone, others in zip([steps[0], steps[1]], beside, strict=True):
        for one, other in zip(alone, others, strict=True):
            assert torch.equal(one.target, other.target) and one.case == other.case
            for a, b in zip(one.features, other.features, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    run.reader.sampling = replace(run.reader.sampling, readers=1)
    before = {k: v.clone() for k, v in run.adapters.state_dict().items()}
    run.train()
    assert any(not torch.equal(v, before[k]) for k, v in run.adapters.state_dict().items())


@pytest.mark.parametrize("modality", ["ct", "mr", "pet"])
def test_a_reading_stays_in_its_range_and_one_mr_in_four_looks_like_another_sequence(modality):
    volume = torch.linspace(0, 1, 8**3).reshape(1, 1, 8, 8, 8)
    target = volume[0, 0] > 0.9
    falling = 0
    for seed in range(40):
        changed, moved = augmented(volume, target, np.random.default_rng(seed), modality)
        assert changed.shape == volume.shape and moved.sum() == target.sum() and changed.dtype == torch.float32
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1
        inside, outside = changed[0, 0][moved].mean(), changed[0, 0][~moved].mean()
        falling += bool(inside < outside)
    assert falling > 0 if modality == "mr" else falling == 0


def test_a_unet_trains_on_whole_volumes_with_grown_lesions(model, material, tmp_path):
    run = AdapterTrainer(
        MaisiBackbone(model, device="cpu"),
        TextEncoder(model / "text", device="cpu"),
        gather_cases(real=[{"folder": material / "mr", "organ": "brain", "modality": "mr", "weight": 2.0}]),
        out=tmp_path,
        work=tmp_path / "work",
        schedule=Schedule(steps=0, volume_steps=3, batch=1, minutes=5),
        sampling=Sampling(crop=16, grown=1.0, scales=(0.6, 1.2), recoloured=0.5, healthy_part=0.5, pictures=0.5),
        adapters={"deeper": [8, 8]},
        fusion_volumes=0,
    )
    before = {k: v.clone() for k, v in run.adapters.state_dict().items()}
    record = run.run()["adapters"]
    assert record["grown"] == 1.0 and record["steps"] == {"voxels": 0, "volumes": 3}
    trained = load_adapters(tmp_path)
    assert trained.options["deeper"] == [8, 8]
    moved = [k for k, v in trained.state_dict().items() if not torch.equal(v, before[k].half().float())]
    assert any(k.startswith("surroundings.") for k in moved)


@pytest.mark.parametrize("pictures", [0.0, 1.0], ids=["volumes", "pictures"])
def test_a_step_sees_volumes_of_one_shape(model, material, tmp_path, pictures):
    slab = nib.Nifti1Image(np.random.default_rng(0).random((70, 90, 1), np.float32), np.diag([2.0, 2, 2, 1]))
    for part in ("images", "masks"):
        (tmp_path / "slices" / part).mkdir(parents=True)
        nib.save(slab, tmp_path / "slices" / part / "a.nii.gz")
    cases = [read_cases(material / "phantoms")[0], *read_cases(tmp_path / "slices", "brain", "mr")]
    reader = CaseReader(MaisiBackbone(model, device="cpu").load(), Sampling(crop=16, pictures=pictures))
    thin = reader.backbone.size_multiple
    for seed in range(6):
        read = reader.read_together(cases[:: 1 if seed % 2 else -1], np.random.default_rng(seed))
        shapes = {tuple(example.target.shape) for example in read}
        assert len(shapes) == 1 and sorted(*shapes) == [thin, 16, 16] and (not pictures or shapes == {(16, 16, thin)})
        assert all(example.features[0].shape[2:] == example.target.shape for example in read)
        # A slice is as deep as it is shown, and so is what is marked on it.
        flat = next(example for example in read if example.case.organ == "brain").target
        axis = flat.shape.index(thin)
        assert (flat == flat.narrow(axis, 0, 1)).all()


def test_training_starts_from_given_adapters(model, material, tmp_path):
    run = trainer(model, material, tmp_path, initial=model, steps=0, volume_steps=0)
    run.run()
    assert load_adapters(tmp_path).options == load_adapters(model).options
    assert torch.allclose(load_adapters(tmp_path).bias, load_adapters(model).bias, atol=1e-2)


@pytest.mark.parametrize("what", ["kinds", "modalities", "folders"])
def test_what_is_held_out_is_refused(material, what, tmp_path):
    write_volumes(tmp_path / "unseen", 1, kinds=HELD_OUT, lesion=True, largest=24)
    cases = {
        "kinds": read_cases(tmp_path / "unseen"),
        "modalities": read_cases(material / "mr", "limb", "ct"),
        "folders": read_cases(material / "mr", "limb", "mr"),
    }[what]
    refuse_held_out(read_cases(material / "phantoms"), {"kinds": HELD_OUT, "modalities": ["ct"], "folders": ["mr"]})
    with pytest.raises(ZeroSegError, match=r"held-out|held out"):
        refuse_held_out(cases, {what: {"kinds": HELD_OUT, "modalities": ["ct"], "folders": ["mr"]}[what]})


def test_folders_that_cannot_be_used_are_refused(material, tmp_path):
    with pytest.raises(ZeroSegError, match="no images"):
        read_cases(tmp_path)
    with pytest.raises(ZeroSegError, match="give organ and modality"):
        read_cases(material / "mr")
    (tmp_path / "images").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "images" / "a.nii.gz")
    with pytest.raises(ZeroSegError, match=r"masks/a.nii.gz is missing"):
        read_cases(tmp_path, "limb", "mr")


@pytest.mark.parametrize("what", ["shape", "affine", "picture", "truncated"])
def test_masks_that_do_not_lie_on_their_volume_are_refused(material, tmp_path, what):
    shutil.copytree(material / "mr", tmp_path / "mr")
    good = read_cases(tmp_path / "mr", "limb", "mr")[0]
    stored = nib.load(good.mask)
    values = np.asarray(stored.dataobj)
    message = {"shape": "has the shape", "affine": "another orientation"}.get(what, "cannot be read")
    if what == "shape":
        nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.uint8), stored.affine), good.mask)
    elif what == "affine":
        mirrored = stored.affine @ np.diag([-1, 1, 1, 1])
        mirrored[:3, 3] += stored.affine[:3, 0] * (len(values) - 1)
        nib.save(nib.Nifti1Image(np.ascontiguousarray(values[::-1]), mirrored), good.mask)
    elif what == "picture":
        Image.new("L", (8, 8)).save(good.mask.with_suffix(".png"))
        good.mask.with_suffix(".png").replace(good.mask)
    else:
        good.mask.write_bytes(good.mask.read_bytes()[:-40])
    with pytest.raises(ZeroSegError, match=message) as refused:
        good.load()
    assert good.stem in str(refused.value) and "\n" not in str(refused.value)
    if what != "truncated":
        # Before anything is trained: headers are looked at first.
        with pytest.raises(ZeroSegError, match=message):
            read_cases(tmp_path / "mr", "limb", "mr")


def test_questions_that_do_not_fit_are_marked(model, tmp_path):
    questions = Questions(TextEncoder(model / "text", device="cpu"))
    case = TrainingCase(tmp_path / "x.nii.gz", tmp_path / "x.nii.gz", "liver", "ct")
    drawn = [questions.draw(np.random.default_rng(i), case) for i in range(300)]
    fitting = [(organ, tumor) for organ, tumor, fits in drawn if fits]
    assert 0.5 < len(fitting) / len(drawn) < 0.8
    assert {organ for organ, _ in fitting} == {"liver", "body"}
    others = {organ for organ, tumor, fits in drawn if not fits and organ in ORGANS and tumor in ORGANS[organ]}
    assert {"brain", "lung", "limb"} <= others and not others & {"liver", "kidney", "abdomen", "body"}
    nonsense = [tumor for organ, tumor, fits in drawn if not fits and tumor not in ORGANS.get(organ, ())]
    assert nonsense and all(questions.encoder.unknown_words(tumor) == tumor.split() for tumor in nonsense)


def test_losses_reward_the_right_answer():
    torch.manual_seed(0)
    adapters = AovaAdapters((4, 4, 4), 8, context=((), (), ()))
    features = [torch.randn(1, 4, 8 // 2**level, 8 // 2**level, 8 // 2**level) for level in range(3)]
    prompts = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    output = adapters(features, prompts, ROLES)
    target = torch.zeros(8, 8, 8, dtype=torch.bool)
    target[2:5, 2:5, 2:5] = True
    output.margin = torch.where(target, 8.0, -8.0)
    output.image_logit = torch.tensor(8.0)
    right = volume_terms(output, prompts, ROLES, target)
    absent = volume_terms(output, prompts, ROLES, torch.zeros_like(target))
    output.margin = -output.margin
    wrong = volume_terms(output, prompts, ROLES, target)
    assert right["dice"] < 0.05 < 0.9 < wrong["dice"] and right["voxel"] < 0.01 < wrong["voxel"]
    assert right["image"] < 0.01 < absent["image"] and absent["dice"] == 0
    output.pooled = prompts.clone()
    aligned = volume_terms(output, prompts, ROLES, target)["align"]
    output.pooled = prompts.roll(1, 0)
    assert aligned < volume_terms(output, prompts, ROLES, target)["align"]


def test_a_picture_is_one_slice_of_the_lesion_in_some_window():
    volume = torch.linspace(0, 1, 8).repeat(1, 1, 8, 6, 1).clone()
    target = torch.zeros(8, 6, 8, dtype=torch.bool)
    target[2:4, 1:3, 5] = True
    shown, mask = as_picture(volume, target, np.random.default_rng(0), "mr", 4)
    assert shown.shape == (1, 1, 8, 6, 4) and torch.equal(shown, volume[..., 5:6].expand_as(shown))
    assert torch.equal(mask, target[..., 5:6].expand(8, 6, 4))
    healthy, none = as_picture(volume, torch.zeros_like(target), np.random.default_rng(0), "ct", 4)
    assert healthy.std() == 0 and not none.any()
    grey = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8, 1)
    seen = [as_picture(grey, torch.zeros(8, 8, 1), np.random.default_rng(seed), "ct", 1)[0] for seed in range(20)]
    assert any((one == 0).sum() > 8 for one in seen) and all(one.min() >= 0 and one.max() <= 1 for one in seen)


def test_what_lies_beside_a_lesion_is_a_healthy_part_of_whole_windows():
    target = torch.zeros(48, 32, 64, dtype=torch.bool)
    target[20:30, :, 40:50] = True
    found = [beside(target, np.random.default_rng(seed), 16) for seed in range(40)]
    everything = slice(None)
    for place in (
        (slice(0, 16), everything, everything),
        (slice(32, 48), everything, everything),
        (everything, everything, slice(0, 32)),
    ):
        assert place in found and not target[place].any()
        found = [other for other in found if other != place]
    assert not found
    assert beside(torch.ones(16, 16, 16, dtype=torch.bool), np.random.default_rng(0), 16) is None


def test_recoloured_volumes_keep_their_range_and_lose_their_order():
    volume = torch.linspace(0, 1, 4096).reshape(1, 1, 16, 16, 16)
    target = torch.zeros(16, 16, 16, dtype=torch.bool)
    turned = 0
    for seed in range(20):
        changed, _ = augmented(volume, target, np.random.default_rng(seed), "ct", recoloured=1.0)
        plain, _ = augmented(volume, target, np.random.default_rng(seed), "ct")
        assert changed.min() >= 0 and changed.max() <= 1
        turned += np.corrcoef(changed.sort().values.flatten(), plain.sort().values.flatten())[0, 1] < 0.9
    assert turned > 5


def test_a_crop_holds_some_of_the_lesion():
    volume = torch.arange(40.0**3).reshape(1, 1, 40, 40, 40)
    target = torch.zeros(40, 40, 40, dtype=torch.bool)
    target[36:39, 1:3, 20:24] = True
    for seed in range(10):
        piece, part = cropped(volume, target, np.random.default_rng(seed), [16, 16, 16])
        assert piece.shape == (1, 1, 16, 16, 16) and part.shape == (16, 16, 16) and part.any()
        assert set(piece[0, 0][part].tolist()) <= set(volume[0, 0][target].tolist())


@pytest.mark.slow
def test_the_backbone_script_trains_resumes_and_exports(material, tmp_path):
    real = f"mr={material / 'mr' / 'images'}"
    arguments = ["--real", real, "--phantoms", "4", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments += ["--vae-steps", "1", "--vae-side", "16", "--text-steps", "2", "--device", "cpu", "--unet-batch", "1"]
    arguments += ["--decoder-steps", "1", "--decoder-side", "16"]
    train_tumor_backbone.main([*arguments, "--unet-steps", "0"])
    train_tumor_backbone.main([*arguments, "--unet-steps", "1"])
    verify_sums(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "training.json").read_text())["backbone"]
    assert summary["steps"] == {"vae": 1, "text": 2, "unet": 1, "decoder": 1} and summary["volumes"] == {
        "phantoms": 4,
        "real": 2,
    }
    assert len(summary["commands"]) == 2 and all("mr=FOLDER" in c and str(tmp_path) not in c.split("--work")[0] for c in summary["commands"])  # fmt: skip
    backbone = MaisiBackbone(tmp_path / "out", device="cpu").load()
    assert backbone.scale_factor != 1 and backbone.encode(torch.rand(1, 1, 16, 16, 16)).shape == (1, 4, 4, 4, 4)
    encoder = TextEncoder(tmp_path / "out" / "text", device="cpu")
    assert encoder.unknown_words("glorp liver tumour") == ["glorp"]
    with pytest.raises(SystemExit, match="holds NIfTI"):
        train_tumor_backbone.main([*arguments, "--real", f"mr={tmp_path}"])
