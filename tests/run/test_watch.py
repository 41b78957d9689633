"""A run is watched: statistics of its samples, drift, alarms and what follows them, the best weights; bit for bit after a resume."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_pipeline
from toy import ToyModel

from tropism import commands
from tropism.commands.train import _seldom
from tropism.core import Batch, Draw, Info, Stream, UserError, generator
from tropism.run import looks, watch
from tropism.run.evaluate import Evaluation
from tropism.run.optimiser import Optimiser
from tropism.run.sentinel import Seen, collapsed
from tropism.run.signals import Interrupted

PROMPTS = ["a cat", "a dog", "an owl", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_pipeline(tmp_path_factory.mktemp("model")))


def align(folder, out, **more):
    """Brightness up: what is held out, its opposite, falls with every update."""
    how = {"batch": 4, "prompts": PROMPTS, "held_out": PROMPTS * 2, "evaluate_prompts": 8, "checkpoint_every": 1}
    how |= {"reward": bright, "watch": [dim], "updates": 3, "evaluate_every": 1, "lr": 3e-2, "doctor": False}
    options = {"steps": 2, "guidance": 2.0, "k": 1}
    return commands.align("draft", model=folder, out=out, **{**how, **more}, options=options)


def bright(images, batch):
    return images.mean((1, 2, 3))


def dim(images, batch):
    return -images.mean((1, 2, 3))


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


# ---------------------------------------------------------------------------------------------------- statistics


def test_statistics_of_pictures_that_are_known():
    black, half = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    half[..., :4] = 1.0
    pictures = torch.cat([black, half])
    assert looks.dark_share(pictures).tolist() == [1.0, 0.5]
    assert looks.colour_entropy(pictures).tolist() == [0.0, 1.0]  # two colours, equally often: one bit
    assert looks.edge_density(pictures).tolist() == pytest.approx([0.0, 1 / 8])  # one column of eight
    points = looks.features(pictures)
    assert points[1].reshape(4, 4, 4)[3].sum(0).tolist() == [
        0,
        2,
        0,
        0,
    ]  # the edge lies in the second column of cells: half of each
    expected = math.sqrt((points[0] - points[1]).square().mean().item())
    assert looks.variety(points, ["a", "b"]) == pytest.approx(expected)
    assert looks.frechet(points, points) == 0
    assert looks.frechet(points + 0.5, points) == pytest.approx(0.25 * points.shape[1])


def test_variety_is_that_of_equal_prompts_where_there_are_some():
    points = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    assert looks.variety(points, ["a", "a", "b"]) == 1.0
    assert looks.variety(points, ["a", "b", "c"]) == pytest.approx((1 + 10 + 9) / 3)
    assert math.isnan(looks.variety(points[:1], ["a"]))


def test_the_vendi_score_counts_different_samples():
    near, far = torch.zeros(6, 2, dtype=torch.float64), 100.0 * torch.eye(6, dtype=torch.float64)
    assert looks.vendi(near, 1.0) == pytest.approx(1.0)
    assert looks.vendi(far, 1.0) == pytest.approx(6.0)
    assert looks.vendi(torch.cat([far[:3], far[:3]]), 1.0) == pytest.approx(3.0)


def line(update, variety=1.0, colours=4.0, dark=0.1):
    return {"update": update, "samples/variety": variety, "samples/colour_entropy": colours, "samples/dark_share": dark}


def test_a_collapse_is_named_and_ordinary_change_is_not():
    start = [line(u) for u in range(1, 7)]
    assert collapsed(start) == ""
    assert collapsed([*start, *(line(u, variety=0.3, colours=1.1, dark=0.6) for u in range(7, 10))]) == ""
    assert "20% of the variety" in collapsed([*start, *(line(u, variety=0.2) for u in range(7, 10))])
    assert "20% of the colours" in collapsed([*start, *(line(u, colours=0.8) for u in range(7, 10))])
    assert "95% of the samples' pixels are dark" in collapsed([*start, *(line(u, dark=0.95) for u in range(7, 10))])
    assert collapsed([line(u, dark=0.95) for u in range(1, 10)]) == ""  # dark from the start
    assert collapsed([*start, line(7, variety=0.0), line(8)]) == ""  # one odd batch


def test_what_is_not_trained_on_and_not_watched_is_never_seen():
    columns = {n: torch.arange(4.0) for n in ("reward", "watch/dim", "gold_taste", "parser/all", "jpeg_kB", "part")}
    columns["watch/dim"] = torch.tensor([1.0, math.nan, -math.inf, 3.0])
    seen = watch.seen_of(3, Evaluation(torch.zeros(4, 3, 2, 2), columns, ["a"] * 4))
    assert set(seen.held_out) == {"dim"} and seen.held_out["dim"].tolist() == [1, 1, 1, 3]


# ---------------------------------------------------------------------------------------------------- runs


def test_an_alarm_is_named_and_the_best_weights_are_kept(folder, tmp_path, capsys):
    run = align(folder, tmp_path / "run")
    found = lines(run.out)
    assert "over-optimised: since update 0" in found[-1]["alarm"] and "dim fell" in found[-1]["alarm"]
    assert found[-1]["best"] == 0 and "alarm" not in found[1]
    assert "! over-optimised" in capsys.readouterr().out
    last, best = adapter(run.out / "lora"), adapter(run.out / "best")
    ups = [n for n in last if "lora_B" in n]
    assert any(last[n].any() for n in ups) and not any(best[n].any() for n in ups)  # the best was the base model
    page = (run.out / "report.html").read_text()
    assert "over-optimised" in page and "Vendi score" in page
    assert run.result.updates == 3


def test_stop_ends_with_the_best_weights(folder, tmp_path):
    run = align(folder, tmp_path / "run", on_alarm="stop")
    assert run.result.updates == 2  # two evaluations in a row have said so
    ups = [v for n, v in adapter(run.out / "lora").items() if "lora_B" in n]
    assert ups and not any(v.any() for v in ups)  # the best were those of the base model
    assert run.after.columns["reward"].tolist() == pytest.approx(run.before.columns["reward"].tolist())
    assert torch.equal(run.after.images, run.before.images)


def test_shrink_goes_back_and_goes_on_at_half_the_rate(folder, tmp_path):
    run = align(folder, tmp_path / "run", on_alarm="shrink", updates=4)
    again = lines(run.out)
    assert "alarm" in again[2] and run.result.updates == 4
    assert again[3]["held_out/reward"] < again[2]["held_out/reward"]  # it was set back
    saved = sorted((run.out / "checkpoints").glob("step-*/state.json"))[-1]
    assert json.loads(saved.read_text())["slowed"] == 0.25  # alarms at 2 and at 4: two evaluations in a row each


def test_a_resumed_run_sees_the_same(folder, tmp_path):
    reaction = "shrink"
    whole = align(folder, tmp_path / "whole", on_alarm=reaction, updates=4)

    def stop(update, info):
        if update == 3:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, Interrupted)):
        align(folder, tmp_path / "broken", on_alarm=reaction, updates=4, callback=stop, checkpoint_every=2)
    rest = align(folder, tmp_path / "broken", on_alarm=reaction, updates=4, resume=True, checkpoint_every=2)
    ours, theirs = adapter(whole.out / "lora"), adapter(rest.out / "lora")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    told = lambda out: [{k: v for k, v in r.items() if k not in ("seconds", "spent")} for r in lines(out)]
    assert told(whole.out) == told(rest.out)


@pytest.mark.parametrize(
    ("updates", "every", "seen", "count"),
    [
        (60, 0, None, 2),
        (10, 10, None, 2),
        (11, 10, None, None),
        (60, 30, None, None),
        (60, 10, 2, 2),
        (60, 10, 3, None),
    ],
)
def test_a_run_that_is_looked_at_too_seldom_for_an_alarm_says_so_once(updates, every, seen, count):
    settings = {"updates": updates, "evaluate_every": every, "on_alarm": "keep"}
    said = _seldom(SimpleNamespace(settings=settings, watch={"dim": dim}), seen)
    assert [f"takes 3 evaluations, the base model's counted, and this run has {count}." in s for s in said] == [
        True
    ] * bool(count)
    for quiet in (
        {"watch": {}, "settings": settings},
        {"watch": {"dim": dim}, "settings": settings | {"on_alarm": "off"}},
    ):
        assert not _seldom(SimpleNamespace(**quiet), seen)
    settings["evaluate_every"] = 0
    assert not _seldom(SimpleNamespace(settings=settings, watch={"dim": dim}), 2)  # it was said before the run


def test_a_resumed_run_has_not_seen_what_came_after_its_checkpoint(tmp_path):
    """Killed after the evaluation at 6, which was the second that had fallen; its newest checkpoint is 4."""
    first = watch.Watch(tmp_path, None, None, None, 0, 4, 1.0)
    for u, held in ((0, 0.0), (3, -1.0), (6, -2.0)):
        first.seen[u] = Seen(u, torch.arange(8.0) + u, {"dim": torch.arange(8.0) + held})
    first._remember()
    again = watch.Watch(tmp_path, None, None, None, 0, 4, 1.0)
    assert "over-optimised" in again.alarm([])
    again.observe(5, Info(2), 0.0, 1.0)
    assert again.alarm([]) == "" and list(again.seen) == [0, 3] and again.verdict.falling == 1


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (2.0, 4)])
def test_watching_takes_at_most_a_hundredth_of_the_rows(guidance, rows, tmp_path, monkeypatch):
    """As shipped: at every update of 4 samples and 4 steps, and not much less in the end."""
    watching = watch.Watch(tmp_path, None, None, lambda u: Batch(["a"] * 4), 0, 4, guidance)
    monkeypatch.setattr(watch.Watch, "_distance", lambda *_: 0.5)
    info, asked, each = Info(4, images=torch.rand(4, 3, 4, 4)), 0, 16 * (1 + (guidance != 1))
    for update in range(1, 101):
        asked += "samples/output_distance" in watching.observe(update, info, each * (update - 1), each * update)
        assert rows * asked <= 0.01 * each * update
    assert rows * asked > 0.009 * each * 100 - rows


def test_watching_changes_no_weight_and_takes_few_rows(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "SHARE", 0.06)
    few = {"evaluate_every": 0, "held_out": PROMPTS[:2]}
    watched, alone = align(folder, tmp_path / "on", **few), align(folder, tmp_path / "off", on_alarm="off", **few)
    ours, theirs = adapter(watched.out / "lora"), adapter(alone.out / "lora")
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert lines(watched.out)[-1]["spent"]["forwards"] == lines(alone.out)[-1]["spent"]["forwards"]
    assert capsys.readouterr().out.count("What is watched can sound no alarm") == 1
    asked = sum("samples/output_distance" in line for line in lines(watched.out))
    assert asked >= 1 and 4 * asked <= watch.SHARE * lines(watched.out)[-1]["spent"]["forwards"]
    assert not any(name.startswith("samples/") for line in lines(alone.out) for name in line)


def test_the_distance_of_the_outputs_is_that_by_hand(tmp_path):
    model, batch = ToyModel(), Batch(["a", "b"])
    latents, update = torch.randn(2, *(2, 3, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 5
    watching = watch.Watch(tmp_path, model, None, lambda u: batch, 0, 4, 1.0)
    with torch.no_grad():
        for p in model.trainable().values():
            p += 0.1
    before = dict(model.calls)
    found = watching._distance(update, Info(2, latents=latents), batch)
    assert model.calls == before
    draw = Draw(0, update, batch.index[:1])
    cond = model.encode(batch[:1], draw)
    times = model.process.times(4, cond.shape).tolist()
    t = times[generator(0, Stream.WATCH, update).integers(0, 4)]
    noise = draw(Stream.WATCH, 0, tuple(latents.shape[1:])).double()
    x_t = model.process.alpha(t) * latents[:1] + model.process.sigma(t) * noise
    with torch.no_grad():
        out = model.predict(x_t, t, cond, 1.0)
        with model.base():
            base = model.predict(x_t, t, cond, 1.0)
    assert found == pytest.approx(((out - base).square().sum() / base.square().sum()).item()) and found > 0


@pytest.mark.parametrize("more", [{"on_alarm": "halt"}, {"watch": [dim, dim]}])
def test_bad_requests_are_named(folder, tmp_path, more):
    with pytest.raises(UserError, match=r"halt|twice"):
        align(folder, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_the_sentinel_of_a_recalled_run_is_the_same(tmp_path):
    first = watch.Watch(tmp_path, None, None, None, 0, 4, 1.0)
    for u in (0, 5, 10):
        first.seen[u] = Seen(u, torch.arange(8.0) + u, {"a/b": torch.arange(8.0) - u, "c": torch.arange(8.0)})
    first.returns, first.reference = {10: 0}, {1: torch.ones(2, 3)}
    first._remember()
    again = watch.Watch(tmp_path, None, None, None, 0, 4, 1.0)
    assert again.returns == {10: 0} and torch.equal(again.reference[1], torch.ones(2, 3))
    assert {u: set(s.held_out) for u, s in again.seen.items()} == {u: {"a/b", "c"} for u in (0, 5, 10)}
    assert torch.equal(again.seen[5].held_out["a/b"], torch.arange(8.0) - 5)
    assert again.verdict.best == 0


def test_going_back_takes_the_weights_and_halves_the_step():
    p = torch.nn.Parameter(torch.zeros(1))
    optimiser = Optimiser({"p": p}, lr=0.1, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0, clip=0.0, ema=0.5)

    def step(sign):
        optimiser.pace(1.0)
        optimiser.backward(sign * p.sum(), [1.0])
        optimiser.step(optimiser.norm())

    step(-1)
    assert p.item() == pytest.approx(0.1)  # Adam's first step is the rate
    optimiser.go_back({"p": torch.full((1,), 5.0)}, 0.5)
    assert optimiser.average["p"].item() == 5.0
    step(1)
    assert p.item() == pytest.approx(4.95)  # a first step again, without the old momentum, of half the rate
