import csv
import json

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from zeroseg.backbones import StableDiffusionBackbone
from zeroseg.cli import main
from zeroseg.evaluation.annotator import any_point, bounding_box, innermost_point
from zeroseg.evaluation.metrics import score
from zeroseg.evaluation.oracles import hungarian, oracle_single, oracle_union
from zeroseg.evaluation.pairs import half_of
from zeroseg.evaluation.protocols import PROTOCOLS, Sample, run_protocols
from zeroseg.evaluation.summaries import best_median_worst, bootstrap_interval, mean_over_sets, summarise_groups
from zeroseg.evaluation.tables import markdown_table, seconds_table
from zeroseg.interaction.inferer import AttentionSegmentationInferer
from zeroseg.regions import largest_component


def rectangle(shape, top, left, bottom, right) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


# Prompts and oracles.


def test_split_is_fixed():
    assert [half_of(stem) for stem in ("001", "002", "003", "ISIC_1000", "10018")] == [
        *("test", "dev", "dev"),
        *("test",) * 2,
    ]
    halves = [half_of(str(k)) for k in range(1000)]
    assert 450 < halves.count("dev") < 550


def test_click_is_the_innermost_point_of_an_l_shape():
    shape = rectangle((40, 50), 4, 5, 34, 12) | rectangle((40, 50), 27, 5, 34, 40)
    inside, outside = np.argwhere(shape), np.argwhere(~shape)
    depth = np.linalg.norm(inside[:, None] - outside[None], axis=-1).min(axis=1)
    x, y = innermost_point(shape)
    assert [y, x] == inside[np.argmax(depth)].tolist()
    assert x < 12 and y >= 27  # in the corner, where the L is thickest
    assert not shape[tuple(inside.mean(axis=0).astype(int))]  # the centroid would miss it


def test_click_ties_go_to_the_first_in_row_major_order_and_the_edge_counts_as_boundary():
    assert innermost_point(rectangle((20, 20), 2, 3, 6, 15)) == (4, 3)
    assert innermost_point(np.ones((9, 9), bool)) == (4, 4)


def test_a_click_anywhere_is_inside_and_the_same_in_every_run():
    shape = rectangle((40, 50), 5, 5, 30, 40)
    points = {any_point(shape, f"case {i}") for i in range(200)}
    assert points == {any_point(shape, f"case {i}") for i in range(200)}
    x, y = np.array(sorted(points)).T
    assert (x.min(), x.max(), y.min(), y.max()) == (6, 38, 6, 28)  # all over it, two pixels from the boundary
    assert any_point(rectangle((9, 9), 4, 0, 5, 9), "thin")[1] == 4


def test_largest_component_is_one_four_connected_part():
    mask = rectangle((12, 12), 0, 0, 3, 3) | rectangle((12, 12), 3, 3, 8, 8) | rectangle((12, 12), 9, 9, 12, 12)
    assert np.array_equal(largest_component(mask), rectangle((12, 12), 3, 3, 8, 8))


def test_box_is_tight_and_never_thinner_than_a_box_may_be():
    assert bounding_box(rectangle((30, 40), 4, 7, 10, 21)) == [7, 4, 20, 9]
    assert bounding_box(rectangle((30, 40), 4, 7, 10, 8)) == [7, 4, 8, 9]
    assert bounding_box(rectangle((30, 40), 29, 39, 30, 40)) == [38, 28, 39, 29]


@pytest.fixture
def segments() -> tuple[np.ndarray, np.ndarray]:
    """Four columns of 10 x 10 pixels labelled 1..4, and a mask over all of 2, six columns of 3 and four of 4's."""
    labels = np.repeat(np.arange(1, 5, dtype=np.uint8), 10)[None].repeat(10, axis=0)
    truth = rectangle(labels.shape, 0, 10, 10, 26)
    truth[:, 30:34] = True
    return labels, truth


def test_oracles_choose_by_their_definition(segments):
    labels, truth = segments
    assert np.array_equal(oracle_union(labels, truth), (labels == 2) | (labels == 3))
    assert np.array_equal(oracle_single(labels, truth), labels == 2)
    assert np.array_equal(hungarian(labels, truth), labels == 2)


def test_oracles_take_many_segments_and_labels_with_gaps():
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    truth = rectangle((8, 8), 0, 0, 4, 4)
    assert np.array_equal(oracle_union(labels, truth), truth & (labels > 0))  # 0 is no segment
    assert oracle_single(labels, truth).sum() == 1


def test_exactly_half_is_not_more_than_half():
    labels = np.ones((4, 4), np.uint8)
    assert not oracle_union(labels, rectangle((4, 4), 0, 0, 2, 4)).any()


def test_hungarian_gives_a_single_segment_to_the_class_it_fits_better():
    labels = np.ones((10, 10), np.uint8)
    assert not hungarian(labels, rectangle((10, 10), 0, 0, 4, 10)).any()
    assert hungarian(labels, rectangle((10, 10), 0, 0, 6, 10)).all()


def test_hungarian_keeps_the_pairing_of_greatest_sum():
    labels = np.array([[1] * 6 + [2] * 4], np.uint8)
    truth = np.array([[True] * 10])
    truth[0, 5] = False  # segment 1 has the better IoU with both classes, and can take one only
    assert np.array_equal(hungarian(labels, truth), labels == 2)


# Numbers.


def test_scores_of_known_masks():
    truth = rectangle((64, 64), 10, 10, 30, 30)
    assert score(truth, truth) == {"dice": 1, "iou": 1, "hd95": 0}
    half = score(rectangle((64, 64), 10, 20, 30, 40), truth)
    assert half["dice"] == pytest.approx(0.5)
    assert half["iou"] == pytest.approx(1 / 3)
    assert half["hd95"] == pytest.approx(10)


def test_hd95_forgives_a_single_stray_pixel():
    truth = rectangle((64, 64), 10, 10, 30, 30)
    stray = truth | rectangle((64, 64), 60, 60, 61, 61)
    assert score(stray, truth)["hd95"] == 0


def test_an_empty_prediction_is_as_far_away_as_the_image_is_long():
    assert score(np.zeros((30, 40), bool), rectangle((30, 40), 0, 0, 5, 5)) == {"dice": 0, "iou": 0, "hd95": 50}


def test_bootstrap_interval_holds_the_mean_and_shrinks_with_the_cases():
    values = np.random.default_rng(1).uniform(size=400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
    assert bootstrap_interval(np.array([0.7])) == [0.7, 0.7]
    few = bootstrap_interval(values[:25])
    assert few[1] - few[0] > 2 * (high - low)


def rows_of(protocol: str, *dice: float) -> list[dict]:
    return [
        {"case": str(k), "protocol": protocol, "dice": d, "iou": d / 2, "hd95": 10 * d, "seconds": 1.0}
        for k, d in enumerate(dice)
    ]


@pytest.fixture
def summary() -> dict:
    rows = (
        rows_of("auto", 0.2, 0.4, 0.9) + rows_of("untrained/auto", 0.1, 0.1, 0.1) + rows_of("baseline/otsu", 0, 0, 0.3)
    )
    for method in ("otsu", "kmeans2"):
        rows += rows_of(f"polarity/{method}_bright", 0.9, 0, 0) + rows_of(f"polarity/{method}_dark", 0.5, 0.5, 0.5)
    return summarise_groups(rows, {"settings": {}, "backbone": {}})


def test_summary_keeps_protocols_baselines_and_control_apart(summary):
    assert set(summary) == {"protocols", "baselines", "settings", "backbone"}
    auto = summary["protocols"]["auto"]
    assert (auto["dice"], auto["iou"], auto["hd95"], auto["n"]) == (pytest.approx(0.5), pytest.approx(0.25), 5, 3)
    assert auto["dice_median"] == 0.4
    assert auto["dice_std"] == pytest.approx(np.std([0.2, 0.4, 0.9]))
    assert summary["baselines"]["untrained"]["auto"]["dice"] == pytest.approx(0.1)
    assert summary["baselines"]["otsu"]["dice"] == pytest.approx(0.1)


def test_best_polarity_is_one_bit_for_the_set_not_one_per_image(summary):
    best = summary["baselines"]["otsu_best_polarity"]
    assert best["polarity"] == "dark" and best["dice"] == 0.5


def test_table_has_a_mean_only_where_every_set_has_a_number(summary):
    other = {"protocols": {"auto": summary["protocols"]["auto"] | {"dice": 0.7}}, "baselines": {}}
    lines = markdown_table({"a": summary, "b": other}).splitlines()
    assert lines[0] == "| Dice | a | b | mean |"
    assert "| auto | 0.500 | 0.700 | 0.600 |" in lines
    assert "| untrained: auto | 0.100 | - | - |" in lines


def test_training_is_worth_the_difference_to_the_control(summary):
    other = json.loads(json.dumps(summary))
    other["baselines"]["untrained"]["auto"]["dice"] = 0.3
    assert "| trained minus untrained: auto | 0.400 | 0.200 | 0.300 |" in markdown_table({"a": summary, "b": other})
    assert mean_over_sets({"a": summary, "b": other})["trained minus untrained: auto"] == pytest.approx(0.3)
    del other["baselines"]["untrained"]
    assert "| trained minus untrained: auto | 0.400 | - | - |" in markdown_table({"a": summary, "b": other})


def test_seconds_stand_by_method_and_the_models_parts(summary):
    summary["protocols"]["auto"] |= {"encode_seconds": 2.0, "prompt_seconds": 0.5}
    lines = seconds_table({"a": summary}).splitlines()
    assert "| auto: encode | 2.000 | 2.000 |" in lines and "| auto: prompt | 0.500 | 0.500 |" in lines
    assert "| baseline: otsu | 1.000 | 1.000 |" in lines


def test_best_median_and_worst_case():
    rows = rows_of("auto", 0.3, 0.9, 0.1, 0.5, 0.7)
    assert [(name, row["case"]) for name, row in best_median_worst(rows)] == [
        ("best", "1"),
        ("median", "3"),
        ("worst", "2"),
    ]
    assert len(best_median_worst(rows[:1])) == 1


# The whole program.


def write_case(folder, stem: str, box: tuple, shape=(48, 64)) -> np.ndarray:
    """A dark rectangle on a bright, noisy ground, and its mask."""
    mask = rectangle(shape, *box)
    image = np.where(mask, 60, 190) + np.random.default_rng(len(stem)).normal(0, 8, shape)
    for name, pixels in (("images", image.clip(0, 255)), ("masks", mask * 255)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{stem}.png")
    return mask


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "set"
    for stem, box in (("one", (10, 12, 30, 40)), ("two", (5, 30, 25, 50)), ("three", (20, 10, 44, 30))):
        write_case(folder, stem, box)
    return folder


@pytest.fixture(scope="module")
def inferer(tiny_pipeline):
    return AttentionSegmentationInferer(StableDiffusionBackbone(tiny_pipeline, device="cpu"), text_certainty=1e9)


@pytest.fixture
def sample() -> Sample:
    truth = rectangle((48, 64), 10, 12, 30, 40) | rectangle((48, 64), 2, 50, 8, 58)
    image = np.where(truth, 0.2, 0.8)[None].astype(np.float32)
    return Sample("x", image, truth, largest_component(truth))


def test_prompts_reach_the_inferer_as_defined_and_the_image_is_encoded_once(inferer, sample, monkeypatch):
    calls = []
    encode = AttentionSegmentationInferer.encode
    monkeypatch.setattr(AttentionSegmentationInferer, "encode", lambda *a: calls.append(1) or encode(*a))
    rows, masks = run_protocols(inferer, sample, list(PROTOCOLS), "a cell")
    assert len(calls) == 1
    encoded = inferer.encode(sample.image)
    click = inferer.predict(encoded, select="points", points=[list(innermost_point(sample.component))])
    somewhere = inferer.predict(encoded, select="points", points=[list(any_point(sample.component, "x"))])
    assert np.array_equal(masks["anywhere"], somewhere.labels > 0)
    box = inferer.predict(encoded, select="box", box=[12, 10, 39, 29])
    assert np.array_equal(masks["points"], click.labels > 0)
    assert np.array_equal(masks["box"], box.labels > 0)
    by_name = {row["protocol"]: row for row in rows}
    assert by_name["points"]["dice"] == score(masks["points"], sample.truth)["dice"]
    assert by_name["points_component"]["dice"] == score(masks["points"], sample.component)["dice"]
    assert by_name["oracle_union"]["dice"] >= 0


def test_an_absent_object_is_an_empty_mask_of_dice_0(inferer, sample):
    (row,), masks = run_protocols(inferer, sample, ["text"], "a cell")
    assert not masks["text"].any()
    assert (row["dice"], row["hd95"], row["absent"]) == (0, 80, True)


def test_a_prompt_is_not_timed_with_what_another_left_behind(inferer, sample, monkeypatch):
    kept = []
    predict = AttentionSegmentationInferer.predict
    monkeypatch.setattr(
        AttentionSegmentationInferer, "predict", lambda *a, **k: kept.append(a[1]._paths) or predict(*a, **k)
    )
    run_protocols(inferer, sample, ["points", "anywhere", "auto", "box"], None)
    assert kept == [None] * 4


def test_the_mask_changes_nothing_but_the_prompts(inferer, sample):
    other = Sample("x", sample.image, rectangle((48, 64), 0, 0, 48, 9), rectangle((48, 64), 0, 0, 48, 9))
    _, masks = run_protocols(inferer, sample, ["auto"], None)
    _, others = run_protocols(inferer, other, ["auto"], None)
    assert np.array_equal(masks["auto"], others["auto"])


def run(dataset, out, pipeline, *more: str) -> int:
    folders = ["--images", str(dataset / "images"), "--masks", str(dataset / "masks"), "--out", str(out)]
    return main(["evaluate", *folders, "--backbone", str(pipeline), "--device", "cpu", *more])


@pytest.mark.slow
def test_a_folder_is_evaluated(dataset, tmp_path, tiny_pipeline, capsys):
    out = tmp_path / "out"
    assert run(dataset, out, tiny_pipeline, "--protocol", "oracle_union,auto,points", "--control", "untrained") == 0
    summary = json.loads((out / "summary.json").read_text())
    names = {"oracle_union", "auto", "points", "points_component"}
    assert set(summary["protocols"]) == set(summary["baselines"]["untrained"]) == names
    assert {"otsu", "kmeans2", "all_foreground", "colour_click", "random_walker_click"} < set(summary["baselines"])
    assert summary["protocols"]["points"]["n"] == 3
    assert summary["baselines"]["otsu"]["dice"] > 0.99  # two classes, no more
    assert summary["baselines"]["otsu_best_polarity"]["polarity"] == "dark"
    assert summary["backbone"]["untrained"] is False and summary["settings"]["failed"] == []

    with open(out / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "protocol", "dice", "iou", "hd95", "seconds", "score"]
    points = [float(row["dice"]) for row in rows if row["protocol"] == "points"]
    assert len(points) == 3 and np.mean(points) == pytest.approx(summary["protocols"]["points"]["dice"])
    model = summary["protocols"]["points"]
    assert model["seconds"] == pytest.approx(model["encode_seconds"] + model["prompt_seconds"])
    assert -1 <= model["spearman"] <= 1 and model["aurc_best"] <= model["aurc"]
    scores = [float(row["score"]) for row in rows if row["protocol"] == "points"]
    assert np.mean(scores) == pytest.approx(model["score"])
    assert "aurc" in summary["baselines"]["untrained"]["auto"]
    assert "score" not in summary["protocols"]["oracle_union"]  # the mask chose, so no score of the inferer's answers
    assert Image.open(out / "reliability.png").width > 300
    tables = (out / "table.md").read_text()
    assert "| trained minus untrained: points |" in tables and "| untrained: points: encode |" in tables
    assert "| baseline: grabcut_click |" in tables.partition("Seconds per case")[2]
    page = (out / "report.html").read_text()
    assert all(f"points, {place}:" in page for place in ("best", "median", "worst"))
    assert Image.open(out / "report.png").width > 300
    assert "| points |" in capsys.readouterr().out


def test_a_bad_case_is_reported_and_the_others_are_evaluated(dataset, tmp_path, tiny_pipeline, capsys):
    Image.new("1", (20, 20), 1).save(dataset / "masks" / "two.png")
    Image.new("1", (64, 48), 0).save(dataset / "masks" / "three.png")
    assert run(dataset, tmp_path / "out", tiny_pipeline, "--protocol", "auto") == 2
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    failed = {entry["case"]: entry["error"] for entry in summary["settings"]["failed"]}
    assert summary["protocols"]["auto"]["n"] == 1
    assert "20x20" in failed["two"] and "48x64" in failed["two"]
    assert "empty" in failed["three"]
    assert "2 failed" in capsys.readouterr().err


def test_masks_may_have_another_format_and_any_nonzero_value(dataset, tmp_path, tiny_pipeline):
    for path in list((dataset / "masks").iterdir()):
        pixels = np.asarray(Image.open(path)) // 255 * 3
        Image.fromarray(pixels).save(path.with_suffix(".tif"))
        path.unlink()
    assert run(dataset, tmp_path / "out", tiny_pipeline, "--protocol", "auto", "--limit", "2") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["protocols"]["auto"]["n"] == 2 and summary["baselines"]["otsu"]["dice"] > 0.99


@pytest.mark.slow
def test_a_suite_skips_volumes_and_makes_one_table(dataset, tmp_path, tiny_pipeline, capsys):
    suite, out = dataset.parent, tmp_path / "out"
    for stem in ("a", "b"):
        write_case(suite / "other", stem, (8, 8, 24, 24))
    for name in ("images", "masks"):
        (suite / "volumes" / name).mkdir(parents=True)
        nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), np.eye(4)), suite / "volumes" / name / "v.nii.gz")
    arguments = ["--suite", str(suite), "--out", str(out), "--protocol", "auto,text", "--text", "set=a cell"]
    assert main(["evaluate", *arguments, "--backbone", str(tiny_pipeline), "--device", "cpu"]) == 0
    assert "volumes: skipped" in capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())
    assert set(table["sets"]) == {"set", "other"}
    both = [table["sets"][name]["protocols"]["auto"]["dice"] for name in ("set", "other")]
    assert table["mean_dice"]["auto"] == pytest.approx(np.mean(both))
    assert "text" in table["sets"]["set"]["protocols"] and "text" not in table["sets"]["other"]["protocols"]
    assert (out / "table.md").read_text().startswith("| Dice | other | set | mean |")
    assert (out / "other" / "cases.csv").is_file()
    page = (out / "report.html").read_text()
    places = [("set", place) for place in ("best", "median", "worst")] + [("other", "best"), ("other", "worst")]
    assert all(f"{name}, auto, {place}: " in page for name, place in places)
    assert page.count("<figure>") == len(places)


@pytest.mark.slow
def test_halves_share_no_case(dataset, tmp_path, tiny_pipeline):
    write_case(dataset, "002", (8, 8, 24, 24))  # the only one of dev
    found = {}
    for half in ("dev", "test"):
        assert run(dataset, tmp_path / half, tiny_pipeline, "--protocol", "auto", "--half", half) == 0
        with open(tmp_path / half / "cases.csv", newline="") as file:
            found[half] = {row["case"] for row in csv.DictReader(file)}
    assert found == {"dev": {"002"}, "test": {"one", "two", "three"}}


@pytest.mark.parametrize(
    "change, message",
    [
        (["--protocol", "magic"], "unknown protocol 'magic'"),
        (["--protocol", "text"], "--text"),
        (["--images", "nowhere"], "nowhere: no such folder"),
        (["--suite", "nowhere"], "either --images with --masks, or --suite"),
        (["--limit", "0"], "--limit"),
        (["--limit", "many"], "--limit"),
        (["--half", "third"], "--half"),
        (["--backbone", "nowhere/to/be"], "nowhere/to/be"),
        (["--select-settings", "depth=3"], "depth=3"),
        (["--select-settings", "affinity=love"], "affinity"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(change, message, dataset, tmp_path, tiny_pipeline, capsys):
    assert run(dataset, tmp_path / "out", tiny_pipeline, *change) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_folders_without_a_common_name_are_refused(dataset, tmp_path, tiny_pipeline, capsys):
    for path in list((dataset / "masks").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_mask"))
    assert run(dataset, tmp_path / "out", tiny_pipeline) == 2
    assert "has the name of an image" in capsys.readouterr().err
