"""The dial's numbers against functions whose answer is known, and the command end to end on a tiny pipeline."""

import csv
import itertools
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from safetensors.torch import load_file
from test_report import Tags
from tiny import tiny_pipeline

from tropism import cli, commands
from tropism.commands.dial import _fresh
from tropism.core import Batch, UserError
from tropism.run import dial
from tropism.run.dial_page import Dialled
from tropism.run.evaluate import Evaluation, diversity

PICTURES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
EVIL = "<script>alert(1)</script> a dog"
COLOURS = ("reward of red", "reward of green")
HELD = ["a red cat", "a dog", EVIL, "two cats", "a cat on a red dog", "red", "a cart"]


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(*, seed=0, n=7):
    values = some(n, n, seed=seed)
    return (values + values.T).fill_diagonal_(math.nan)


# ---------------------------------------------------------------------------------------------------- quantities


def test_the_mean_of_the_pairs_is_the_diversity():
    found = dial.quantities(Evaluation(PICTURES, {"reward": torch.arange(6.0)}, list("abcdef")))
    assert found["diversity"].nanmean().item() == pytest.approx(diversity(PICTURES), rel=1e-6)
    apart = (PICTURES[1] - PICTURES[4]).square().mean().sqrt().item()
    assert found["diversity"][1, 4].item() == pytest.approx(apart, rel=1e-6)


def test_a_set_in_which_each_prompt_comes_twice_is_as_diverse_as_one_half():
    twice = Evaluation(torch.cat([PICTURES, PICTURES]), {"reward": torch.zeros(12)}, list("abcdef") * 2)
    once = dial.quantities(Evaluation(PICTURES, {"reward": torch.zeros(6)}, list("abcdef")))["diversity"].nanmean()
    assert dial.quantities(twice)["diversity"].nanmean().item() == pytest.approx(once.item())
    assert diversity(twice.images) < once


def test_the_error_of_pairs_that_are_means_is_the_error_of_the_mean():
    v = some(9)
    both = ((v[:, None] + v[None]) / 2).fill_diagonal_(math.nan)
    expected = v.std().item() / 3
    assert dial.standard_error(v) == pytest.approx(expected)
    assert dial.standard_error(both) == pytest.approx(expected)
    assert math.isnan(dial.standard_error(v[:1]))


# ---------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("made", [lambda seed: some(7, seed=seed), lambda seed: pairs(seed=seed)])
@pytest.mark.parametrize("place", [0.3, 1.4])
def test_the_probes_are_unbiased(made, place):
    """Over all 35 choices of three pictures of seven, line and bend are in the mean the mean of all seven, for values and for pairs."""
    ends, there = (made(1), made(2)), made(3)
    bends = [dial.bend(ends, dial.of_rows(there, rows), rows, place)[0] for rows in itertools.combinations(range(7), 3)]
    line = dial.between(ends, place).nanmean().item()
    assert line + sum(bends) / len(bends) == pytest.approx(there.nanmean().item(), abs=1e-9)


def test_a_bend_is_believed_the_less_the_more_its_pictures_disagree():
    """Bends of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), so 4 / (4 + 1/3) of it."""
    ends = (torch.zeros(9).double(), torch.zeros(9).double())
    told = dial.knot(ends, torch.tensor([1.0, 2.0, 3.0]).double(), [0, 1, 2], 0.5)
    assert told == pytest.approx(2 * 4 / (4 + 1 / 3))
    assert dial.knot(ends, torch.tensor([2.0, 2.0, 2.0]).double(), [0, 1, 2], 0.5) == 2


def test_a_bend_that_all_pictures_share_is_found_exactly_from_three_of_them():
    """r_i(s) = a_i + b_i s + bend(s), with bend 0 at both ends; the level and the slopes come from all pictures."""
    a, b, curved = some(20), some(20, seed=1), lambda s: s * (1 - s) * (s + 0.5)
    at = lambda s: a + b * min(s, 1.0) + curved(s)
    rows, places = [4, 11, 12], [0.5, 1.25, 1.5]
    probes = {s: (dial.of_rows(at(s), rows), rows) for s in places}
    told = dial.predict((at(0.0), at(1.0)), probes, [0.0, 0.5, 1.0, 1.25, 1.5])
    assert told == pytest.approx([at(s).mean().item() for s in (0.0, 0.5, 1.0, 1.25, 1.5)], abs=1e-9)
    between = dial.predict((at(0.0), at(1.0)), probes, [0.25, 0.75])
    assert between == pytest.approx([at(s).mean().item() for s in (0.25, 0.75)], abs=0.06)


def test_pairs_are_predicted_as_values_are():
    first, last = pairs(seed=1), pairs(seed=2)
    at = lambda s: (1 - s) * first + s * last + s * (1 - s)
    rows = [0, 2, 5, 6]
    told = dial.predict((first, last), {0.5: (dial.of_rows(at(0.5), rows), rows)}, [0.5])
    assert told[0] == pytest.approx(at(0.5).nanmean().item())


def test_samples_without_a_score_take_no_part():
    a, b = some(6), some(6, seed=1)
    a[2], b[4] = math.nan, math.inf
    told = dial.predict((a, b), {0.5: ((a + b)[:2] / 2, [0, 1])}, [0.0, 1.0, 0.5])
    assert all(math.isfinite(v) for v in told)
    assert told[0] == pytest.approx(a[a.isfinite()].mean().item())


def test_probes_that_look_like_all_pictures_are_chosen():
    odd = torch.cat([torch.zeros(8), torch.full((2,), 5.0)]).double()
    ends = [{"reward": odd, "diversity": torch.ones(10, 10).double()}] * 2
    rows = dial.balanced(ends, ["reward", "diversity"], 5, range(10))
    assert len(rows) == 5 == len(set(rows))
    assert dial.of_rows(odd, rows).mean() == odd.mean()
    assert dial.balanced(ends, ["reward"], 5, [7, 8]) == [7, 8]
    assert set(dial.balanced(ends, ["reward"], 2, [1, 3, 9])) < {1, 3, 9}


def test_the_probes_are_sixteen_and_nested():
    ends = [{"reward": some(32, seed=i), "diversity": pairs(n=32, seed=i)} for i in (0, 1)]
    for counts in dial.PROBES.values():
        rows = dial.plan(ends, ["reward", "diversity"], counts, range(32))
        assert {place: len(r) for place, r in rows.items()} == counts
        assert sum(counts.values()) == 16
        assert all(set(r) <= set(max(rows.values(), key=len)) for r in rows.values())


def test_the_error_is_told_in_shares_of_the_measured_range():
    assert dial.error_share([1.0, 2.0, 4.0], [0.0, 2.0, 5.0]) == pytest.approx(2 / 3 / 5)
    assert math.isnan(dial.error_share([1.0, 2.0], [3.0, 3.0]))


# ---------------------------------------------------------------------------------------------------- recommendation


def test_the_most_reward_that_keeps_enough_diversity():
    reward, varied = [0.0, 1.0, 3.0, 2.0], [1.0, 0.95, 0.85, 0.92]
    assert dial.recommend([reward], varied, 1.0, 0.9) == (3, True)
    assert dial.recommend([reward], varied, 1.0, 0.8) == (2, True)
    assert dial.recommend([reward], varied, 1.0, 0.94) == (1, True)
    assert dial.recommend([reward], varied, 2.0, 0.9) == (0, False)
    assert dial.recommend([[0.0, 1.0, 1.0]], None, None, 0.9) == (1, True)


def test_of_two_rewards_the_worse_off_counts():
    """In shares of what each adapter alone gives: (1, 0), (.8, .4), (.5, .6), (0, 1)."""
    first, second = [10.0, 8.0, 5.0, 0.0], [0.0, 0.04, 0.06, 0.1]
    assert dial.recommend([first, second], [1.0] * 4, 1.0, 0.9) == (2, True)
    assert dial.recommend([first, second], [1.0, 1.0, 0.5, 1.0], 1.0, 0.9) == (1, True)


# ---------------------------------------------------------------------------------------------------- settings


def test_the_settings_of_a_dial():
    one = dial.stops([1.0, 0.0, 0.5, 0.5], 1)
    assert [(s.place, s.weights, s.name) for s in one] == [(0.0, (0.0,), "0"), (0.5, (0.5,), "0.5"), (1.0, (1.0,), "1")]
    third = dial.stops([0.0, 1.0], 1, phases=True)[2:]
    assert [s.weights for s in third] == [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0)]
    assert [s.name for s in third] == ["early 0", "middle 0", "late 0"]
    assert [s.weights for s in dial.stops([0.25, 0.0], 2)] == [(1.0, 0.0), (0.75, 0.25)]


@pytest.mark.parametrize(
    ("places", "adapters", "says"),
    [
        ([0.0, 2.5], 1, "strength is 2.5; it must lie in 0..2"),
        ([0.0, -0.1], 1, "strength is -0.1"),
        ([0.0, math.nan], 1, "strength is nan"),
        ([0.0, 1.5], 2, r"weight of the second adapter is 1.5; it must lie in 0..1"),
        ([1.0, 1.0], 1, "1 settings; it needs at least 2"),
    ],
)
def test_settings_out_of_range(places, adapters, says):
    with pytest.raises(UserError, match=says):
        dial.stops(places, adapters)


# ---------------------------------------------------------------------------------------------------- the command


def test_nothing_is_recommended_beyond_the_last_measured_setting(tmp_path):
    """A reward that bends upwards at the end is continued upwards beyond it, where no picture was probed."""
    seen = lambda level, rows=range(6): Evaluation(
        PICTURES[list(rows)], {"reward": torch.tensor([level + i for i in rows])}, ["abcdef"[i] for i in rows]
    )
    probes = {p: ([0, 1, 2, 3], seen(level, range(4))) for p, level in ((0.5, 0.5), (1.25, 2.0), (1.5, 4.0))}
    stops = dial.stops([0, 1, 2], 1)
    many = {"drawn": [seen(0.0)] * 3, "fresh": [None] * 3, "keep": 0.0, "command": "", "config": {}, "environment": {}}
    found = Dialled(
        out=tmp_path, runs=["a"], base="b", rewards=["reward"], stops=stops, rows=[0], probes=probes, before=seen(0.0),
        ends=(seen(0.0), seen(1.0)), **many,
    )  # fmt: skip
    assert found.predicted("reward", [2.0])[0] > found.predicted("reward", [1.5])[0]
    assert found.recommended[0].place == 1.5 and found.fine[-1] == 2


def test_fresh_pictures_have_noise_of_their_own():
    drawn = []
    bench = SimpleNamespace(asked=Batch(["a", "b", "c"]), draw=lambda stop, asked, index: drawn.append((asked, index)))
    _fresh(bench, dial.stops([0, 1], 1, phases=True), 7, lambda text: None)
    assert len(drawn) == 2  # the phases are not predicted
    for asked, index in drawn:
        assert asked.prompts == ["a", "b", "c", "a", "b", "c", "a"]
        assert len(set(index)) == 7 and min(index) >= 2**20  # an evaluation counts its pictures from 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs on a tiny pipeline: one towards red, one towards green."""
    folder = tmp_path_factory.mktemp("dial")
    (folder / "reward.py").write_text(
        "def red(images, batch):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
        "def green(images, batch):\n    return images[:, 1].mean((1, 2)) - images[:, 0].mean((1, 2))\n"
    )
    base = str(tiny_pipeline(folder / "model"))
    for colour in ("red", "green"):
        commands.align(
            "alignprop",
            model=base,
            reward=f"{folder}/reward.py:{colour}",
            prompts=["a cat", "a red dog"],
            held_out=HELD,
            out=folder / colour,
            updates=2,
            batch=2,
            lr=0.1,
            options={"steps": 3, "guidance": 2.0},
            evaluate_every=0,
            doctor=False,
        )
    return folder


@pytest.fixture(scope="module")
def dialled(runs):
    return commands.dial([str(runs / "red")], out=runs / "page", pictures=5, phases=True, at=[0.0, 0.5, 1.0], check=7)


def table(folder):
    with (folder / "dial.csv").open() as f:
        return list(csv.DictReader(f))


def test_strengths_zero_and_one_are_the_runs_own_pictures(runs, dialled):
    assert [s.name for s in dialled.stops if not s.group] == sorted({"0", "0.5", "1", "1.25", "1.5", extra(dialled)})
    kept = {k: dialled.ends[i].images for i, k in enumerate(("before", "after"))}
    for name, images in kept.items():
        file = runs / "red" / "samples" / f"{name}.safetensors"
        assert torch.equal(load_file(file)["images"], images)


def extra(found):
    """The recommended setting, which is drawn too."""
    return found.recommended[0].name


def test_the_page_is_safe_and_has_a_mark_for_every_setting(dialled):
    page = (dialled.out / "report.html").read_text()
    seen = Tags()
    seen.feed(page)
    assert not {"script", "iframe", "link", "object", "form"} & set(seen.tags)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in seen.attributes
    assert all(v.startswith("data:image/png;base64,") for k, v in seen.attributes if k in ("src", "href"))
    assert not [k for k, _ in seen.attributes if k.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    marks = [v for k, v in seen.attributes if k == "id"]
    assert marks == [f"s{i}" for i in range(len(dialled.stops))]
    assert set(v for k, v in seen.attributes if k == "for") == set(marks)
    assert [[dialled.stops[i].place for i in dialled.row(p)] for p in dial.PHASES] == [[0, 0.5, 1, 1.25, 1.5]] * 3
    assert ("class", "near") in seen.attributes
    assert seen.attributes.count(("type", "radio")) == len(marks)
    assert sum(k == "checked" for k, _ in seen.attributes) == 1
    for i in range(len(marks)):
        assert re.search(rf"#s{i}:checked ~ .stops .p{i} {{ display: block; }}", page)
        assert page.count(f'class="stop p{i}"') == 1
    assert page.count('<img alt="a dog"') in (0, len(marks))
    assert f"Use strength {extra(dialled)}." in page
    assert "Held against 7 fresh pictures" in page


def test_the_files_beside_the_page(dialled):
    rows = table(dialled.out)
    assert {r["quantity"] for r in rows} == {"reward", "red", "jpeg_kB", "diversity"}
    one = next(r for r in rows if (r["setting"], r["quantity"]) == ("1", "reward"))
    rewards = dialled.ends[1].columns["reward"]
    assert float(one["predicted"]) == pytest.approx(rewards.double().mean().item(), rel=1e-6)
    assert float(one["measured"]) == pytest.approx(rewards[dialled.rows].double().mean().item(), rel=1e-6)
    assert all(r["predicted"] == "nan" for r in rows if r["group"])
    assert all(r["fresh"] == "nan" for r in rows if r["group"])
    assert math.isfinite(float(one["fresh"]))
    assert yaml.safe_load((dialled.out / "config.yaml").read_text())["pictures"] == 5
    names = {p.stem for p in (dialled.out / "pictures").iterdir()}
    assert names == {s.name.replace(" ", "-") for s in dialled.stops}
    assert (dialled.out / "dial.png").stat().st_size > 1000


def test_what_a_run_did_not_keep_is_drawn_again(runs, tmp_path, monkeypatch):
    """The same pictures, at a strength of one and from the run's own noise."""
    file = runs / "red" / "samples" / "after.safetensors"
    monkeypatch.chdir(tmp_path)
    kept = commands.dial([str(runs / "red")], out="kept", quick=True)
    moved = file.rename(tmp_path / "after")
    try:
        drawn = commands.dial([str(runs / "red")], out="drawn", quick=True)
    finally:
        moved.rename(file)
    torch.testing.assert_close(kept.ends[1].images, drawn.ends[1].images, rtol=0, atol=1e-5)
    assert len(kept.rows) == 4
    assert {place: len(rows) for place, (rows, _) in kept.probes.items()} == {
        0.5: 4,
        1.25: 4,
        1.5: 7,
    }  # of seven prompts
    assert [s.place for s in kept.stops] == [0, 0.5, 1, 1.25, 1.5]


def test_two_adapters_are_mixed(runs, tmp_path, monkeypatch, capsys):
    """The ends are each run's own pictures; the same, mixed by the command's own way, is drawn from noise again."""
    words = ["tropism", "dial", runs / "red", runs / "green", "--out", tmp_path / "page", "--pictures", "4"]
    monkeypatch.setattr(sys, "argv", [str(w) for w in words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "Recommended weights" in capsys.readouterr().out
    rows = table(tmp_path / "page")
    place = {(r["setting"], r["quantity"]): float(r["measured"]) for r in rows}
    assert {"1 + 0", "0.75 + 0.25", "0.5 + 0.5", "0.25 + 0.75", "0 + 1"} <= {r["setting"] for r in rows}
    assert place["1 + 0", "reward of red"] > place["0 + 1", "reward of red"]
    assert place["0 + 1", "reward of green"] > place["1 + 0", "reward of green"]
    page = (tmp_path / "page" / "report.html").read_text()
    assert "tropism mix --adapter" in page
    monkeypatch.setattr(sys.modules["tropism.commands.dial"], "_after", lambda run, told: None)
    again = commands.dial([str(runs / "red"), str(runs / "green")], out=tmp_path / "again", quick=True)
    ends = [again.ends[i].columns[name].double().mean().item() for i, name in enumerate(COLOURS)]
    monkeypatch.undo()
    kept = commands.dial([str(runs / "red"), str(runs / "green")], out=tmp_path / "kept", quick=True)
    assert ends == pytest.approx(
        [kept.ends[i].columns[n].double().mean().item() for i, n in enumerate(COLOURS)], abs=1e-5
    )


def test_what_cannot_be_dialled(runs, tmp_path):
    call = lambda *names, **settings: commands.dial([str(n) for n in names], out=tmp_path / "out", **settings)
    red = runs / "red"
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        call(tmp_path)
    with pytest.raises(UserError, match="3 runs were named"):
        call(red, red, red)
    with pytest.raises(UserError, match="for one adapter at a time"):
        call(red, red, phases=True)
    with pytest.raises(UserError, match=r"strength is 3; it must lie in 0\.\.2"):
        call(red, at=[0.0, 3.0])
    with pytest.raises(UserError, match=r"keep is 1\.2; it is a share"):
        call(red, keep=1.2)
    with pytest.raises(UserError, match="check is 1;"):
        call(red, check=1)
    with pytest.raises(UserError, match="pictures is 0"):
        call(red, pictures=0)
    assert not (tmp_path / "out").exists()


def copied(run, target, **changes):
    """A run folder without its networks: settings changed, pictures and page as they were."""
    (target / "samples").mkdir(parents=True)
    settings = yaml.safe_load((run / "config.yaml").read_text()) | changes
    (target / "config.yaml").write_text(yaml.safe_dump(settings))
    (target / "report.html").write_text("")
    (target / "samples" / "before.safetensors").write_bytes((run / "samples" / "before.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "gone", "says"),
    [
        ({"method": "distil"}, "", "is not a run of align"),
        ({}, "report.html", "is not finished"),
        ({}, "samples/before.safetensors", "is not finished"),
        ({"full": True}, "", r"trained every weight \(--full\)"),
    ],
)
def test_runs_that_have_nothing_to_dial(runs, tmp_path, changes, gone, says):
    folder = copied(runs / "red", tmp_path / "run", **changes)
    if gone:
        (folder / gone).unlink()
    with pytest.raises(UserError, match=says):
        commands.dial([str(folder)], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"held_out": ["another cat"]}, "prompts of .* have changed"),
        ({"reward": ["redness"]}, r"The reward of .* cannot be read again: .* Or name it: --reward"),
    ],
)
def test_runs_that_have_changed_since(runs, tmp_path, changes, says):
    folder = copied(runs / "red", tmp_path / "run", **changes)
    (folder / "lora").symlink_to(runs / "red" / "lora")
    with pytest.raises(UserError, match=says):
        commands.dial([str(folder)], out=tmp_path / "out")


def test_adapters_of_two_bases_are_not_mixed(runs, tmp_path):
    other = copied(runs / "red", tmp_path / "other", model="shapes")
    (other / "lora").symlink_to(runs / "red" / "lora")
    with pytest.raises(UserError, match="Mix adapters of one base"):
        commands.dial([str(runs / "red"), str(other)], out=tmp_path / "out")
