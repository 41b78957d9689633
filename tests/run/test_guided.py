"""Guided runs as a user meets them: the folder, its numbers, an interrupted run, models of one's own, and what cannot be."""

import csv
import json

import pytest
import torch
from command_line import called
from PIL import Image
from tiny_families import BUILDERS, SIZE

from tropism import commands
from tropism.core import UserError
from tropism.models.masked_lm import Convolutions, Shape, save
from tropism.run import guided, guided_tokens, guided_value
from tropism.run.guided_table import best_of, quantiles
from tropism.worlds import molecules, utr

QUICK = {"model": "shapes", "reward": "jpeg-bytes", "samples": 4, "options": {"m": 2, "steps": 3}, "pool": 2}
PROMPTS = ["three red circles on sand", "two blue squares on sand", "one purple cross on brick"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return commands.guide("svdd", prompts=PROMPTS, out=tmp_path_factory.mktemp("guided") / "run", **QUICK)


def test_the_folder(run):
    names = {p.name for p in run.out.iterdir()}
    expected = {"config.yaml", "env.json", "metrics.jsonl", "samples", "samples.csv", "pictures", "guided.png"}
    assert expected | {"plain_guided.png", "quantiles.png", "report.html", "README.md"} <= names
    rows = list(csv.DictReader((run.out / "samples.csv").open()))
    assert [r["prompt"] for r in rows] == run.prompts == [PROMPTS[0], *PROMPTS]
    kept = torch.cat([piece.samples for piece in run.pieces])
    for i, row in enumerate(rows):
        pixels = torch.from_numpy(__import__("numpy").array(Image.open(run.out / "pictures" / f"{i:05d}.png")))
        assert torch.equal(pixels.permute(2, 0, 1), kept[i])
        assert float(row["reward"]) == pytest.approx(torch.cat([p.rewards for p in run.pieces])[i].item(), rel=1e-6)
    page = (run.out / "report.html").read_text()
    assert "best of N, equal network rows" in page and "<script" not in page
    assert "No weight was changed" in (run.out / "README.md").read_text()


def test_rewards_are_those_of_the_pictures(run):
    """jpeg-bytes: minus the kilobytes of the picture that is kept."""
    from tropism.rewards.jpeg import true_bytes

    for piece in run.pieces:
        kept = -true_bytes(guided.shown(piece.samples)).double() / 1000
        torch.testing.assert_close(piece.rewards, kept, rtol=0.01, atol=0.01)


def test_costs_are_said_as_they_were(run):
    m, steps = 2, 3
    plain, _, _, line = run.table
    assert (line.network, line.rewards) == (2 * steps * m, (steps + 1) * m)
    assert (plain.network, plain.rewards) == (2 * steps, 1)
    assert run.table[1].note == "N = 2"
    assert "a lower bound: 2 plain samples" in run.table[2].note


def test_twins_start_from_the_same_noise(tmp_path):
    """With one child a step and no choice the guided samples are the plain ones."""
    options = {"m": 1, "steps": 3, "select_start": False}
    run = commands.guide("svdd", prompts=PROMPTS, out=tmp_path / "run", **QUICK | {"options": options})
    for piece in run.pieces:
        torch.testing.assert_close(piece.twins.int(), piece.samples.int(), rtol=0, atol=1)


def test_an_interrupted_run_goes_on_and_ends_alike(run, tmp_path, monkeypatch):
    original, seen = guided.draw_piece, []

    def dies(plan, places):
        seen.append(places)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(plan, places)

    monkeypatch.setattr(guided, "draw_piece", dies)
    how = {"prompts": PROMPTS, "out": tmp_path / "run", **QUICK, "max_batch": 8}
    with pytest.raises(KeyboardInterrupt):
        commands.guide("svdd", **how)
    with pytest.raises(UserError, match="not empty"):
        commands.guide("svdd", **how)
    done = commands.guide("svdd", **how, resume=True)
    assert len(seen) == len(done.pieces) + 1, "the finished piece was not drawn again"
    whole = commands.guide("svdd", **how | {"out": tmp_path / "whole"})
    for a, b in zip(done.pieces, whole.pieces, strict=True):
        assert torch.equal(a.samples, b.samples)
        assert torch.equal(a.rewards, b.rewards)
    assert [json.loads(x)["update"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, len(done.pieces) + 1)
    )


def test_a_resume_with_other_settings_is_refused(run):
    with pytest.raises(UserError, match=r"begun with another .*reward"):
        commands.guide("svdd", prompts=PROMPTS, out=run.out, **QUICK | {"reward": "jpeg"}, resume=True)
    with pytest.raises(UserError, match=r"begun with another .*seed"):
        commands.guide("svdd", prompts=PROMPTS, out=run.out, **QUICK, seed=1, resume=True)


def test_a_resume_with_less_memory_draws_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(guided, "ROWS", 8)
    how = {"prompts": PROMPTS, "out": tmp_path / "run", **QUICK | {"samples": 9, "group": 2}}
    whole = commands.guide("svdd", max_batch=64, **how)
    pieces = sorted((tmp_path / "run" / "samples").iterdir())
    assert len(pieces) > 2
    pieces[-1].unlink()
    again = commands.guide("svdd", max_batch=2, **how, resume=True)
    assert sum(len(p.rewards) for p in again.pieces) == 9
    for one, other in zip(whole.pieces, again.pieces, strict=True):
        torch.testing.assert_close(other.rewards, one.rewards, rtol=1e-3, atol=5e-3)
    with pytest.raises(UserError, match="another size, precision or scheduler"):
        commands.guide("svdd", **how, height=128, resume=True)


def test_prompts_count_by_their_samples(tmp_path):
    """33 samples in groups of 32: the group of one weighs a thirty-third in every row of the table."""
    how = {"model": "utr", "samples": 33, "group": 32, "pool": 3, "options": {"m": 2, "steps": 4}}
    run = commands.guide("svdd", out=tmp_path / "run", **how)
    pool = torch.cat([p.pool.mean(1) for p in run.pieces])
    assert run.table[0].mean == pytest.approx(pool.mean().item())


def test_a_resume_with_another_file_of_the_same_name_is_refused(tmp_path):
    """Every distilled model is called model.safetensors, and a reward of one's own may be edited between two runs."""
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        (tmp_path / name).mkdir()
        save(Convolutions(Shape(tuple("ACGU"), 12, 16, 3, (1, 2), 1)), tmp_path / name / "model.safetensors")
    reward, value = tmp_path / "r.py", tmp_path / "v.py"
    reward.write_text("def r(tokens, batch):\n    return (tokens == 0).double().mean(1)\n")
    value.write_text("def v(x, t):\n    return (x == 0).double().mean(1)\n")
    how = {"reward": f"{reward}:r", "samples": 2, "pool": 1, "out": tmp_path / "run", "value": f"{value}:v"}
    how["options"] = {"m": 2, "steps": 3}
    file = lambda name: str(tmp_path / name / "model.safetensors")
    commands.guide("svdd", model=file("a"), **how)
    commands.guide("svdd", model=file("a"), resume=True, **how)
    with pytest.raises(UserError, match="another model"):
        commands.guide("svdd", model=file("b"), resume=True, **how)
    for edited, says in ((reward, "another reward"), (value, "another value")):
        kept = edited.read_text()
        edited.write_text(kept.replace("== 0", "== 1"))
        with pytest.raises(UserError, match=says):
            commands.guide("svdd", model=file("a"), resume=True, **how)
        edited.write_text(kept)


def test_a_damaged_piece_is_named(tmp_path):
    how = {"prompts": PROMPTS, "out": tmp_path / "run", **QUICK}
    commands.guide("svdd", **how)
    piece = sorted((tmp_path / "run" / "samples").iterdir())[0]
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(UserError, match=r"piece-0000.safetensors is damaged.*--resume"):
        commands.guide("svdd", **how, resume=True)


@pytest.mark.parametrize("method", [m for m in commands.GUIDES if m not in ("dps", "twisted")])
def test_every_method_on_the_command_line(method, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    words = ["--model", "shapes", "--reward", "jpeg-bytes", "--prompts", tmp_path / "prompts.txt", "--samples", 4]
    own = ["--m", 2] if method not in ("smc",) else ["--alpha", 0.2]
    more = ["--steps", 2, "--pool", 1, "--out", tmp_path / "run", "--threads", 1]
    assert called(monkeypatch, "guide", method, *words, *own, *more) == 0
    assert method in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("method", ["dps", "twisted"])
def test_by_the_gradient(method, tmp_path):
    options = {"steps": 2, **({"scale": 0.1} if method == "dps" else {"alpha": 0.5})}
    run = commands.guide(
        method, prompts=PROMPTS, out=tmp_path / "run", **QUICK | {"reward": "jpeg", "options": options}
    )
    assert torch.isfinite(torch.cat([p.rewards for p in run.pieces])).all()
    assert run.pieces[0].costs["backward"] > 0
    with pytest.raises(UserError, match=rf"guide {method} follows the reward's gradient"):
        commands.guide(method, prompts=PROMPTS, out=tmp_path / "no", **QUICK | {"options": {}})


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_other_families(family, tmp_path):
    """The same command on a diffusers folder; flow matching by its SDE."""
    folder, size = BUILDERS[family](tmp_path / "model"), {"height": SIZE, "width": SIZE}
    options = {"m": 2, "steps": 2}
    run = commands.guide(
        "svdd",
        model=str(folder),
        reward="jpeg-bytes",
        prompts=PROMPTS,
        out=tmp_path / "run",
        samples=3,
        options=options,
        **size,
    )
    assert torch.cat([p.samples for p in run.pieces]).shape == (3, 3, SIZE, SIZE)


OWN = """
import torch
from tropism.process.masked import Masked
from tropism.process.gaussian import VP

class Letters:
    process, shape = Masked(4), (6,)
    def predict(self, x_t, t, cond, guidance):
        return torch.full((*x_t.shape, 4), 0.25)
    def x0(self, x_t, out, t):
        return out
    def decode(self, x0):
        return x0

class Blobs:
    process, shape = VP(tuple(torch.linspace(.99, .01, 20).tolist()), eta=1.0), (3, 8, 8)
    def predict(self, x_t, t, cond, guidance):
        return 0.1 * x_t
    def x0(self, x_t, out, t):
        return self.process.x0(x_t, out, t, "sample")
    def decode(self, x0):
        return torch.sigmoid(x0)

class Nothing:
    pass

def zeros(tokens, batch):
    return (tokens == 0).sum(1).double()

def red(images, batch):
    return images[:, 0].mean((1, 2))
"""


def test_a_model_of_ones_own_needs_four_things(tmp_path):
    """predict, x0, process, decode; the rest has defaults, for tokens and for pictures."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    how = {"prompts": ["a", "b"], "samples": 20, "options": {"m": 4, "steps": 6}}
    letters = commands.guide("svdd", model=f"{file}:Letters", reward=f"{file}:zeros", out=tmp_path / "letters", **how)
    plain, *_, guided_ = letters.table
    assert guided_.mean > plain.mean + 2
    assert torch.cat([p.samples for p in letters.pieces]).shape == (20, 6)
    blobs = commands.guide("svdd", model=f"{file}:Blobs", reward=f"{file}:red", out=tmp_path / "blobs", **how)
    assert blobs.table[-1].mean > blobs.table[0].mean
    with pytest.raises(UserError, match=r"lacks process, predict, x0, decode, shape"):
        commands.guide("svdd", model=f"{file}:Nothing", reward=f"{file}:red", out=tmp_path / "no", **how)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "svd"}, "no method 'svd'. Did you mean 'svdd'"),
        ({"samples": 0}, "samples is 0"),
        ({"options": {"k": 1}}, "no option of svdd 'k'"),
        ({"options": {"m": 0}}, "m is 0; it must be at least 1"),
        ({"options": {"steps": 0}}, "steps is 0"),
        ({"eta": 0.0}, "eta is 0, a deterministic sampler.*--eta 1"),
        ({"eta": -1.0}, "eta is -1"),
        ({"pool": -1}, "pool is -1"),
        ({"value": "median"}, "mode is 'median'"),
        ({"value": "soft"}, "for models of tokens"),
        ({"value": "mean", "model": "utr", "reward": "utr-load", "prompts": None}, "tokens have no mean"),
        ({"value": "soft", "model": "utr", "reward": "utr-load", "prompts": None}, "utr-load has none"),
        ({"value": "mean", "method": "best-of-n"}, "no use for --value mean"),
        ({"reward": "jpg-bytes"}, "jpeg-bytes"),
        ({"prompts": "no-such-file.txt"}, "no-such-file"),
        ({"model": "shape"}, "Did you mean 'shapes'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(change, says, tmp_path):
    how = {"method": "svdd", "prompts": PROMPTS, "out": tmp_path / "run", **QUICK} | change
    with pytest.raises(UserError, match=says):
        commands.guide(how.pop("method"), **how)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert commands.guide("svdd", prompts=PROMPTS, out=tmp_path / "run", **QUICK, dry_run=True) is None
    assert "4 samples of 3 prompts" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_law_of_the_best():
    """By order statistics, against the best of many draws with replacement."""
    pool = torch.randn(1, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = pool[0][torch.randint(9, (200_000, 3), generator=torch.Generator().manual_seed(1))].amax(1)
    values, weights = best_of(pool, 3)
    assert weights.sum().item() == pytest.approx(1)
    assert (values * weights).sum().item() == pytest.approx(draws.mean().item(), abs=0.01)
    assert quantiles(values, weights) == pytest.approx(
        tuple(draws.quantile(torch.tensor([0.1, 0.5, 0.9]).double()).tolist())
    )
    assert quantiles(torch.arange(1.0, 11)) == (1, 5, 9)


def test_tokens_need_no_prompt_and_no_reward(tmp_path):
    """Sequences as letters, strips, a logo, the hidden oracle; groups of one prompt are pieces of their own."""
    pytest.importorskip("RNA")
    run = commands.guide(
        "svdd",
        model="utr",
        out=tmp_path / "run",
        samples=12,
        group=8,
        pool=2,
        options={"m": 3, "steps": 6},
        max_batch=32,
    )
    assert [len(p.rewards) for p in run.pieces] == [8, 4]
    rows = list(csv.DictReader((run.out / "samples.csv").open()))
    assert {len(r["sequence"]) for r in rows} == {50} and set("".join(r["sequence"] for r in rows)) <= set("ACGU")
    for row in rows:
        tokens = torch.tensor([["ACGU".index(c) for c in row["sequence"]]])
        assert float(row["reward"]) == pytest.approx(utr.load(tokens).item(), rel=1e-6)
    assert {"sequences.png", "logo.png"} <= {p.name for p in run.out.iterdir()}
    page = (run.out / "report.html").read_text()
    assert "upstream AUGs" in page and "words like plain ones" in page
    assert run.table[-1].mean > run.table[0].mean


def test_a_logo_shows_what_is_sure():
    """A place with one letter is as high as the logo; one with all letters alike is empty."""
    tokens = torch.tensor([[0, i % 4] for i in range(40)])
    pixels = torch.from_numpy(__import__("numpy").array(guided_tokens.logo(tokens, "ACGU")))
    first, second = pixels[26:116, 10:28], pixels[26:116, 28:46]
    assert (first != 255).any(-1).any(1).double().mean() > 0.9
    assert (second == 255).all()


def test_token_measures():
    same, mixed = torch.zeros(6, 9, dtype=torch.long), torch.arange(54).reshape(6, 9) % 4
    assert guided_tokens.diversity(same) == 0
    pairs = torch.tensor([[0, 0], [1, 0], [0, 1]])
    by_hand = sum((a != b).double().mean().item() for i, a in enumerate(pairs) for b in pairs[i + 1 :]) / 3
    assert guided_tokens.diversity(pairs) == pytest.approx(by_hand)
    assert guided_tokens.likeness(mixed, mixed) == pytest.approx(1)
    plain = torch.randint(4, (40, 30), generator=torch.Generator().manual_seed(0))
    (_, before, after), *_ = guided_tokens.of_sets("utr", plain, plain)
    assert before == after < 0.9, "samples are held against other ones, not against themselves"


def test_letters_that_must_stay(tmp_path):
    options, motif = {"m": 3, "steps": 4}, "." * 10 + "GCCACC" + "...A"
    how = {"model": "utr", "reward": "gc-window", "samples": 6, "pool": 2, "options": options}
    run = commands.guide("svdd", out=tmp_path / "run", fixed=motif, **how)
    rows = list(csv.DictReader((run.out / "samples.csv").open()))
    assert all(r["sequence"][10:16] == "GCCACC" and r["sequence"][19] == "A" for r in rows)
    twins = torch.cat([p.twins for p in run.pieces])
    assert (twins[:, 10:16] == torch.tensor([2, 1, 1, 0, 1, 1])).all(), "the plain ones too"
    for bad, says in (("GCT", "letters T"), ("A" * 51, "51 places"), ("ggc", "letters c,g")):
        with pytest.raises(UserError, match=says):
            commands.guide("svdd", out=tmp_path / "no", fixed=bad, **how)
    with pytest.raises(UserError, match="Only models of token sequences"):
        commands.guide("svdd", prompts=PROMPTS, out=tmp_path / "no", fixed="A", **QUICK)


def test_pieces_have_noise_of_their_own(tmp_path, monkeypatch):
    """The same prompt twice, in two pieces: two pictures."""
    monkeypatch.setattr(guided, "ROWS", 1)
    same = [PROMPTS[0], PROMPTS[0] + " "]
    run = commands.guide("svdd", prompts=same, out=tmp_path / "run", **QUICK | {"samples": 2})
    assert len(run.pieces) == 2
    assert not torch.equal(run.pieces[0].samples, run.pieces[1].samples)


def test_dna_is_guided_and_trained_by_the_same_commands(tmp_path):
    how = {"samples": 8, "pool": 1, "options": {"m": 3, "steps": 8}}
    run = commands.guide("svdd", model="dna", out=tmp_path / "run", **how)
    assert run.table[-1].mean > run.table[0].mean
    assert "sites/FOXA" in (run.out / "report.html").read_text()
    commands.pretrain("dna", out=tmp_path / "dna", quick=True)
    assert (tmp_path / "dna" / "model.safetensors").stat().st_size > 250_000


# ------------------------------------------------------------------------------------------------ molecules


@pytest.fixture(scope="module")
def of_molecules(tmp_path_factory):
    return commands.guide(
        "svdd",
        model="molecules",
        out=tmp_path_factory.mktemp("molecules") / "run",
        samples=8,
        options={"m": 3, "steps": 8},
        pool=3,
    )


def test_molecules_are_drawn_and_valid(of_molecules):
    rows = list(csv.DictReader((of_molecules.out / "samples.csv").open()))
    assert all(r["smiles"] and r["sequence"].startswith("[") for r in rows)
    assert [float(r["reward"]) for r in rows] == pytest.approx(
        molecules.each(of_molecules.pieces[0].samples, molecules.qed).tolist(), abs=1e-6
    )
    assert Image.open(of_molecules.out / "molecules.png").width > 600
    card = (of_molecules.out / "README.md").read_text()
    assert "| valid | 1 | 1 |" in card and "| new |" in card and "distinct molecules" in card
    assert "Molecules, best first" in (of_molecules.out / "report.html").read_text()


def test_a_scaffold_stays(tmp_path):
    ring = "[C][=C][C][=C][C][=C][Ring1][=Branch1]"
    how = {"model": "molecules", "reward": "sa", "samples": 4, "pool": 0}
    run = commands.guide("svdd", out=tmp_path / "run", fixed=ring, options={"m": 2, "steps": 4}, **how)
    from rdkit import Chem

    ringed = Chem.MolFromSmarts("[#6]1~[#6]~[#6]~[#6]~[#6]~[#6]~1")
    assert all(Chem.MolFromSmiles(s).HasSubstructMatch(ringed) for s in molecules.text(run.pieces[0].samples))
    with pytest.raises(UserError, match=r"--fixed has 2 places and the letters \[Na\]"):
        commands.guide("svdd", out=tmp_path / "b", fixed="[C][Na]", **how)


# ------------------------------------------------------------------------------------------------ learned values


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(guided_value, "UPDATES", 60)


@pytest.mark.parametrize("model", ["utr", "shapes"])
def test_a_learned_value(model, tmp_path, capsys, short):
    how = {"model": model, "samples": 6, "roll_outs": 24, "value": "learned", "pool": 1}
    how |= {"reward": "utr-load"} if model == "utr" else {"reward": "jpeg-bytes", "prompts": PROMPTS}
    options = {"m": 3, "steps": 4}
    run = commands.guide("svdd", out=tmp_path / "run", options=options, **how)
    assert "follows the reward with r = " in capsys.readouterr().out
    kept = run.table[-1]
    assert kept.note == "its roll-outs counted"
    spent = sum(p.costs["rewards"] for p in run.pieces)
    assert kept.rewards == (24 + spent) / 6, "roll-outs and finished samples; none for noisy states"
    assert kept.rewards == 7, "four steps of three children by their true rewards would be 12 and more"
    before = torch.cat([p.samples for p in run.pieces])
    for piece in (run.out / "samples").iterdir():
        piece.unlink()
    again = commands.guide("svdd", out=run.out, options=options, **how, resume=True)
    assert torch.equal(torch.cat([p.samples for p in again.pieces]), before), "the value is read again, not learnt anew"


def test_a_value_of_ones_own(tmp_path):
    """The share of A's among the places decoded so far: known without a network call."""
    (tmp_path / "v.py").write_text("def v(x, t):\n    return (x == 0).double().mean(1)\n")
    (tmp_path / "r.py").write_text("def r(tokens, batch):\n    return (tokens == 0).double().mean(1)\n")
    how = {"model": "utr", "reward": f"{tmp_path}/r.py:r", "samples": 8, "options": {"m": 6, "steps": 25}, "pool": 4}
    run = commands.guide("svdd", value=f"{tmp_path}/v.py:v", out=tmp_path / "run", **how)
    assert run.table[-1].mean > run.table[0].mean + 0.15
    assert run.table[-1].rewards <= 6, "the children of the last step only, equal ones once"


@pytest.mark.slow
def test_a_learned_value_guides_to_what_it_learnt(tmp_path, monkeypatch):
    """The fit sees seven of eight roll-outs, rewards of mean 0 and spread 1, alpha in the same units; and it points upwards."""
    (tmp_path / "r.py").write_text("def r(tokens, batch):\n    return 100 + 40 * (tokens == 0).double().mean(1)\n")
    seen = {}

    def fitted(network, data, **how):
        seen.update(how, data=data)
        return guided_value_fitted(network, data, **how)

    guided_value_fitted, guided_value_learned, judged = guided_value.fitted, guided_value.learned, []
    monkeypatch.setattr(guided_value, "learned", lambda f: judged.append(f) or guided_value_learned(f))
    monkeypatch.setattr(guided_value, "fitted", fitted)
    monkeypatch.setattr(guided_value, "UPDATES", 400)
    how = {
        "model": "utr",
        "reward": f"{tmp_path}/r.py:r",
        "samples": 16,
        "roll_outs": 256,
        "value": "learned",
        "pool": 4,
    }
    run = commands.guide("svdd", out=tmp_path / "run", options={"m": 6, "steps": 16, "alpha": 0.5}, **how)
    assert len(seen["data"].rewards) == 224 and seen["loss"] == "linex"
    assert abs(seen["data"].rewards.mean()) < 0.1 and seen["data"].rewards.std().item() == pytest.approx(1, abs=0.1)
    spread = 40 * (0.22 * 0.78 / 50) ** 0.5
    assert seen["alpha"] == pytest.approx(0.5 / spread, rel=0.15)
    assert run.table[-1].mean > run.table[0].mean + 2 * spread
    states = torch.stack([torch.randperm(50) % 4, torch.zeros(50).long(), torch.ones(50).long()])
    said = judged[0](states, torch.full((3,), 0.01, dtype=torch.float64))
    assert said[1] > said[0] > said[2] and 100 - 2 * spread < said[0] < 120, "a value is in the reward's units"
    assert said[1] - said[2] > 2 * spread


def test_poor_roll_outs(tmp_path):
    base = {
        "model": "utr",
        "value": "learned",
        "roll_outs": 32,
        "samples": 2,
        "options": {"m": 2, "steps": 2},
        "pool": 0,
    }
    half = lambda tokens, batch: torch.where(tokens[:, 0] == 0, 1.0, -torch.inf)
    with pytest.raises(UserError, match="same reward"):
        commands.guide("svdd", reward=half, out=tmp_path / "a", **base)
    with pytest.raises(UserError, match=r"\+inf for"):
        commands.guide("svdd", reward=lambda t, b: torch.full((len(t),), torch.inf), out=tmp_path / "b", **base)


def test_what_cannot_be_learnt(tmp_path):
    how = {"model": "utr", "out": tmp_path / "run", "value": "learned"}
    with pytest.raises(UserError, match=r"roll_outs is 4.*--roll-outs 512"):
        commands.guide("svdd", roll_outs=4, **how)
    with pytest.raises(UserError, match=r"value_loss is 'linex' and alpha is 0"):
        commands.guide("svdd", value_loss="linex", **how)
    with pytest.raises(UserError, match=r"best-of-n judges no noisy states.*--value learned"):
        commands.guide("best-of-n", **how)
    with pytest.raises(UserError, match=r"have the same reward"):
        commands.guide("svdd", reward=same, roll_outs=16, samples=2, options={"m": 2, "steps": 2}, **how)
    assert not list((tmp_path / "run" / "samples").glob("*")) if (tmp_path / "run" / "samples").exists() else True


def same(tokens, batch):
    return torch.ones(len(tokens))
