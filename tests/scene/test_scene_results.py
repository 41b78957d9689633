"""The committed results of `recipes/vp3d.py` against what was asked of them, and against what the docs say of them."""

import csv
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "vp3d"


def rows(name):
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


GAPS = {(r["prompts"], r["full minus"], r["measure"]): r for r in rows("gaps")}
MEANS = {(r["prompts"], r["arm"]): r for r in rows("table")}
ARMS = ("sds", "longer", "caption", "photometric", "visual", "reward", "consistency", "full", "stylised")


def low(arm, measure, prompts="all", by="low"):
    return float(GAPS[prompts, arm, measure][by])


def test_nine_arms_twelve_prompts_five_seeds():
    assert all(int(MEANS["all", arm]["runs"]) == 60 and int(MEANS["open", arm]["runs"]) == 30 for arm in ARMS)
    assert all(int(MEANS["all", arm]["runs"]) >= 24 for arm in ("full-visual", "full-reward", "full-consistency"))


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
