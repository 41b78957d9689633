"""`tropism reproduce`: what comes out again passes, what was changed or is not whole fails."""

import csv
import math
from dataclasses import replace

import pytest
import yaml
from command_line import called
from tiny import tiny_pipeline

from tropism import commands
from tropism.commands import train
from tropism.core import UserError
from tropism.run.recipes import Recipe, bundled, curve_of, differences, read_recipe, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """A tiny recipe whose reference was made here."""
    folder = tmp_path_factory.mktemp("recipe")
    settings = {
        "model": model,
        "reward": ["jpeg=2"],
        "prompts": ["a cat", "a dog"],
        "updates": 2,
        "batch": 2,
        "lr": 0.03,
    }
    more = {"evaluate_every": 1, "evaluate_prompts": 2, "options": {"steps": 2, "guidance": 2.0, "truncation": "1"}}
    new = Recipe(
        "tiny", "It goes.", "alignprop", {**settings, **more}, tolerance={"held_out/reward": 1e-4, "drift": 1e-6}
    )
    write_recipe(new, folder / "new.yaml")
    done = commands.reproduce(str(folder / "new.yaml"), seeds=[3], out=folder / "runs", write=folder / "tiny.yaml")
    assert not done.passed, "nothing was compared"
    return folder / "tiny.yaml"


def changed(file, folder, **settings):
    """The recipe's file with other settings and the same reference."""
    recipe = read_recipe(str(file))
    options = {**recipe.settings["options"], **settings.pop("options", {})}
    write_recipe(replace(recipe, settings={**recipe.settings, "options": options, **settings}), folder / "changed.yaml")
    return str(folder / "changed.yaml")


def test_what_was_not_changed_passes_and_is_written_down(file, tmp_path, monkeypatch, capsys):
    assert called(monkeypatch, "reproduce", file, "--out", tmp_path / "again") == 0
    assert "PASS: tiny; largest deviation 0 tolerances" in capsys.readouterr().out
    table = list(csv.DictReader((tmp_path / "again" / "reproduced.csv").open()))
    assert [(r["update"], r["column"]) for r in table] == [(u, c) for c in ("held_out/reward", "drift") for u in "012"]
    assert all(r["reference"] == r["measured"] for r in table)
    assert (tmp_path / "again" / "reproduced.png").stat().st_size > 5000


@pytest.mark.parametrize("wrong", [{"lr": 0.09}, {"reward": ["jpeg=-2"]}, {"options": {"truncation": "2"}}])
def test_what_was_changed_fails(wrong, file, tmp_path, monkeypatch, capsys):
    assert called(monkeypatch, "reproduce", changed(file, tmp_path, **wrong), "--out", tmp_path / "runs") == 1
    said = capsys.readouterr().out
    assert "OUTSIDE" in said and "FAIL: changed; largest deviation" in said and "The reference is of 20" in said


def test_a_killed_run_goes_on_and_passes(file, tmp_path, monkeypatch):
    whole = train.Scaled.__call__

    def dies(self, batch, *, update, **rest):
        if update == 1:
            raise KeyboardInterrupt
        return whole(self, batch, update=update, **rest)

    monkeypatch.setattr(train.Scaled, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        commands.reproduce(str(file), out=tmp_path / "runs")
    monkeypatch.setattr(train.Scaled, "__call__", whole)
    with pytest.raises(UserError, match=r"not empty\. Add --resume"):
        commands.reproduce(str(file), out=tmp_path / "runs")
    other = changed(file, tmp_path, lr=0.09, options={"truncation": "2"})
    with pytest.raises(UserError, match="begun with another lr and another truncation than the recipe changed has"):
        commands.reproduce(other, out=tmp_path / "runs", resume=True)
    done = commands.reproduce(str(file), out=tmp_path / "runs", resume=True)
    assert done.passed and done.differences[0].share == 0


def test_a_curve_that_is_not_whole_is_infinitely_far():
    reference = {"update": [0, 5], "a": [1.0, 2.0], "b": [1.0, 1.0]}
    recipe = Recipe("r", "", "alignprop", {}, tolerance={"a": 0.5, "b": 0.1}, reference={0: reference})
    near = {"update": [0, 5], "a": [1.0, 2.25], "b": [1.0, 1.0]}
    assert [(d.column, d.update, d.share) for d in differences(recipe, {0: near})] == [("a", 5, 0.5), ("b", 0, 0.0)]
    for sign in (1, -1):  # to either side
        far = {**near, "b": [1.0, 1.0 + sign * 0.3]}
        assert [(d.column, round(d.share, 9)) for d in differences(recipe, {0: far})] == [("b", 3.0), ("a", 0.5)]
    for broken in ({**near, "a": [1.0, math.nan]}, {**near, "update": [0]}, {"update": [0, 5], "b": [1.0, 1.0]}, {}):
        assert differences(recipe, {0: broken})[0].share == math.inf
    lines = [
        {"update": 0, "held_out/reward": 1.0},
        {"update": 1, "reward": 2.0},
        {"update": 2, "held_out/reward": None, "drift": 0.5},
    ]
    found = curve_of(lines)
    assert (found["update"], found["drift"]) == ([0, 2], [0.0, 0.5]) and math.isnan(found["held_out/reward"][1])


def test_bundled_recipes_are_whole(monkeypatch, capsys):
    for name, path in bundled().items():
        recipe = read_recipe(name)
        assert list(recipe.reference) == [0, 1, 2] and recipe.tolerance_from and recipe.date and recipe.seconds > 0, (
            name
        )
        assert set(yaml.safe_load(path.read_text())["tolerance"]) == set(recipe.reference[0]) - {"update"}
        updates = recipe.settings["updates"]
        assert all(curve["update"][0] == 0 and curve["update"][-1] == updates for curve in recipe.reference.values())
        assert all(len(v) == len(curve["update"]) for curve in recipe.reference.values() for v in curve.values())
    assert called(monkeypatch, "reproduce") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in bundled()) and "tropism reproduce NAME" in listed


def test_what_cannot_be_reproduced(file, tmp_path):
    (tmp_path / "bad.yaml").write_text("shows: nothing\nfoo: 1\n")
    for name, more, says in (
        ("aligment", {}, "no recipe 'aligment'"),
        (str(tmp_path / "none.yaml"), {}, "no recipe"),
        (str(tmp_path / "bad.yaml"), {}, "is no recipe"),
        (str(file), {"seeds": "0,3"}, "no reference for seed 0: it has 3"),
        (str(file), {"seeds": "all"}, "not a list of numbers"),
        (str(file), {"threads": 0}, "threads is 0"),
    ):
        with pytest.raises(UserError, match=says):
            commands.reproduce(name, out=tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
