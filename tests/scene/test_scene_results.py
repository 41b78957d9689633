"""The committed results of `recipes/vp3d.py` against what was asked of them, and every number of the docs' two tables against them."""

import csv
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "vp3d"

OPEN = ("a cube", "a cone", "a torus", "a cylinder", "a green solid", "a purple solid")


def rows(name):
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


GAPS = {(r["prompts"], r["full minus"], r["measure"]): r for r in rows("gaps")}
MEANS = {(r["prompts"], r["arm"]): r for r in rows("table")}
ARMS = {arm for _, arm in MEANS}


def low(arm, measure, prompts="all", by="low"):
    return float(GAPS[prompts, arm, measure][by])


def test_twelve_arms_twelve_prompts_five_seeds():
    """And the table's means are those of the runs."""
    runs = rows("runs")
    assert len(ARMS) == 12 and len({(r["arm"], r["prompt"], r["seed"]) for r in runs}) == len(runs) == 720
    for (prompts, arm), mean in MEANS.items():
        own = [
            r for r in runs if r["arm"] == arm and (prompts == "all" or (r["prompt"] in OPEN) == (prompts == "open"))
        ]
        assert len(own) == int(mean["runs"]) == (60 if prompts == "all" else 30)
        for measure in ("accuracy", "accuracy/shape", "psnr", "iou", "janus"):
            assert float(mean[measure]) == pytest.approx(sum(float(r[measure]) for r in own) / len(own), abs=2e-4)


def test_where_the_text_says_all_longer_distillation_wins():
    """What the docs say against VP3D."""
    assert float(GAPS["closed", "longer", "psnr"]["high"]) < 0


def test_no_guidance_or_rate_brings_distillation_alone_to_vp3d():
    swept = rows("sweep")
    assert len({(r["arm"], r["guidance"], r["lr"]) for r in swept}) == 12
    worst = {m: min(float(r[m]) for r in swept if r["arm"] == "full") for m in ("accuracy", "psnr", "iou")}
    assert all(float(r[m]) < worst[m] for r in swept if r["arm"] == "sds" for m in worst)


def test_vp3d_is_no_worse_than_telling_the_model_what_v_shows():
    assert low("caption", "accuracy") >= 0


@pytest.mark.parametrize("measure", ["accuracy", "iou"])
@pytest.mark.parametrize("by", ["low", "low by prompt"])
def test_vp3d_is_better_than_a_fit_to_v(measure, by):
    assert low("photometric", measure, by=by) > 0


def test_open_prompts_gain_decibels():
    assert low("sds", "psnr", "open") > 0 and low("longer", "psnr", "open", "low by prompt") > 0


def test_the_stylised_task_follows_text_and_picture():
    found = MEANS["all", "stylised"]
    assert float(found["accuracy/shape"]) > 0.95 and float(found["accuracy/colour"]) > 0.9


def test_the_longer_arm_has_no_less_to_spend():
    """At least the rows of the network and the time of VP3D."""
    full, longer = MEANS["all", "full"], MEANS["all", "longer"]
    assert float(longer["rows"]) >= float(full["rows"]) and float(longer["seconds"]) >= float(full["seconds"])


def test_the_trained_network_confirms_the_ordering():
    means = {r["arm"]: float(r["accuracy"]) for r in rows("trained-table") if r["prompts"] == "all"}
    assert means["full"] >= means["caption"] > means["photometric"] > means["sds"]
    runs = rows("trained-runs")
    assert len(runs) == 32
    for arm, mean in means.items():
        own = [float(r["accuracy"]) for r in runs if r["arm"] == arm]
        assert len(own) == 8 and same(f"{mean:.4f}", sum(own) / 8)


# ---------------------------------------------------------------------------------------------------- the docs

NAMES = {
    "text alone (SDS)": "sds",
    "+ visual prompt": "visual",
    "+ text reward": "reward",
    "+ consistency with v": "consistency",
    "all three (VP3D)": "full",
    "text alone, half as long again": "longer",
    "text with a caption of v": "caption",
    "text and a fit to v at its own camera": "photometric",
    "stylised: shape from text, looks from another v": "stylised",
    "VP3D without v in the condition": "full-visual",
    "VP3D without the text reward": "full-reward",
    "VP3D without consistency": "full-consistency",
}
COLUMNS = (
    ("all", "accuracy"),
    ("all", "accuracy/worst"),
    ("all", "accuracy/shape"),
    ("all", "psnr"),
    ("all", "psnr/foreground"),
)
COLUMNS += (
    ("all", "iou"),
    ("all", "janus"),
    ("all", "colour_spread"),
    ("open", "accuracy"),
    ("open", "psnr"),
    ("open", "iou"),
)
APART = (("all", "accuracy"), ("all", "iou"), ("open", "psnr"), ("all", "psnr/foreground"), ("all", "accuracy/shape"))
APART += (("all", "janus"), ("all", "colour_spread"))


def told(table):
    """The cells of a table of docs/scene.md by arm, from the one whose head has this word."""
    text = (RESULTS.parents[1] / "scene.md").read_text(encoding="utf-8").split(f"| {table} |", 1)[1]
    lines = text.split("\n\n", 1)[0].splitlines()[2:]
    cells = [[c.strip(" *") for c in line.strip("|").split("|")] for line in lines]
    return {NAMES[c[0]]: c[1:] for c in cells}


def same(said, value):
    """As far as the digits that are said go."""
    return abs(float(said) - float(value)) <= 0.51 * 10 ** -len(said.partition(".")[2]) + 1e-9


def test_the_docs_means_are_those_measured():
    table = told("accuracy | of the worst side | shape | PSNR")
    assert set(table) == set(NAMES.values())
    for arm, cells in table.items():
        for said, (prompts, measure) in zip(cells, COLUMNS, strict=True):
            assert same(said, MEANS[prompts, arm][measure]), (arm, prompts, measure)


def test_the_docs_means_of_the_trained_network_are_those_measured():
    means = {(r["prompts"], r["arm"]): r for r in rows("trained-table")}
    columns = (*(m for _, m in COLUMNS[:3]), "accuracy/colour", "psnr", "psnr/foreground", "iou", "face", "janus")
    table = told("accuracy | of the worst side | shape | colour")
    assert set(table) == {arm for _, arm in means}
    for arm, cells in table.items():
        wanted = [means["all", arm][m] for m in columns] + [means["open", arm]["accuracy"]]
        assert all(same(*pair) for pair in zip(cells, wanted, strict=True)), arm


def test_the_docs_gaps_are_those_measured():
    table = told("accuracy | IoU | PSNR, open prompts")
    assert set(table) == set(NAMES.values()) - {"full", "stylised"}
    for arm, cells in table.items():
        for said, key in zip(cells, APART, strict=True):
            row = GAPS[key[0], arm, key[1]]
            numbers = said.replace("[", "").replace("]", "").replace(",", "").split()
            wanted = [row[n] for n in ("gap", "low", "high", "low by prompt", "high by prompt")]
            assert all(same(*pair) for pair in zip(numbers, wanted, strict=True)), (arm, key, numbers, wanted)
