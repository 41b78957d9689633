"""Methods at one budget, end to end on a tiny pipeline: what is run, what is kept, what is shown."""

import csv
import inspect
import json
import re
from dataclasses import replace

import pytest
from tiny import tiny_pipeline

from tropism.commands.race import plan_from, race
from tropism.core import UserError
from tropism.race.plan import plan_of, read

PROMPTS = "prompts.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("model")))


def plan(folder, tmp_path, **changed):
    (tmp_path / PROMPTS).write_text("a cat\na dog\nred\n")
    own = {"prompts": str(tmp_path / PROMPTS), "evaluate_prompts": 2, "batch": 2, "steps": 2, "guidance": 1.0}
    found = {
        "model": folder,
        "budget": {"reward_queries": 4},
        "seeds": [0, 1],
        "tuning_seeds": [7],
        "points": 2,
        "settings": {**own, "evaluate_eta": 0.0},
        "objectives": {"bytes": {"reward": "jpeg", "gold": "watch/incompressibility", "watch": "incompressibility"}},
        "methods": {
            "DRaFT": {"method": "draft", "search": [{"lr": 1e-3}, {"lr": 1e-2, "k": 2}]},
            "DDPO": {"method": "ddpo", "settings": {"eta": 1.0}, "search": [{"lr": 1e-3}]},
        },
        "level_of": "DDPO",
        "longer": {"DDPO": 2},
    }
    return plan_of({**found, **changed})


def test_search_tests_and_page(folder, tmp_path, capsys):
    out = tmp_path / "out"
    page = race(plan(folder, tmp_path), out=out)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*.json") if p.parent.parent.name == "bytes")
    tests = [f"bytes/{m}/test-{s}.json" for m in ("DDPO", "DRaFT") for s in (0, 1)]
    assert files == sorted([*tests, "bytes/DRaFT/search-0-7.json", "bytes/DRaFT/search-1-7.json"])
    told = json.loads((out / "bytes/DRaFT/test-0.json").read_text())
    queries = [e.get("spent", {}).get("reward_queries", 0) for e in told["evaluations"]]
    assert queries == [0, 2, 4]  # the base, half of the budget, all of it
    lines = [json.loads(line) for line in (out / "bytes/DRaFT/test-0/metrics.jsonl").read_text().splitlines()]
    rewards = [lines[1]["reward"], lines[1]["reward"], lines[2]["reward"]]
    assert [e["training_reward"] for e in told["evaluations"]] == rewards
    longer = json.loads((out / "bytes/DDPO/test-0.json").read_text())["evaluations"]
    queries = [e.get("spent", {}).get("reward_queries", 0) for e in longer]
    assert queries == [0, 2, 4, 8]  # what it was at the budget, 4, is measured, and not taken from a line to 8
    searched = list(csv.DictReader((out / "search.csv").open()))
    best = max(searched, key=lambda r: float(r["gold"]))
    assert json.loads(best["configuration"]) == told["config"]
    rows = {(r["method"], r["measure"]): r for r in csv.DictReader((out / "race.csv").open())}
    assert float(rows["DDPO", "reward"]["reward_queries"]) == 4  # at the budget, not at its own end
    assert {m for _, m in rows} == {"reward", "training_reward", "watch/incompressibility", "diversity", "drift"}
    text = page.read_text()
    gold = {m: float(r["mean"]) for (m, measure), r in rows.items() if measure == "watch/incompressibility"}
    assert f"Highest there: <b>{max(gold, key=gold.get)}</b>" in text  # by gold, of which less jpeg is
    assert max(gold, key=gold.get) == min(gold, key=lambda m: float(rows[m, "reward"]["mean"]))
    assert "<td>DDPO</td><td>not searched</td><td>8</td>" in text and "<td>DRaFT</td><td>2</td><td>4</td>" in text
    assert "on seed 7 alone" in text and "Of equals the first listed was taken" in text
    assert "the same held-out prompts that the test runs are judged on (at most 2, 2 pictures each" in text
    assert (out / "bytes-pictures.png").is_file() and text.count("data:image/png") == 2
    assert "<script" not in text and "What was tried" in text and "tuning" not in text
    assert "last/" not in text
    kept = race(plan(folder, tmp_path, keep_best=True), out=out)  # the same runs, read anew
    assert "<th>last/watch/incompressibility</th>" in kept.read_text() and "its best evaluation so far" not in text
    rows = {(r["method"], r["measure"]): r for r in csv.DictReader((out / "race.csv").open())}
    assert {m for _, m in rows} >= {"watch/incompressibility", "last/watch/incompressibility"}
    before = {f: (out / f).read_bytes() for f in files}
    capsys.readouterr()
    race(plan(folder, tmp_path), out=out)
    assert capsys.readouterr().out == "" and {f: (out / f).read_bytes() for f in files} == before
    with pytest.raises(
        UserError, match=r"holds a run of .* settings (lr 0.001 instead of 2.0|eta 1.0 instead of unset)"
    ):
        race(plan(folder, tmp_path, methods={"DDPO": {"method": "ddpo", "search": [{"lr": 2.0}]}}, longer={}), out=out)


def test_the_command_line_s_plan_ends_in_a_page_at_a_priced_budget_too(folder, tmp_path):
    """What `compare --method` makes, with one configuration and seed: nothing names how many prompts are evaluated."""
    (tmp_path / PROMPTS).write_text("a cat\na dog\n")
    flags = (["jpeg"], None, [], str(tmp_path / PROMPTS), ["reward_queries=4"], 1)
    made = plan_from(None, ["draft"], folder, *flags)
    short = {"batch": 2, "steps": 2, "guidance": 1.0}
    made = replace(made, entries=(replace(made.entries[0], search=({"lr": 1e-3},)),), points=1, prompts_each=1)
    objectives = tuple(replace(o, prices={"reward_queries": 2.0}) for o in made.objectives)
    settings = {**made.settings, **short}
    made = replace(made, settings=settings, objectives=objectives, budget={"priced": 8.0})
    text = re.sub(
        r'src="data:[^"]*"', "", race(made, out=tmp_path / "out").read_text()
    )  # any letters stand in a picture
    assert "(at most 32, 1 pictures each" in text and "inf]" not in text and "nan" not in text
    told = json.loads((tmp_path / "out" / "jpeg" / "draft" / "test-0.json").read_text())
    assert told["evaluations"][-1]["spent"]["priced"] == 8 and told["evaluations"][-1]["spent"]["reward_queries"] == 4


def test_a_run_that_blows_up_loses_the_search(folder, tmp_path):
    def chosen(lr):
        search = {"DRaFT": {"method": "draft", "search": [{"lr": lr}, {"lr": 1e-3}]}}
        more = {"methods": search, "level_of": "", "longer": {}, "seeds": [0], "tuning_share": 1.0}
        race(plan(folder, tmp_path, **more), out=tmp_path / f"out{lr}", search_only=True)
        return json.loads((tmp_path / f"out{lr}" / "bytes/DRaFT/search-0-7.json").read_text())["failed"]

    assert "not finite" in chosen(1e30)


def test_a_search_run_that_ends_for_another_reason_is_named_and_tried_again(folder, tmp_path, monkeypatch):
    def lost(plan, job, out, place, bases):
        run = job.file(out).with_suffix("")
        run.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text(
            '{"update": 0, "held_out/reward": 1.0, "held_out/watch/incompressibility": 1.0}\n'
        )
        if len(calls.append(job.name) or calls) == 2:
            raise UserError("The server is gone. Start it again.")

    calls, out = [], tmp_path / "out"
    monkeypatch.setattr(inspect.getmodule(race), "_run", lost)
    with pytest.raises(UserError, match=r"^bytes: DRaFT, search \{.*'k': 2\}, seed 7: The server is gone\. .*to go on"):
        race(plan(folder, tmp_path), out=out, search_only=True)
    assert [f.name for f in out.rglob("search-*.json")] == ["search-0-7.json"]
    race(plan(folder, tmp_path), out=out, search_only=True)
    assert calls == ["search-0-7", "search-1-7", "search-1-7"]
    assert [json.loads(f.read_text())["failed"] for f in sorted(out.rglob("search-*.json"))] == ["", ""]
    with pytest.raises(UserError, match="settings dtype float32 instead of bfloat16"):
        race(plan(folder, tmp_path), out=out, search_only=True, dtype="bfloat16")


def test_a_gold_measure_that_is_none_is_named_after_the_first_run(folder, tmp_path):
    objectives = {"bytes": {"reward": "jpeg", "gold": "watch/jpg", "watch": ["jpeg"]}}
    with pytest.raises(UserError, match=r"no measure of bytes 'watch/jpg'\. Did you mean 'watch/jpeg'"):
        race(plan(folder, tmp_path, objectives=objectives), out=tmp_path / "out", search_only=True)
    assert len(list((tmp_path / "out").rglob("search-*.json"))) == 1


def test_base_pictures_of_other_held_out_prompts_are_others(folder, tmp_path):
    (tmp_path / "other.txt").write_text("a bird\na fish\n")
    one = {"method": "draft", "search": [{"lr": 1e-9}]}
    methods = {"one": one, "other": {**one, "settings": {"held_out": str(tmp_path / "other.txt")}}}
    more = {"methods": methods, "level_of": "", "longer": {}, "seeds": [0], "tuning_share": 1.0}
    race(plan(folder, tmp_path, **more), out=tmp_path / "out")
    told = [json.loads((tmp_path / f"out/bytes/{m}/test-0.json").read_text())["evaluations"] for m in ("one", "other")]
    assert told[0][0]["held_out/reward"] != told[1][0]["held_out/reward"]
    assert all(rows[-1]["drift"] < 1e-9 for rows in told)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"DRaFT": {"method": "draft", "search": [{"learning_rate": 1.0}]}}, "learning_rate"),
        ({"DRaFT": {"method": "draft", "settings": {"truncation": "2"}}}, "truncation"),
        ({"DRaFT": {"method": "draft", "settings": {"on_alarm": "stop"}}}, "on_alarm, which has no effect"),
        ({"DRaFT": {"method": "draft", "search": [{"ramp": ["jpeg=0.3"]}]}}, "ramp, which has no effect"),
        ({"DRaFT": {"method": "draft", "settings": {"trackers": ["wandb"]}}}, "trackers, which has no effect"),
    ],
)
def test_a_setting_that_is_none_is_named_before_anything_runs(folder, tmp_path, methods, said):
    with pytest.raises(UserError, match=said):
        race(plan(folder, tmp_path, methods=methods, level_of="", longer={}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plan_of_flags_and_of_a_file(tmp_path):
    flags = (["jpeg"], "reward", [], None, ["seconds=5"], 2)
    found = plan_from(None, ["draft", "ddpo"], "shapes", *flags)
    assert [len(e.search) for e in found.entries] == [6, 6] and found.seeds == (0, 1)
    assert found.entries[1].settings == {"eta": 1.0}
    assert found.settings == {"evaluate_eta": 0.0}  # of all alike, whatever chain they were trained on
    for wrong in (("jpeg", [], "--budget"), ("", ["seconds=5"], "--reward")):
        with pytest.raises(UserError, match="--reward jpeg --budget"):
            plan_from(None, ["draft"], "shapes", [wrong[0]] if wrong[0] else [], "reward", [], None, wrong[1], 2)
    file = tmp_path / "plan.yaml"
    file.write_text("model: [")
    with pytest.raises(UserError, match="cannot be read"):
        read(file)
    file.write_text("- 3")
    with pytest.raises(UserError, match="holds no settings"):
        read(file)
    nothing = {"methods": [], "model": None, "reward": [], "gold": None, "watch": [], "prompts": None}
    nothing |= {"budget": [], "seeds": None}
    given = {"methods": ["draft"], "model": "shapes", "reward": ["jpeg"], "gold": "reward", "watch": ["jpeg"]}
    for name, value in {**given, "prompts": "p.txt", "budget": ["seconds=5"], "seeds": 5}.items():
        with pytest.raises(
            UserError, match=f"Both --plan and --{name.removesuffix('s') if name == 'methods' else name} "
        ):
            plan_from(file, **{**nothing, name: value})
    file.write_text("model: shapes\nbudget: {seconds: 5}\nobjectives: {a: {reward: jpeg}}\nmethods: {draft: {}}\n")
    assert plan_from(file, **nothing).seeds == (0, 1, 2, 3, 4)
    assert plan_from(None, ["draft"], None, ["jpeg"], None, [], None, ["seconds=5"], None).model == "shapes"
