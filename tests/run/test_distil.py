"""A guide that becomes weights, and guided and trained runs on one page."""

import csv
import json
import re

import pytest
import torch
from command_line import called
from PIL import Image

from tropism import commands
from tropism.align.distil import SNR, denoising_losses, distil
from tropism.commands.distil import _lessons
from tropism.core import Batch, UserError
from tropism.models.load import load_model
from tropism.models.masked_lm import Convolutions, Independent, MaskedModel, Shape, save
from tropism.run import compared, evaluate, guided, guided_table, guided_value
from tropism.run.guided import finished_run, redrawn
from tropism.worlds import shapes

PROMPTS = ["three red circles on sand", "two blue squares on sand", "one purple cross on brick"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    how = {
        "model": "shapes",
        "reward": "jpeg-bytes",
        "samples": 4,
        "options": {"m": 2, "steps": 3},
        "pool": 2,
        "seed": 3,
    }
    return commands.guide("svdd", prompts=PROMPTS, out=tmp_path_factory.mktemp("guided") / "run", **how)


@pytest.fixture(scope="module")
def of_molecules(tmp_path_factory):
    out = tmp_path_factory.mktemp("molecules") / "run"
    return commands.guide("svdd", model="molecules", out=out, samples=8, options={"m": 3, "steps": 8}, pool=3)


# ------------------------------------------------------------------------------------------------ the loss


def test_the_loss_of_tokens_is_the_bound():
    """Of the exact model of independent tokens, a token's mean loss over uniform times is its entropy."""
    p, n = torch.tensor([0.6, 0.3, 0.1]), 4000
    model = MaskedModel(Independent(p.tolist(), Shape(("A", "C", "G"), 6, hidden=8)))
    made = torch.Generator().manual_seed(0)
    clean = torch.multinomial(p, 6 * n, replacement=True, generator=made).reshape(n, 6)
    times = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    cond = model.encode(Batch([""] * n))
    found = denoising_losses(model, clean, cond, times, torch.randn(n, 6, generator=made), 1.0)
    assert found.mean().item() / 6 == pytest.approx(-(p * p.log()).sum().item(), rel=0.03)


def test_the_loss_of_pictures_is_the_weighted_error():
    model = load_model("shapes", lora=None)
    clean, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    times = model.process.times(8)[[0, 4, 7]]
    model.predict = lambda x, t, cond, guidance: torch.zeros_like(x)
    model.x0 = lambda x, out, t: clean + 0.5
    found = denoising_losses(model, clean, None, times, noise, 1.0)
    ratio = torch.tensor([(float(model.process.alpha(t)) / float(model.process.sigma(t))) ** 2 for t in times.tolist()])
    assert ratio.min() < SNR[0] and ratio.max() > SNR[1]
    torch.testing.assert_close(found, 0.25 * ratio.clamp(*SNR).to(found))


def test_all_times_of_the_chain_are_trained(monkeypatch):
    torch.manual_seed(0)
    model, seen = MaskedModel(Convolutions(Shape(tuple("ACGU"), 12, 8, 3, (1,), 1)), full=True), []
    clean = torch.randint(4, (5, 12))
    original = denoising_losses

    def losses(model, clean, cond, times, noise, guidance):
        seen.append((clean, times))
        return original(model, clean, cond, times, noise, guidance)

    monkeypatch.setattr("tropism.align.distil.denoising_losses", losses)
    batch = Batch([""] * 64, meta=[{"sample": i % 5} for i in range(64)])
    for micro in (None, 16):
        ((loss, info),) = list(
            distil(model, clean, batch, state={}, update=0, seed=0, micro_batch=micro, steps=8, guidance=1.0)
        )
        assert info.samples == 64 and info.calls == {"network": 64, "backward": 64}
        loss.backward()
    rows, times = (torch.cat([s[k] for s in seen[1:]]) for k in (0, 1))
    assert torch.equal(rows, clean[torch.arange(64) % 5]) and torch.equal(rows, seen[0][0])
    counts = torch.bincount((times * 8).round().long())[1:]
    assert len(counts) == 8 and counts.min() >= 1
    whole, split = loss.detach() * 0 + seen[0][1].sum(), times.sum()
    torch.testing.assert_close(whole.double(), split.double())


# ------------------------------------------------------------------------------------------------ what is learnt from


def test_lessons_are_the_best_of_each_prompt(tmp_path):
    """Also where a prompt is drawn in several groups; with the picture that belongs to the text."""
    how = {"model": "shapes", "reward": "jpeg-bytes", "prompts": PROMPTS[:2], "samples": 10, "group": 3, "pool": 1}
    run = commands.guide("best-of-n", out=tmp_path / "run", options={"m": 1, "steps": 2}, **how)
    teacher, model = finished_run(run.out), load_model("shapes", lora=None)
    clean, prompts = _lessons(model, teacher, 0.4)
    rewards, samples = teacher.joined("rewards"), teacher.joined("samples")
    best = []
    for text in PROMPTS[:2]:
        rows = [i for i, t in enumerate(run.prompts) if t == text]
        best += sorted(rows, key=lambda i: -rewards[i].item())[:2]
    best = sorted(best)
    assert [p.text for p in prompts] == [run.prompts[i] for i in best]
    assert [dict(p.meta)["sample"] for p in prompts] == list(range(4))
    torch.testing.assert_close(clean, model.latents(guided.shown(samples[best])), rtol=0, atol=1e-5)


def test_the_plain_model_draws_its_own_samples_again(run, tmp_path):
    """On the run's prompts, places, seed and fixed tokens: what a distilled model is compared on."""
    kept = finished_run(run.out)
    model = load_model("shapes", lora=None, eta=1.0)
    again = redrawn(model, kept, kept.reward(), 3, model.guidance, tmp_path / "samples")
    assert len(again) == len(run.pieces)
    apart = (torch.cat([p.samples for p in again]).int() - kept.joined("twins").int()).abs().max()
    assert apart <= 1
    how = {"model": "dna", "samples": 6, "group": 4, "pool": 1, "fixed": "TATAAATTTT", "seed": 2}
    letters = commands.guide("svdd", out=tmp_path / "dna", options={"m": 2, "steps": 4}, **how)
    kept = finished_run(letters.out)
    again = redrawn(load_model("dna"), kept, kept.reward(), 4, 1.0, tmp_path / "dna-samples")
    assert torch.equal(torch.cat([p.samples for p in again]), kept.joined("twins"))


def test_rewards_that_read_metadata_are_distilled(tmp_path):
    (tmp_path / "r.py").write_text(
        "import torch\n"
        "def r(tokens, batch):\n"
        "    return torch.tensor([float((row == m['want']).sum()) for row, m in zip(tokens, batch.meta)])\n"
    )
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a", "metadata": {"want": 0}}\n{"prompt": "b", "metadata": {"want": 3}}\n'
    )
    how = {"model": "dna", "reward": f"{tmp_path}/r.py:r", "prompts": tmp_path / "p.jsonl", "samples": 8, "pool": 1}
    run = commands.guide("svdd", out=tmp_path / "run", options={"m": 3, "steps": 4}, **how)
    found = commands.distil(run.out, out=tmp_path / "out", updates=1, batch=2)
    assert found.guided > found.plain


# ------------------------------------------------------------------------------------------------ distil and compare


def test_a_guide_becomes_weights(of_molecules, tmp_path, monkeypatch, capsys):
    words = ["align", "distil", "--from", of_molecules.out, "--out", tmp_path / "run", "--updates", 3, "--batch", 4]
    assert called(monkeypatch, *words) == 0
    assert "of the guide's gain is kept" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "its guide, svdd" in card and "| plain model |" in card and "| distil |" in card
    tuned = load_model(str(tmp_path / "run" / "weights" / "model.safetensors"))
    plain = load_model("molecules")
    x = torch.full((1, 40), 29)
    assert not torch.equal(tuned.network(x), plain.network(x))
    again = commands.distil(of_molecules.out, out=tmp_path / "again", updates=3, batch=4)
    assert torch.equal(load_model(tmp_path / "again" / "weights" / "model.safetensors").network(x), tuned.network(x))
    own = commands.guide(
        "best-of-n",
        model=str(tmp_path / "run" / "weights" / "model.safetensors"),
        reward="qed",
        samples=2,
        options={"m": 1, "steps": 4},
        pool=0,
        out=tmp_path / "used",
    )
    assert own.pieces[0].samples.shape == (2, 40)
    assert again.plain == pytest.approx(of_molecules.table[0].mean)
    assert again.guided == pytest.approx(of_molecules.table[-1].mean)
    assert again.share == pytest.approx((again.distilled - again.plain) / (again.guided - again.plain))


def test_much_practice_keeps_much_of_the_gain(tmp_path):
    """A tiny network of its own, guided to one letter: most of the gain is in the weights afterwards."""
    torch.manual_seed(0)
    save(Convolutions(Shape(tuple("ACGU"), 12, 16, 3, (1, 2), 1)), tmp_path / "base.safetensors")
    (tmp_path / "reward.py").write_text("def a(tokens, batch):\n    return (tokens == 0).double().mean(1)\n")
    how = {"model": str(tmp_path / "base.safetensors"), "reward": f"{tmp_path}/reward.py:a", "pool": 2}
    run = commands.guide("svdd", samples=64, options={"m": 6, "steps": 6}, out=tmp_path / "run", **how)
    found = commands.distil(run.out, out=tmp_path / "out", updates=150, batch=32, lr=3e-3)
    assert found.plain < 0.3 < 0.5 < found.guided
    assert found.share > 0.8


def test_guided_and_trained_runs_on_one_page(run, tmp_path, monkeypatch, capsys):
    trained = {"model": "shapes", "updates": 1, "batch": 2, "options": {"steps": 2}, "evaluate_prompts": 2}
    commands.align("alignprop", reward="jpeg", out=tmp_path / "ap", doctor=False, **trained)
    commands.distil(run.out, out=tmp_path / "distil", updates=2, batch=2)
    words = ["compare", run.out, tmp_path / "ap", tmp_path / "distil", "--out", tmp_path / "page"]
    assert called(monkeypatch, *words) == 0
    assert "it is cheaper there, but no substitute" in capsys.readouterr().out
    rows = {r["run"]: r for r in csv.DictReader((tmp_path / "page" / "compare.csv").open())}
    assert list(rows) == ["plain model", "svdd (run)", "alignprop (ap)", "distil (distil)"]
    assert float(rows["svdd (run)"]["q50"]) == pytest.approx(run.table[-1].values[1], abs=1e-6)
    assert float(rows["alignprop (ap)"]["rewards_before"]) == 2
    assert float(rows["alignprop (ap)"]["network_a_sample"]) == 2 * 2, "two steps with guidance"
    calls = [json.loads(line).get("calls", {}) for line in (tmp_path / "ap" / "metrics.jsonl").read_text().splitlines()]
    forward, recompute, backward = (sum(c.get(k, 0) for c in calls) for k in ("forward", "recompute", "backward"))
    assert forward == 2 * 2 * 2 and backward > 0
    assert float(rows["alignprop (ap)"]["network_before"]) == forward + recompute + 2 * backward
    guided_rows = sum(p.costs["network"] for p in run.pieces)
    assert float(rows["distil (distil)"]["network_before"]) == guided_rows + 2 * 2 * 2 * 3, (
        "its guide, then two updates of two with guidance"
    )
    page = (tmp_path / "page" / "report.html").read_text()
    assert "parser/count" in page and "<script" not in page
    kept = finished_run(run.out)
    made = [guided.shown(x) for x in (kept.joined("twins"), kept.joined("samples"))]
    entries = [compared.plain(kept), compared.guided("run", kept)]
    columns = dict(compared.measured(kept, entries))
    expected = [shapes.accuracy(x, run.prompts)["count"].double().mean().item() for x in made]
    assert columns["parser/count"] == pytest.approx(expected)
    assert (
        columns["diversity"] == pytest.approx([evaluate.diversity(x) for x in made])
        and len(set(columns["diversity"])) == 2
    )
    assert Image.open(tmp_path / "page" / "side_by_side.png").width > 300


def test_where_training_pays():
    line = lambda network: guided_table.Line("x", (0, 0, 0), 0.0, network, 0.0)
    entry = lambda before, network: compared.Entry(line(network), before, 0, torch.zeros(1))
    assert compared.pays_from(entry(900, 10), entry(0, 100)) == 10
    assert compared.pays_from(entry(900, 100), entry(0, 100)) == float("inf")
    assert compared.pays_from(entry(0, 10), entry(0, 100)) == 0
    assert compared.pays_from(entry(0, 100), entry(0, 100)) == float("inf")
    said = lambda a, b: compared.cheaper(entry(*a), entry(*b))
    assert "only from 10 samples on" in said((900, 10), (0, 100))
    assert "fewer network rows from the first sample on" in said((0, 10), (0, 100))
    assert "only up to 399 samples" in said((100, 20), (4096, 10))
    assert "never takes fewer" in said((900, 100), (0, 100))
    assert "as many network rows" in said((0, 100), (0, 100))


@pytest.mark.parametrize(
    ("trained", "guided_", "says"),
    [
        ((2.0, 900, 10), (1.0, 0, 100), "higher median .* only from 10 samples on: for fewer, no training is needed"),
        ((1.0, 900, 10), (1.0, 0, 100), "the same median as .* no training is needed"),
        (
            (0.5, 900, 10),
            (1.0, 0, 100),
            "lower median .* only from 10 samples on: it is cheaper there, but no substitute",
        ),
        ((0.5, 900, 100), (1.0, 0, 100), "lower median .* and never takes fewer network rows.$"),
    ],
)
def test_what_the_page_concludes(trained, guided_, says):
    line = lambda name, median, rows: guided_table.Line(name, (0, median, 0), median, rows, 0.0)
    entries = [
        compared.Entry(line("plain", 0, 10), 0, 0, torch.zeros(1), is_plain=True),
        compared.Entry(line("guide", guided_[0], guided_[2]), guided_[1], 0, torch.zeros(1)),
        compared.Entry(line("model", trained[0], trained[2]), trained[1], 0, torch.zeros(1), is_trained=True),
    ]
    (said,) = compared.verdicts(entries)
    assert re.search(says, said)


def test_plain_samples_weigh_as_their_prompts_guided_ones(tmp_path):
    """Three samples of one prompt and one of another: on the page as in the run's own report."""
    reward = tmp_path / "r.py"
    reward.write_text(
        "def r(images, batch):\n    return images.new_tensor([float(p[:3] == 'two') for p in batch.prompts])\n"
    )
    how = {"model": "shapes", "reward": f"{reward}:r", "samples": 4, "group": 3, "pool": 2, "seed": 1}
    run = commands.guide("svdd", prompts=PROMPTS[:2], out=tmp_path / "a", options={"m": 2, "steps": 2}, **how)
    pieces = list(run.pieces)
    three = guided.Piece(**{**vars(pieces[0]), "prompts": torch.zeros(3), "rewards": torch.zeros(3).double(),
                            "pool": torch.zeros(3, 6).double()})  # fmt: skip
    one = guided.Piece(**{**vars(pieces[0]), "prompts": torch.ones(1), "rewards": torch.ones(1).double(),
                          "pool": torch.ones(1, 2).double()})  # fmt: skip
    kept = finished_run(tmp_path / "a")
    uneven = type(kept)(kept.config, kept.asked, [three, one], kept.before)
    assert compared.plain(uneven).line.mean == pytest.approx(0.25)
    assert guided_table.rows_of("x", [three, one])[0].mean == pytest.approx(0.25)


def test_only_like_runs_stand_on_one_page(run, tmp_path):
    """Fixed places must be shared; plain samples drawn in another way have a row of their own; a lost piece is missed."""
    how = {"model": "utr", "samples": 4, "options": {"m": 2, "steps": 4}, "pool": 2}
    commands.guide("svdd", out=tmp_path / "x" / "run", **how)
    commands.guide("svdd", out=tmp_path / "held", fixed="GGGG", **how)
    with pytest.raises(UserError, match="another fixed"):
        commands.compare([str(tmp_path / "x" / "run"), str(tmp_path / "held")], out=tmp_path / "page")
    other = {**how, "options": {"m": 2, "steps": 3}}
    commands.guide("svdd", out=tmp_path / "y" / "run", **other)
    entries = commands.compare([str(tmp_path / d / "run") for d in "xy"], out=tmp_path / "page")
    names = [e.line.name for e in entries]
    assert names == ["plain model", "svdd (x run)", "plain model (y run)", "svdd (y run)"]
    assert entries[2].line.network < entries[0].line.network
    piece = sorted((tmp_path / "y" / "run" / "samples").glob("piece-*"))[-1]
    piece.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"is not the folder of a guided run|holds . of its"):
        finished_run(tmp_path / "y" / "run")
    (tmp_path / "kept").rename(piece)
    config = tmp_path / "y" / "run" / "config.yaml"
    config.write_text(config.read_text().replace("reward:", "prize:"))
    with pytest.raises(UserError, match="lacks reward"):
        finished_run(tmp_path / "y" / "run")


def test_how_much_is_kept():
    assert guided_table.share_kept(1.0, 3.0, 2.0) == 0.5
    assert "50% of the guide's gain" in guided_table.told_share(1.0, 3.0, 2.0)
    for guided_mean in (0.0, 1.0):
        assert "gained nothing" in guided_table.told_share(1.0, guided_mean, 0.5)
    assert "None of the guide's gain" in guided_table.told_share(1.0, 3.0, 0.5)
    assert "no finite reward" in guided_table.told_share(-float("inf"), 1.0, 0.5)


def test_a_learned_values_roll_outs_and_backward_rows_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(guided_value, "UPDATES", 20)
    torch.manual_seed(0)
    save(Convolutions(Shape(tuple("ACGU"), 12, 16, 3, (1, 2), 1)), tmp_path / "base.safetensors")
    (tmp_path / "r.py").write_text(
        "from torch.nn.functional import one_hot\n"
        "def a(x, batch):\n"
        "    return (x if x.is_floating_point() else one_hot(x, 4).double())[..., 0].mean(1)\n"
    )
    how = {"model": str(tmp_path / "base.safetensors"), "reward": f"{tmp_path}/r.py:a", "samples": 4, "pool": 1}
    learned = {"value": "learned", "roll_outs": 16, "options": {"m": 2, "steps": 4}}
    commands.guide("svdd", out=tmp_path / "a", **learned, **how)
    kept = finished_run(tmp_path / "a")
    assert compared.guided("a", kept).rewards == 16 and 16 < compared.guided("a", kept).network <= 16 * 4
    run = commands.guide("dps", options={"steps": 4, "scale": 1.0}, out=tmp_path / "b", **how)
    cost = run.pieces[0].costs
    assert run.table[-1].network == (cost["network"] + 2 * cost["backward"]) / 4 > cost["network"] / 4


def test_a_distilled_model_of_molecules_is_one_of_molecules(of_molecules, tmp_path):
    commands.distil(of_molecules.out, out=tmp_path / "run", updates=1, batch=2)
    file = tmp_path / "run" / "weights" / "model.safetensors"
    run = commands.guide(
        "svdd", model=str(file), reward="qed", samples=2, options={"m": 2, "steps": 4}, pool=1, out=tmp_path / "g"
    )
    assert "smiles" in (run.out / "samples.csv").read_text().splitlines()[0]
    assert (run.out / "molecules.png").exists() and "| gold |" in (run.out / "README.md").read_text()
    with pytest.raises(UserError, match="does not hold a model of tokens"):
        load_model(run.out / "samples" / "piece-0000.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not hold a model of tokens"):
        load_model(tmp_path / "odd.safetensors")


def test_what_cannot_be_distilled_or_compared(run, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a guided run"):
        commands.distil(tmp_path, out=tmp_path / "out")
    rna = commands.guide(
        "best-of-n", model="utr", samples=2, options={"m": 1, "steps": 2}, pool=1, out=tmp_path / "rna"
    )
    with pytest.raises(UserError, match="utr has no weights to train"):
        commands.distil(rna.out, out=tmp_path / "out")
    bare = commands.guide(
        "best-of-n", model="utr", samples=2, options={"m": 1, "steps": 2}, pool=0, out=tmp_path / "bare"
    )
    with pytest.raises(UserError, match="has no plain samples"):
        commands.distil(bare.out, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"best is 0"):
        commands.distil(rna.out, out=tmp_path / "out", best=0)
    with pytest.raises(UserError, match="at least two runs"):
        commands.compare([str(run.out)], out=tmp_path / "page")
    with pytest.raises(UserError, match="another model and another reward and another seed and another prompts"):
        commands.compare([str(run.out), str(rna.out)], out=tmp_path / "page")
    fewer = {"model": "shapes", "reward": "jpeg-bytes", "options": {"m": 2, "steps": 3}, "pool": 2, "seed": 3}
    for other in ({"prompts": PROMPTS, "samples": 3}, {"prompts": PROMPTS[::-1], "samples": 4}):
        out = tmp_path / f"other-{other['samples']}"
        commands.guide("svdd", out=out, **fewer, **other)
        with pytest.raises(UserError, match="another prompts and samples of each"):
            commands.compare([str(run.out), str(out)], out=tmp_path / "page")
    dna = commands.guide("svdd", model="dna", samples=2, options={"m": 2, "steps": 2}, pool=1, out=tmp_path / "dna")
    commands.distil(dna.out, out=tmp_path / "distilled", updates=1, batch=2)
    with pytest.raises(UserError, match=r"trained dna, but .* guided shapes"):
        commands.compare([str(run.out), str(tmp_path / "distilled")], out=tmp_path / "page")
    with pytest.raises(UserError, match="is a distilled run itself"):
        commands.distil(tmp_path / "distilled", out=tmp_path / "out")
    with pytest.raises(UserError, match="is not a run folder"):
        commands.compare([str(run.out), str(tmp_path / "none")], out=tmp_path / "page")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
