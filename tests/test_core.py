"""Keyed noise, batches, the clamp, pieces."""

import itertools

import numpy as np
import pytest
import torch

from tropism import core
from tropism.core import Batch, Draw, Normal, Stream, UserError


def test_no_two_keys_share_four_numbers():
    """150,000 keys, neighbours in every coordinate: no two draws begin with the same four numbers (a 32-bit seed shares some)."""
    keys = itertools.product([0, 1, 2**40], [0, 7], range(25), range(5))
    draws = [core.noise(a, b, c, range(-1, 19), e, range(10), (4,)).reshape(-1, 4).numpy() for a, b, c, e in keys]
    blocks = [row.tobytes() for draw in draws for row in draw]
    assert len(blocks) == 150_000
    assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_every_key_has_a_generator_of_its_own(shape):
    """The fast path puts one generator back to each key's start; odd numbers of draws leave something over in it."""
    samples, ks = [2**40, -1, 0], [0, 3, 2**50]
    for draw, kind in ((core.noise, "standard_normal"), (core.uniform, "random")):
        found = draw(5, Stream.COMPLETION, 9, samples, 4, ks, shape)
        for i, sample in enumerate(samples):
            for j, k in enumerate(ks):
                own = core.generator(5, Stream.COMPLETION, 9, sample, 4, k)
                assert found[i, j].numpy().tobytes() == getattr(own, kind)(shape, dtype=np.float32).tobytes()


def test_noise_is_standard_normal_and_uniform_uniform():
    x = core.noise(0, Stream.PRIOR, 0, range(200), 0, range(5), (100,))
    u = core.uniform(0, Stream.PRIOR, 0, range(200), 0, range(5), (100,))
    assert x.shape == u.shape == (200, 5, 100)
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01
    assert abs(u.mean() - 0.5) < 0.005
    assert 0 <= u.min() <= u.max() < 1
    assert abs(np.corrcoef(x.reshape(-1, 100)[:-1].flatten(), x.reshape(-1, 100)[1:].flatten())[0, 1]) < 0.01


def test_a_sample_keeps_its_noise_in_any_batch():
    whole = Draw(5, 9, (0, 1, 2, 3))
    assert torch.equal(whole(Stream.PRIOR, 0, (2, 2))[2:], whole[2:](Stream.PRIOR, 0, (2, 2)))
    assert torch.equal(whole(Stream.PRIOR, 0, (2, 2))[[3, 0]], whole[[3, 0]](Stream.PRIOR, 0, (2, 2)))
    many = whole.many(Stream.PRIOR, 0, (3,), 4)
    assert torch.equal(many[:, 0], whole(Stream.PRIOR, 0, (3,)))
    assert torch.equal(many[:, :2], whole.many(Stream.PRIOR, 0, (3,), 2))
    assert torch.equal(many[2:], whole[2:].many(Stream.PRIOR, 0, (3,), 4))
    assert len(many.unique()) == many.numel()
    assert torch.equal(whole[torch.tensor([1, 2])](Stream.PRIOR, 0, (3,)), whole[1:3](Stream.PRIOR, 0, (3,)))


def test_batches_slice_by_row():
    b = Batch(["a", "b", "c"], reference=torch.arange(3.0)[:, None], meta=[{"i": i} for i in range(3)])
    part = b[[2, 0]]
    assert part.prompts == ["c", "a"]
    assert part.reference.flatten().tolist() == [2, 0]
    assert part.meta[0] == {"i": 2}
    assert part.index == part.rows == (2, 0)
    assert part.whole is b


def test_a_clamped_pixel_moves_only_inwards():
    x = torch.tensor([-0.5, -0.5, 0.5, 1.5, 1.5], requires_grad=True)
    push = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
    (core.clamp(x) * push).sum().backward()
    # descending a loss of slope +1 lowers the pixel: allowed at 1.5, blocked at -0.5
    assert x.grad.tolist() == [0.0, -1.0, 1.0, 1.0, 0.0]


def test_pieces_halve_when_memory_runs_out():
    seen = []

    def work(rows):
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("no")
        seen.append((rows.start, rows.stop))

    assert core.in_pieces(work, 10, 8) == 2
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]


def test_one_sample_out_of_memory_is_said():
    def never(rows):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(UserError, match="one sample at a time"):
        core.in_pieces(never, 4, 4)


def test_normal_log_prob_and_ratio():
    x, mean, other = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    p, q = Normal(mean, 0.3), Normal(other, torch.tensor([0.2, 0.5, 1.0, 2.0]).double().reshape(4, 1, 1))
    exact = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(p.log_prob(x), exact, rtol=1e-12)
    assert torch.allclose(p.log_ratio(q, x), p.log_prob(x) - q.log_prob(x), rtol=1e-10)
    with pytest.raises(UserError, match="eta"):
        Normal(mean, 0.0, is_deterministic=True).log_prob(x)


def test_wrong_shape_names_the_reward():
    def redness(images, batch):
        return images[:, 0].mean()

    with pytest.raises(UserError, match=r"redness.*4 samples"):
        core.scored(redness, torch.rand(4, 3, 8, 8), Batch(["a"] * 4))


def test_what_is_no_number_names_the_reward():
    with pytest.raises(UserError, match=r"<lambda>.*NoneType.*shape \(2,\)"):
        core.scored(lambda images, batch: None, torch.rand(2, 3, 8, 8), Batch(["a"] * 2))


def test_gather_without_processes_sorts_by_sample():
    values, index = core.gather(torch.tensor([30.0, 10.0, 20.0]), [3, 1, 2])
    assert values.tolist() == [10, 20, 30]
    assert index.tolist() == [1, 2, 3]
