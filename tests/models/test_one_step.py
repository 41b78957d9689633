"""One-step upscalers: any network as a model, its base, its gradient, its mistakes; and the example runs."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tropism.align.rollout import Chain, plain, sample, sweep
from tropism.core import TERMINAL, Batch, Draw, Stream, UserError
from tropism.models.load import load_model
from tropism.models.one_step import OneStep

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_upscaler.py"
BATCH = Batch(["a", "b", "c"], low_res=torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double())
DRAW = Draw(3, 0, BATCH.index)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = torch.nn.Conv2d(3, 12, 3, padding=1).double()
        for p in self.mix.parameters():
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator))

    def forward(self, low_res):
        return torch.nn.functional.pixel_shuffle(torch.tanh(self.mix(low_res)), 2) / 2 + 0.5


def chain_of(model, reward):
    cond = model.encode(BATCH, DRAW)
    times = model.process.times(1, cond.shape)
    x, first = model.start(cond, DRAW, times)
    return Chain(model, reward, BATCH, cond, DRAW, tuple(times.tolist()), 1.0, (True,), first), x


def test_a_sample_is_the_networks_picture():
    network = Small()
    pictures = sample(OneStep(network, 2), BATCH, DRAW, steps=1, guidance=1.0)
    torch.testing.assert_close(pictures, network(BATCH.low_res).detach().clamp(0, 1), rtol=1e-12, atol=1e-12)


def test_the_gradient_is_a_central_difference():
    model = OneStep(Small(), 2)
    reward = lambda images, batch: (images * torch.linspace(0, 1, 10, dtype=torch.float64)).sum((1, 2, 3)).sin()
    parts, x = chain_of(model, reward)
    weight, bias = parameters = list(model.trainable().values())
    gradient = sweep(parts, x, lambda r: -r, parameters).gradient
    for mine, expected in zip(gradient, plain(parts, x, lambda r: -r, parameters).gradient, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    score = lambda: -reward(model.decode(model.predict(x, 1.0, parts.cond, 1.0)), BATCH).sum().item()
    with torch.no_grad():
        for p, g, at in ((weight, gradient[0], (2, 1, 0, 1)), (bias, gradient[1], (5,))):
            found = 0
            for sign in (1, -1):
                p[at] += sign * 1e-5
                found += sign * score() / 2e-5
                p[at] -= sign * 1e-5
            assert found == pytest.approx(g[at].item(), rel=1e-5)


def test_base_is_the_network_as_it_was():
    model = OneStep(Small(), 2)
    cond = model.encode(BATCH, DRAW)
    x = torch.zeros(3, *cond.shape, dtype=torch.float64)
    before = model.predict(x, 1.0, cond, 1.0)
    with torch.no_grad():
        model.network.mix.weight.add_(0.1)
    after = model.predict(x, 1.0, cond, 1.0)
    with model.base():
        with model.base():
            assert torch.equal(model.predict(x, 1.0, cond, 1.0), before)
        assert torch.equal(model.predict(x, 1.0, cond, 1.0), before)
    assert torch.equal(model.predict(x, 1.0, cond, 1.0), after)
    assert not torch.equal(before, after)
    assert model.calls == {"network": 15, "backward": 0, "decode": 0}


def test_noise_reaches_a_network_that_takes_it():
    class Noisy(OneStep):
        def upscale(self, low_res, noise, run):
            return run(low_res) + noise / 100

    network = Small()
    model = Noisy(network, 2)
    noise = DRAW(Stream.PRIOR, 0, (3, 8, 10)).double()
    expected = (network(BATCH.low_res) + noise / 100).clamp(0, 1)
    torch.testing.assert_close(
        sample(model, BATCH, DRAW, steps=1, guidance=1.0), expected.detach(), rtol=1e-12, atol=1e-12
    )


def test_what_does_not_train_is_not_counted_as_trainable():
    network = Small()
    network.mix.bias.requires_grad_(False)
    assert list(OneStep(network, 2).trainable()) == ["mix.weight"]


def test_mistakes():
    model = OneStep(Small(), 3)
    with pytest.raises(
        UserError, match=r"makes \(3, 3, 8, 10\) of \(3, 3, 4, 5\); at scale 3 it must be \(3, 3, 12, 15\)"
    ):
        sample(model, BATCH, DRAW, steps=1, guidance=1.0)
    model = OneStep(Small(), 2)
    with pytest.raises(UserError, match=r"must lie in 1\.\.1\. Try --steps 1"):
        sample(model, BATCH, DRAW, steps=4, guidance=1.0)
    with pytest.raises(UserError, match="draws in 1 step, and 2 were asked for"):
        model.start(model.encode(BATCH), DRAW, torch.tensor([1.0, 0.5, TERMINAL]))
    with pytest.raises(UserError, match=r"this upscaler has none\. Use --guidance 1"):
        model.check_request(2.0)
    model.check_request(None)
    with pytest.raises(UserError, match="the batch has none"):
        model.encode(replace(BATCH, low_res=None))


def test_the_example_runs_and_is_a_model_by_its_file():
    assert len(EXAMPLE.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location("own_upscaler", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng(devices=[]):
        before, after = module.main(updates=12)
    assert after < 0.9 * before
    model = load_model(f"{EXAMPLE}:Mine")
    batch = module.pictures(0, count=2)
    assert sample(model, batch, Draw(0, 0, batch.index), steps=1, guidance=1.0).shape == (2, 3, 16, 16)
