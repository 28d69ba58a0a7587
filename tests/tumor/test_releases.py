"""The tumour method on MAISI's own files, built small: conditions, steps, field of view, and adapters trained by one command."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from scipy import ndimage

from published import save_release
from zeroseg.backbones.maisi import RELEASES, MaisiBackbone
from zeroseg.backbones.text_encoder import TextEncoder
from zeroseg.backbones.weights import MODELS
from zeroseg.errors import ZeroSegError
from zeroseg.tumor import AovaAdapters, TumorSegmentationInferer, inpainting
from zeroseg.tumor.aova import load_adapters
from zeroseg.tumor.prepare import prepare

SMALL = {
    "autoencoder": {"num_channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "norm_num_groups": 2},
    "unet": {
        "num_channels": [8, 16],
        "attention_levels": [False, True],
        "num_head_channels": [0, 8],
        "norm_num_groups": 4,
        "num_res_blocks": 1,
    },
    "spacing": [3.0, 3.0, 3.0],
    "window": [16, 16, 16],
}
AFFINE = np.diag([3.0, 3, 3, 1])


@pytest.fixture(scope="module", params=list(RELEASES))
def release(request, tmp_path_factory):
    return request.param, save_release(tmp_path_factory.mktemp(request.param), request.param, SMALL)


def backbone_of(release, **options) -> MaisiBackbone:
    files = {"autoencoder": release.autoencoder_file, "unet": release.unet_file}
    return MaisiBackbone(**files, overrides=SMALL, device="cpu", **options)


@pytest.fixture
def make(tiny_tumor_model):
    """An inferer on a release, whose untrained adapters suspect everything."""

    def build(release, **options) -> TumorSegmentationInferer:
        encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")
        adapters = AovaAdapters((4, 8, 8), encoder.dim, hidden=2, context=((), (3,), (3,)))
        torch.nn.init.constant_(adapters.bias, 1.0)
        settings = {"presence": 0, "steps": 2, "threshold": 0.4, **options}
        return TumorSegmentationInferer(backbone_of(release), encoder, adapters, **settings)

    return build


def scan(modality: str, shape=(24, 20, 18)) -> np.ndarray:
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(shape), 2)
    return ((values * 2000 - 200) if modality == "ct" else values - values.min() + 1)[None].astype(np.float32)


def test_the_unet_sees_the_whole_latent_under_the_conditions_it_was_trained_on(release, make, monkeypatch):
    kind, files = release
    modality = "ct" if kind.endswith("ct") else "mr"
    seen = []
    original = MaisiBackbone.predict

    def look(self, latent, timestep, spacing, condition, *others):
        seen.append((tuple(latent.shape[2:]), condition))
        return original(self, latent, timestep, spacing, condition, *others)

    monkeypatch.setattr(MaisiBackbone, "predict", look)
    inferer = make(files, contrast="t1" if modality == "mr" else None)
    result = inferer.segment(scan(modality), affine=AFFINE, modality=modality)
    whole = tuple(n // 4 for n in result.details["working_shape"])
    assert max(whole) > 16 // 4, "a window would be smaller"
    assert set(seen) == {(whole, "ct" if modality == "ct" else "mr_t1")}
    assert result.details["steps"] == 2
    usual = 1000 if kind == "ddpm-ct" else 30
    assert any(f"{usual} steps, and 2 were asked for" in note for note in result.notes)
    assert any("the field of view is" in note for note in result.notes)


def test_steps_are_the_release_s_unless_said(release, make, monkeypatch):
    kind, files = release
    inferer = make(files, steps=None)
    asked = []
    monkeypatch.setattr("zeroseg.tumor.inferer.pseudo_healthy", lambda *a: asked.append(a[6]) or a[1].clone())
    result = inferer.segment(scan("ct"), affine=AFFINE, modality="ct")
    usual = 1000 if kind == "ddpm-ct" else 30
    assert asked == [usual] and result.details["steps"] == usual
    assert not any("were asked for" in note for note in result.notes)


def test_a_modality_the_release_does_not_know_is_said(release, make):
    kind, files = release
    for modality in ("pet", "mr" if kind.endswith("ct") else "ct"):
        result = make(files).segment(np.abs(scan(modality)), affine=AFFINE, modality=modality)
        assert any(f"was not trained on {modality}" in note for note in result.notes), modality


def test_contrasts(release, make):
    kind, files = release
    if kind.endswith("ct"):
        with pytest.raises(ZeroSegError, match="unknown contrast 't1': this backbone knows none"):
            make(files, contrast="t1").check()
        return
    with pytest.raises(ZeroSegError, match="unknown contrast 't9': use one of t1, t2, flair"):
        make(files, contrast="t9").check()
    result = make(files).segment(scan("mr"), affine=AFFINE, modality="mr")
    assert any("the contrast is not given" in note for note in result.notes)


def test_mr_is_not_cut_at_1(release):
    _, files = release
    values = scan("mr")
    values[0, 5, 5, 5] = 50
    backbone = backbone_of(files).load()
    shared = {"affine": AFFINE, "modality": "mr", "spacing": backbone.spacing, "multiple": backbone.size_multiple}
    prepared = prepare(values, **shared, mr_clip=backbone.mr_clip)
    assert prepared.volume.max() > 2 and prepare(values, **shared).volume.max() == 1
    restored = prepared.intensity.to_values(prepared.to_input(prepared.volume[0, 0]))
    np.testing.assert_allclose(restored, values[0], rtol=1e-3, atol=1e-3)
    assert prepare(scan("ct"), **{**shared, "modality": "ct"}, mr_clip=False).volume.max() <= 1, "CT is"


def test_a_compact_model_still_gets_a_part(tiny_maisi):
    seen = []
    latent = torch.randn(1, 4, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(32, 8, 8, dtype=torch.bool)
    mask[4, 4, 4] = True
    whole = {"steps": 1, "strength": 1.0}

    class Looking:
        def __getattr__(self, name):
            return getattr(tiny_maisi, name)

        def predict(self, z, *rest):
            seen.append(tuple(z.shape[2:]))
            return tiny_maisi.predict(z, *rest)

    inpainting.pseudo_healthy(Looking(), latent, mask, (3, 3, 3), "ct", **whole)
    assert seen[0][0] < 32


def test_adapters_for_a_release_by_one_command(tmp_path, tiny_tumor_model):
    files = save_release(tmp_path / "files", "rflow-ct", {**SMALL, "spacing": [1.5, 1.5, 2.0]})
    for number in range(3):
        lesion = np.zeros((24, 24, 24), np.uint8)
        lesion[8:14, 8:14, 8 + number : 14] = 1
        values = scan("ct", (24, 24, 24))[0] + 500 * lesion
        for name, array in (("images", values.astype(np.float32)), ("masks", lesion)):
            (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "own" / name / f"case{number}.nii.gz")
    parser = ConfigParser()
    parser.read_config(MODELS.parent / "configs" / "train_tumor.yaml")
    parser.update(
        {
            "bundle_root": str(tmp_path),
            "autoencoder": str(files.autoencoder_file),
            "unet": str(files.unet_file),
            "folder": str(tmp_path / "own"),
            "organ": "liver",
            "out": str(tmp_path / "out"),
            "work": str(tmp_path / "work"),
            "overrides": {k: v for k, v in SMALL.items() if k != "spacing"},
            "text_encoder": str(tiny_tumor_model / "text"),
            "device": "cpu",
            "dtype": "fp32",
            "steps": 2,
            "volumes": 2,
            "voxels": 32,
            "variants": 1,
            "crop": 16,
            "fusion_volumes": 0,
            "adapters": {"hidden": 2, "context": [[], [3], [3]]},
        }
    )
    parser.get_parsed_content("run")
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu").load()
    adapters = load_adapters(tmp_path / "out", encoder.dim)
    assert adapters.options["channels"] == [4, 8, 8] and adapters.options["top_ml"] == pytest.approx(0.54)
    inferer = TumorSegmentationInferer(
        backbone_of(files), encoder, tmp_path / "out", steps=1, presence=0, organ="liver"
    )
    assert inferer.segment(scan("ct"), affine=AFFINE, modality="ct").labels.shape == (24, 20, 18)


# Stages of weight 0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel", "feature", "ran"),
    [
        (0.0, 0.0, ["aova"]),
        (0.5, 0.0, ["aova", "inpaint", "pixel"]),
        (0.0, 0.5, ["aova", "inpaint", "feature"]),
        (0.5, 0.5, ["aova", "inpaint", "pixel", "feature"]),
    ],
)
def test_stages_whose_learned_weight_is_0_do_not_run(tmp_path, tiny_tumor_model, tiny_maisi, pixel, feature, ran):
    encoder = TextEncoder(tiny_tumor_model / "text", device="cpu")
    adapters = load_adapters(tiny_tumor_model)
    adapters.fusion = {"ct": {"aova+feature+pixel": {"bias": 0.1, "aova": 1.0, "pixel": pixel, "feature": feature}}}
    settings = {"presence": 0, "steps": 2, "min_volume_ml": 0}
    inferer = TumorSegmentationInferer(tiny_maisi, encoder, adapters, **settings)
    result = inferer.segment(scan("ct"), affine=AFFINE, modality="ct")
    assert result.details["stages"] == ran
    assert {"inpaint", "pixel", "feature"} & set(result.seconds) == set(ran) - {"aova"}
    assert ("healthy" in result.evidence) is ("inpaint" in ran)
    everything = TumorSegmentationInferer(tiny_maisi, encoder, adapters, all_evidence=True, **settings)
    whole = everything.segment(scan("ct"), affine=AFFINE, modality="ct")
    np.testing.assert_array_equal(whole.labels, result.labels)
    assert {"aova", "healthy", "pixel_residual", "feature_residual"} == set(whole.evidence)


def test_the_volume_that_decides_about_the_image_is_in_millilitres():
    adapters = AovaAdapters((4, 8, 8), 16, top_ml=0.54)
    features = [torch.randn(1, c, 16 >> level, 16 >> level, 16 >> level) for level, c in enumerate((4, 8, 8))]
    prompts, roles = torch.eye(16)[:2], ("normal", "abnormal")
    with torch.inference_mode():
        coarse, fine = (adapters(features, prompts, roles, ml) for ml in (0.027, 0.0045))
        head = adapters.image_head(coarse.pooled[1:]).amax()
    for output, count in ((coarse, 20), (fine, 120)):
        expected = output.margin.flatten().topk(count).values.mean() + head
        torch.testing.assert_close(output.image_logit, expected)
