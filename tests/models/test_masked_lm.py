"""Token models: the loss's bound, relaxed states, files, and the exact model of independent places."""

import pytest
import torch

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, UserError
from tropism.models.load import load_model
from tropism.models.masked_lm import Convolutions, Independent, MaskedModel, Shape, load, loss, save
from tropism.process.masked import Masked
from tropism.worlds import dna, utr

SMALL = Shape(("A", "C", "G"), 12, hidden=8, kernel=3, dilations=(1, 2), repeats=1)
P = Masked(3)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Convolutions(SMALL)


def test_relaxed_states_are_the_tokens(network):
    x = torch.randint(4, (5, 12))
    torch.testing.assert_close(network(torch.nn.functional.one_hot(x, 4).float()), network(x))


def test_decoded_tokens_are_sure(network):
    model, x = MaskedModel(network), torch.tensor([[3, 0, 3, 2] * 3])
    probs = model.x0(x, model.predict(x, 0.5, None, 1.0), 0.5)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 12))
    assert torch.equal(probs[0, 1], torch.tensor([1.0, 0, 0]))
    assert probs[0, 0].max() < 1
    assert model.calls["network"] == 1


def test_files_keep_the_network(network, tmp_path):
    save(network, tmp_path / "n.safetensors")
    again = load(tmp_path / "n.safetensors")
    assert again.shape == SMALL
    x = torch.randint(4, (2, 12))
    torch.testing.assert_close(again(x), network(x), rtol=0, atol=5e-3)


def test_the_loss_of_the_exact_model_is_the_entropy():
    """For independent tokens with known chances the bound is tight: the mean of -log p, and no network does better."""
    p = torch.tensor([0.6, 0.3, 0.1])
    exact = Independent(p.tolist(), SMALL)
    tokens = torch.multinomial(p, 12 * 4000, replacement=True, generator=torch.Generator().manual_seed(0)).reshape(
        4000, 12
    )
    t = (torch.arange(4000) + 0.5) / 4000
    noise = torch.randn(4000, 12, generator=torch.Generator().manual_seed(1))
    entropy = -(p * p.log()).sum().item()
    assert loss(exact, P, tokens, t, noise).item() == pytest.approx(entropy, rel=0.03)
    wrong = Independent([0.3, 0.3, 0.4], SMALL)
    assert loss(wrong, P, tokens, t, noise) > entropy + 0.1


def test_training_learns_a_rule():
    """Every other token repeats the one before it: a few updates bring the loss below that of independent tokens."""
    torch.manual_seed(0)
    network = Convolutions(Shape(("A", "C", "G"), 12, hidden=24, kernel=3, dilations=(1, 1), repeats=1))
    optimiser = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for i in range(150):
        g = torch.Generator().manual_seed(i)
        tokens = torch.randint(3, (64, 6), generator=g).repeat_interleave(2, 1)
        t = ((torch.arange(64) + torch.rand(1, generator=g)) / 64).clamp_min(0.01)
        value = loss(network, P, tokens, t, torch.randn(64, 12, generator=g))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    assert value.item() < 0.8 < 1.0986, "half of the entropy of independent tokens is log(3) / 2 = .55"


def test_the_bundled_rna_model_is_its_prior():
    model = load_model("utr", lora=None)
    drawn = torch.cat(
        [sample(model, Batch([""] * 200), Draw(s, 0, tuple(range(200))), steps=8, guidance=1.0) for s in range(4)]
    )
    share = torch.bincount(drawn.flatten(), minlength=4).double() / drawn.numel()
    torch.testing.assert_close(share, torch.tensor(utr.PRIOR).double(), rtol=0, atol=0.01)
    with pytest.raises(UserError, match=r"utr is a model of token sequences.*Use it with guide"):
        load_model("utr", height=64)


def test_the_bundled_dna_model_draws_its_world():
    """Words, bases and sites of its samples are those of the world; the loss on fresh sequences is below that of single bases."""
    model = load_model("dna", lora=None)
    batch = Batch([""] * 32)
    drawn, real = sample(model, batch, Draw(0, 0, batch.index), steps=25, guidance=1.0), dna.sequences(1000, 10**6)
    assert torch.corrcoef(torch.stack([dna.words(drawn), dna.words(real)]))[0, 1] > 0.95
    assert dna.gc(drawn).mean().item() == pytest.approx(dna.gc(real).mean().item(), abs=0.03)
    t, noise = (torch.arange(256) + 0.5) / 256, torch.randn(256, 200, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(real.flatten(), minlength=4).double() / real.numel()
    alone = -(share * share.log()).sum().item()
    held = loss(model.network, model.process, real[:256], t, noise).item()
    assert held < alone - 0.02
