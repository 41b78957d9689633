"""What the solids world's classifiers learn from, and that every stage runs and resumes."""

import numpy as np
import pytest
import torch

from tropism.commands import pretrain
from tropism.core import Batch, UserError
from tropism.models.load import load_model
from tropism.run import pretrain_solids as recipe
from tropism.run import pretrain_solids_model as recipe_of_model
from tropism.worlds import solids, solids_features, solids_library, weights
from tropism.worlds.solids_features import HEADS
from tropism.worlds.solids_oracle import OracleModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("solids")


@pytest.fixture(scope="module")
def bank(folder):
    return recipe.bank(folder / ".train" / "pictures", recipe.QUICK.views, recipe.TRAINING)


def test_spoilt_pictures_say_what_they_show(bank):
    pictures, wanted = recipe.spoilt_solids(bank, solids.scenes(), np.random.default_rng(0), 600)
    assert pictures.shape == (600, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
    for head, target in wanted.items():
        assert target.shape == (600, len(HEADS[head])) and target.min() >= 0
        torch.testing.assert_close(target.sum(1), torch.ones(600))
    sure = wanted["colour"].max(1).values
    assert 0.2 < (sure == 1).float().mean() < 0.5  # neither mixed nor half-transparent
    # A third are half-transparent. Their views are as sure as they are opaque, and they differ less from their backgrounds.
    opaque = (wanted["view"].max(1).values - 1 / 4) * 4 / 3
    assert 0.2 < (opaque < 0.999).float().mean() < 0.45
    contrast = (pictures[:, :, 12:20, 12:20].mean((2, 3)) - pictures[:, :, :3, :3].mean((2, 3))).norm(dim=1)
    assert contrast[opaque < 0.3].mean() < 0.4 * contrast[opaque == 1].mean()


def test_clean_pictures_have_their_scenes_colours_and_labels(bank):
    """On a background that no solid is lost on: the colour nearest to what is opaque is the one that the target names."""
    rng, count = np.random.default_rng(1), 200
    camera = rng.integers(len(bank.cameras), size=count)
    light, cover, hot = recipe._clean(bank, solids.scenes(), rng, np.zeros(count, int), camera)
    colours = torch.tensor(list(solids.COLOURS.values()))
    shown = torch.stack(
        [(x[:, c > 0.9] / c[c > 0.9]).quantile(0.9, dim=1) for x, c in zip(light, cover[:, 0], strict=True)]
    )
    assert (torch.cdist(shown, colours).argmin(1) == hot["colour"].argmax(1)).float().mean() > 0.97
    views = [bank.cameras.views()[c] for c in camera]
    assert [HEADS["view"][i] for i in hot["view"].argmax(1)] == views
    seen = hot["face"].argmax(1).bool()
    assert not seen[[v == "back" for v in views]].any() and seen[[v == "front" for v in views]].float().mean() > 0.5
    area = cover.sum((1, 2, 3))
    assert area[hot["size"].argmax(1) == 1].mean() > 1.8 * area[hot["size"].argmax(1) == 0].mean()


def test_the_one_that_rewards_never_sees_what_is_held_out(bank, folder, monkeypatch):
    seen = dict[str, set]()
    monkeypatch.setattr(recipe, "spoilt_solids", lambda of, pool, rng, n: seen.setdefault("last", set()).update(pool))
    monkeypatch.setattr(recipe, "train", lambda name, network, loss, *a, **k: pytest.raises(TypeError, loss, 0))
    for name, count in (("reward", 60), ("judge", 72)):
        recipe.train_classifier(name, folder / ".train", 1, recipe.QUICK.views)
        assert len(seen.pop("last")) == count


def test_a_classifier_learns(bank):
    """Twenty updates on one batch lower its loss: the slope is that of the targets."""
    torch.manual_seed(0)
    network = solids_features.new("reward")
    pictures, wanted = recipe.spoilt_solids(bank, solids.scenes(), np.random.default_rng(0), 32)
    optimiser, losses = torch.optim.Adam(network.parameters(), 3e-3), []
    for _ in range(25):
        logits = network.logits(pictures)
        loss = sum(torch.nn.functional.cross_entropy(logits[h], wanted[h]) for h in HEADS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_what_an_adapter_should_say():
    """At next to no signal the mean picture of what the row is shown: the picture's solid from the side that the words name."""
    known = solids_library.library(
        [s for s in solids.scenes(size="large") if s.solids[0].shape == "cube"][:2], azimuths=4, size=12
    )
    oracle, white = OracleModel(known), known.over([1.0, 1.0, 1.0])
    views = known.cameras.views()
    shows, asked = [known.scenes[1]] * 4, Batch(["a cube, front view"] * 4)
    told = [(True, True), (True, False), (False, True), (False, False)]
    x_t, t = torch.zeros(4, 3, 12, 12), torch.full((4,), 999)
    found = recipe_of_model.exact_mean(oracle, asked, shows, x_t, t, *torch.tensor(told).T)
    for row, (words, picture) in zip(found, told, strict=True):
        meant = [
            (not picture or w == 1) and (not words or v == "front")
            for w, v in zip(known.which.tolist(), views, strict=True)
        ]
        assert 0 < sum(meant) < len(known) or not (words or picture)
        torch.testing.assert_close(row, 2 * white[torch.tensor(meant)].mean(0) - 1, atol=0.02, rtol=0)


def test_every_stage_runs_and_its_files_are_read(bank, folder, monkeypatch, capsys):
    pretrain("solids", out=folder, quick=True)
    first = {f.name: f.read_bytes() for f in folder.glob("*.safetensors")}
    assert set(first) == {"reward.safetensors", "judge.safetensors"}
    assert capsys.readouterr().out.count("held-out solids: shape ") == 2
    pretrain("solids", out=folder, quick=True)  # nothing left to do
    assert {f.name: f.read_bytes() for f in folder.glob("*.safetensors")} == first
    monkeypatch.setattr(weights, "path", lambda name: folder / name.removeprefix("solids/"))
    solids_features.classifier.cache_clear()
    for name in ("reward", "judge"):
        network = solids_features.classifier(name)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert set(network.log_probs(torch.rand(2, 3, 32, 32))) == set(HEADS)
    solids_features.classifier.cache_clear()
    model = load_model(folder / "model", visual=folder / "adapter")
    batch = Batch(["a red cube, front view"], visual=torch.rand(1, 3, 32, 32), visual_scale=torch.ones(1))
    x = torch.zeros(1, *model.shape)
    seen, blind = (model.predict(x, 500, model.encode(b), 1.0) for b in (batch, Batch(batch.prompts)))
    assert model.shape == (3, 32, 32) and model.prediction == "v_prediction" and not torch.equal(seen, blind)
    with pytest.raises(UserError, match="solids"):
        pretrain("solid", out=folder, quick=True)


def test_prompts_say_what_is_shown_or_less():
    """Every word is left out a fifth of the time, and none is ever wrong."""
    rng, scene = np.random.default_rng(0), solids.parse("a large red cube")
    asked = [solids.parse(recipe_of_model.worded(rng, scene, "back")) for _ in range(400)]
    assert all(scene.fits(a) and a.view in (None, "back") for a in asked)
    said = [len(a.solids[0].said) + (a.view is not None) for a in asked]
    assert np.mean(said) == pytest.approx(4 * recipe_of_model.KEPT, abs=0.15)


def test_another_side_is_of_the_same_solid():
    known = solids_library.library(solids.scenes(size="large")[:3], azimuths=4, elevations=(0.0, 45.0), size=8)
    rows = list(range(len(known)))
    others = recipe_of_model.another_side(np.random.default_rng(0), known, rows)
    assert known.which[others].tolist() == known.which[rows].tolist() and others != rows
