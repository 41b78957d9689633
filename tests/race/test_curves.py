"""Numbers of a comparison, against arithmetic by hand."""

import math

import numpy as np
import pytest

from tropism.core import UserError
from tropism.race import curves, runs
from tropism.race.curves import Curve
from tropism.race.page import gap, levels, paired, reach, row
from tropism.race.plan import SEARCH, plan_of
from tropism.race.runs import Job, asked_of, keep, kept, points_of
from tropism.run.ledger import AXES

PLAN = {
    "model": "shapes",
    "budget": {"seconds": 10},
    "objectives": {"bytes": {"reward": "jpeg"}},
    "methods": {"draft": {}, "ours": {"method": "alignprop", "search": [{"lr": 1e-3}]}},
}


def curve(values, x=(0, 1, 2), **columns):
    spent = {axis: np.array(x, dtype=float) * (10 if axis == "reward_queries" else 1) for axis in AXES}
    return Curve(spent, {"reward": np.array(values, dtype=float)} | {n: np.array(v) for n, v in columns.items()})


def test_the_cost_to_reach_a_level_is_linear_between_evaluations():
    risen = curve([0.0, 1.0, 4.0])
    assert curves.cost_to_reach(risen, 0.5, "reward", "seconds") == 0.5
    assert curves.cost_to_reach(risen, 2.5, "reward", "seconds") == 1.5
    assert curves.cost_to_reach(risen, 2.5, "reward", "reward_queries") == 15
    assert curves.cost_to_reach(risen, 4.1, "reward", "seconds") == math.inf
    assert curves.cost_to_reach(curve([0.0, 3.0, 1.0]), 1.5, "reward", "seconds") == 0.5  # the first time counts
    assert curves.cost_to_reach(curve([2.0, 3.0, 4.0]), 1.0, "reward", "seconds") == 0  # it was there from the start


def test_a_curve_ends_where_the_run_ended():
    assert curve([0.0, 1.0, 4.0]).at("seconds", 1.5, "reward") == 2.5
    assert math.isnan(curve([0.0, 1.0, 4.0]).at("seconds", 2.5, "reward"))


def test_the_search_takes_the_highest_mean_and_no_failed_run():
    tried = [[curve([0, 0, 1]), curve([0, 0, 3])], [curve([0, 0, 9])], [], [curve([0, 0, math.nan])]]
    assert curves.chosen(tried, "reward") == 1
    assert curves.chosen(tried[:1] + tried[2:], "reward") == 0
    assert (
        curves.chosen([[curve([0, 9]), None], [curve([0, -2]), curve([0, -4])]], "reward") == 1
    )  # it blew up on one seed


def test_the_interval_of_paired_differences_is_students():
    mean, low, high = curves.paired([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])  # differences 1, 3, 5
    half = 4.302652729911275 * 2 / math.sqrt(3)  # t of 2 degrees at 97.5 %
    assert (mean, low, high) == pytest.approx((3, 3 - half, 3 + half))


def test_diversity_is_compared_where_gold_is_equal():
    run = curve([0, 0, 0], gold=[0.0, 1.0, 2.0], diversity=[1.0, 0.8, 0.4])
    assert curves.diversity_at(run, "gold", 1.5) == pytest.approx(0.6)
    assert math.isnan(curves.diversity_at(run, "gold", 3.0))
    falling = curve([0, 0, 0], gold=[0.5, 0.4, 0.2], diversity=[1.0, 2.0, 3.0])
    assert math.isnan(curves.diversity_at(falling, "gold", 0.2)) and curves.diversity_at(falling, "gold", 0.5) == 1


def test_an_objective_follows_a_method_longer_in_its_test_runs_alone():
    bytes_ = {"reward": "jpeg", "longer": {"ours": 6}}
    plan = plan_of(PLAN | {"objectives": {"bytes": bytes_, "other": {"reward": "jpeg"}}, "longer": {"ours": 3}})
    budget = lambda o, is_test: asked_of(plan, Job(plan.objectives[o], plan.entries[1], 0, 5, is_test))["budget"][
        "seconds"
    ]
    assert (budget(0, True), budget(1, True)) == (60, 30)
    assert budget(0, False) == budget(1, False) == 15  # the search: half of three times the budget
    points = lambda o, is_test: points_of(plan, Job(plan.objectives[o], plan.entries[1], 0, 5, is_test))
    assert points(1, True) == pytest.approx(
        [1 / 15, 2 / 15, 3 / 15, 4 / 15, 1 / 3, 0.4, 0.6, 0.8]
    )  # five in 30 s, five in 10 s
    assert points(0, False) == []


CODE = "def score(images, batch):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def files(tmp_path):
    """A plan that names files, and the files."""
    written = {n: tmp_path / n for n in ("prompts.txt", "held.txt", "reward.py", "gold.py")}
    for n, file in written.items():
        file.write_text(CODE if n.endswith(".py") else "a cat\n")
    reward, gold = f"hinge({written['reward.py']}:score,0.5)", f"{written['gold.py']}:score"
    objectives = {
        "o": {"reward": reward, "watch": gold, "gold": "watch/score", "prices": {"forwards": 1, "decodes": 2}}
    }
    settings = {"prompts": str(written["prompts.txt"]), "held_out": str(written["held.txt"]), "dtype": "float32"}
    return written, {**PLAN, "objectives": objectives, "settings": settings}


@pytest.mark.parametrize("name", ["prompts.txt", "held.txt", "reward.py", "gold.py"])
def test_a_run_of_files_that_have_changed_since_is_not_taken_for_another(name, files, tmp_path):
    written, found = files
    plan = plan_of(found)
    job = Job(plan.objectives[0], plan.entries[0], 0, 0, is_test=True)
    keep(tmp_path, plan, job, [])
    assert kept(tmp_path, plan, job)["failed"] == ""
    written[name].write_text(written[name].read_text() + "\n# a word more\n")
    with pytest.raises(UserError, match=rf"something else than the plan asks for: contents .*{name}"):
        kept(tmp_path, plan, job)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(points=3), "evaluated_at"),
        (lambda p: p.update(prompts_each=3), "prompts_each"),
        (lambda p: p["settings"].update(dtype="bfloat16"), "settings dtype"),
        (lambda p: p["settings"].pop("dtype"), "settings dtype"),
        (lambda p: p["objectives"]["o"].update(watch=["jpeg"]), "watch"),
        (lambda p: p["objectives"]["o"].update(prices={"forwards": 2, "decodes": 2}), "prices forwards"),
        (lambda p: p["objectives"]["o"].update(prices={"forwards": 1}), "prices decodes"),
    ],
)
def test_a_run_of_a_plan_that_has_changed_since_is_not_taken_for_another(change, said, files, tmp_path):
    found = files[1]
    plan = plan_of(found)
    keep(tmp_path, plan, Job(plan.objectives[0], plan.entries[0], 0, 0, is_test=True), [])
    change(found)
    plan = plan_of(found)
    with pytest.raises(UserError, match=f"something else than the plan asks for: {said}"):
        kept(tmp_path, plan, Job(plan.objectives[0], plan.entries[0], 0, 0, is_test=True))


def test_two_methods_diversity_at_the_lower_one_s_gold_within_the_budget():
    plan = plan_of(PLAN | {"budget": {"seconds": 2}})
    one = [curve([0, 1, 4], diversity=[1.0, 0.9, 0.3]), curve([0, 2, 2], diversity=[1.0, 0.7, 0.5])]
    other = [
        curve([0, 1, 1, 9], x=(0, 1, 2, 3), diversity=[1.0, 0.5, 0.4, 0]),
        curve([-1, 0, 4], diversity=[1.0, 0.8, 0.2]),
    ]
    told = paired(plan, plan.objectives[0], {"one": one, "other": other}, "one", "other")
    assert told["mean"] == pytest.approx((3 - 2) / 2)  # 4 against 1 at 2 seconds, 2 against 4
    assert told["whole"][0] == pytest.approx(0.75)  # areas of 3 against 1.5, of both pairs, over 2 seconds
    assert told["matched"][0] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.5)) / 2)  # at gold 1, at gold 2
    assert told["seeds"] == 2


def test_the_mean_over_a_budget_is_the_area_under_the_lines():
    run = curve([0, 2, 2, 9], x=(0, 1, 2, 3))
    assert curves.mean_over(run, "seconds", 2, "reward") == pytest.approx(1.5)
    assert curves.mean_over(run, "seconds", 0.5, "reward") == pytest.approx(0.5)


def test_a_run_that_keeps_its_best_weights_stands_for_them_alone():
    run = curve(
        [1, 3, 2, 3, 4],
        (0, 1, 2, 3, 4),
        gold=[0.1, 0.5, 0.9, 0.6, 0.2],
        drift=[0.0, 1, 2, 3, 4],
        training_reward=[1.0, 2, 3, 4, 5],
    )
    best = curves.kept_best(run, "gold")
    assert best.columns["reward"].tolist() == [1, 3, 3, 3, 4]
    assert best.columns["gold"].tolist() == [
        0.1,
        0.5,
        0.5,
        0.5,
        0.2,
    ]  # gold does not choose, and of equals the first stays
    assert best.columns["drift"].tolist() == [0, 1, 1, 1, 4]
    assert best.columns["last/gold"].tolist() == [0.1, 0.5, 0.9, 0.6, 0.2]
    assert best.columns["training_reward"].tolist() == [1, 2, 3, 4, 5] and best.spent is run.spent
    assert curves.kept_best(curve([1, math.nan, 0.5], gold=[1.0, 2, 3]), "gold").columns["gold"].tolist() == [1, 1, 1]


def test_what_a_run_is_read_as_is_its_best_weights_or_its_last(tmp_path):
    objectives = {"o": {"reward": "jpeg", "gold": "watch/w", "watch": "w.py:w"}}
    for is_best, gold in ((True, [0.1, 0.5, 0.5]), (False, [0.1, 0.5, 0.9])):
        plan = plan_of({**PLAN, "objectives": objectives, "keep_best": is_best})
        job = Job(plan.objectives[0], plan.entries[0], 0, 0, is_test=True)
        rows = [
            {"update": i, "held_out/reward": r, "held_out/watch/w": g, **({"spent": {"seconds": i}} if i else {})}
            for i, (r, g) in enumerate([(0, 0.1), (2, 0.5), (1, 0.9)])
        ]
        keep(tmp_path, plan, job, rows)
        assert runs.curve(tmp_path, plan, job).columns["watch/w"].tolist() == gold


def test_methods_are_compared_by_the_processor_where_the_quicker_ended():
    """One second of the axis is 1 of the processor for the first and 3 for the second: at 2, the second is at two thirds."""
    plan = plan_of(PLAN | {"budget": {"seconds": 2}})
    found = {"a": [curve([0, 1, 4]), curve([0, 2, 6])], "b": [curve([0, 3, 3]), curve([0, 3, 9])]}
    for c in found["b"]:
        c.spent["cpu_seconds"] = c.spent["seconds"] * 3
    told = paired(plan, plan.objectives[0], found, "a", "b")
    assert told["until"] == (2, 2)
    assert told["clock"] == pytest.approx(curves.paired([4, 6], [2, 2])) and told["clock"][0] > 0
    assert told["mean"] == pytest.approx(-1) and paired(plan, plan.objectives[0], found, "b", "a")["clock"][0] < 0


def test_a_row_has_the_spread_of_a_sample():
    plan = plan_of(PLAN | {"budget": {"seconds": 2}})
    found = row(plan, plan.entries[0], [curve([0, 1, 4]), curve([0, 2, 6])], {}, ["reward"])
    assert found.means == {"reward": 5} and found.spreads == pytest.approx({"reward": math.sqrt(2)})


def test_a_band_is_mean_and_spread_up_to_the_shortest_run():
    x, mean, spread = curves.band([curve([0, 1, 2]), curve([0, 3, 6, 9], x=(0, 1, 2, 3))], "seconds", "reward", n=3)
    assert x.tolist() == [0, 1, 2] and mean.tolist() == [0, 2, 4]
    assert spread.tolist() == pytest.approx([0, math.sqrt(2), 2 * math.sqrt(2)])


def test_what_others_need_for_the_level_of_one():
    found = {"slow": [curve([0, 1, 2])] * 3, "fast": [curve([0, 4, 10]), curve([0, 1, 1]), curve([0, 2, 5.5])]}
    assert gap(found, "slow", "reward") == pytest.approx(2 / 5.5)
    lifted = {
        name: [curve([y + 1 for y in c.columns["reward"]], x=range(len(c.columns["reward"]))) for c in of]
        for name, of in found.items()
    }
    assert gap(lifted, "slow", "reward") == pytest.approx(2 / 5.5)  # of the way from the base, wherever that is
    slow, fast = reach(found, "slow", "reward")
    assert (slow.name, slow.costs["seconds"]) == ("slow", (2.0, 3))
    assert fast.costs["seconds"] == (1.0, 2)  # .5, 1 and never
    five = [curve([0, y, y]) for y in (8, 2, 20, 4, 2.5)]  # at 2 after .25, 1, .1, .5 and .8 seconds
    assert reach({"slow": found["slow"], "fast": five}, "slow", "reward")[1].costs["seconds"] == (0.5, 5)
    assert reach({"slow": found["slow"], "fast": five[:4]}, "slow", "reward")[1].costs["seconds"] == (0.375, 4)
    some = reach({**found, "fast": found["fast"][:2]}, "slow", "reward")[1]
    assert some.costs["seconds"] == (math.inf, 1)  # one of two seeds got there: no median to quote


@pytest.mark.parametrize(("end", "is_told"), [(1.9, False), (2.1, True)])
def test_costs_are_told_where_the_reference_has_gone_a_fifth_of_the_way(end, is_told):
    plan = plan_of(PLAN | {"level_of": "draft"})
    (told,) = levels(plan, plan.objectives[0], {"draft": [curve([0, 1, end])], "ours": [curve([0, 5, 10])]})
    assert told["gap"] == pytest.approx(end / 10) and [r.name for r in told["rows"]] == ["draft", "ours"] * is_told
    assert levels(plan_of(PLAN), plan.objectives[0], {}) == []


def test_a_plan_of_names_alone_has_six_configurations_a_method():
    plan = plan_of(PLAN)
    assert [len(e.search) for e in plan.entries] == [6, 1]
    assert all(len(s) == 6 for s in SEARCH.values())
    assert plan.objectives[0].reward == ("jpeg",) and plan.axis == "seconds"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": [1, 2], "tuning_seeds": [2]}, "tuned on and tested on"),
        ({"budget": {"second": 3}}, "seconds"),
        ({"methods": {"drafft": {}}}, "Did you mean 'draft'"),
        ({"methods": {"a/b": {"method": "draft"}}}, "name of a folder"),
        ({"objectives": {"x": {"reward": "jpeg", "gold": "drift"}}}, "less is better"),
        ({"objectives": {"x": {"rewards": "jpeg"}}}, "Did you mean 'reward'"),
        ({"objectives": {}}, "at least one objective"),
        ({"level_of": "ddpo"}, "method of the plan"),
        ({"tuning_share": 0}, "tuning_share"),
        ({"budget": {"priced": 3}}, "has no prices"),
        ({"objectives": {"x": {"reward": "jpeg", "prices": {"forward": 1}}}}, "Did you mean 'forwards'"),
        ({"bugdet": {}}, "Did you mean 'budget'"),
        ({"seeds": [0, 1, 0]}, "seeds holds a seed twice"),
        ({"seeds": 3}, "seeds of the plan is 3; it must be a list of whole numbers"),
        ({"seeds": ["a"]}, "a list of whole numbers"),
        ({"objectives": ["jpeg"]}, "objectives of the plan .* must be names with values"),
        ({"tuning_share": "half"}, "'half'; it must be a number"),
        ({"prompts_each": 0}, "prompts_each of the plan is 0; it must be a whole number from 1 up"),
        ({"points": 0}, "points of the plan is 0"),
        ({"longer": {"draft": -1}}, "a factor above 0"),
        ({"methods": {"draft": {"search": {"lr": 1}}}}, "search of the method 'draft' must be a list"),
    ],
)
def test_a_plan_that_cannot_be_is_named(changed, said):
    with pytest.raises(UserError, match=said):
        plan_of({**PLAN, **changed})
