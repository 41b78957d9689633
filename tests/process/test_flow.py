"""Flow matching against diffusers' scheduler, closed forms, and the law of its SDE."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tropism.core import TERMINAL, UserError
from tropism.models import schedule
from tropism.process.gaussian import Flow, linear_coefficients

SD3 = {"shift": 3.0}
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SHAPE = (16, 24, 40)


def theirs(config, steps, even):
    """The scheduler with its times set as its pipeline sets them, for latents of SHAPE and patches of 2."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(12 * 20, 256, 4096, 0.5, 1.15) if scheduler.config.use_dynamic_shifting else None
    if even:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def ours(config, even, eta=0.0):
    read = {**FlowMatchEulerDiscreteScheduler(**config).config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    process = schedule.flow(read, eta)
    return Flow(**{**process.__dict__, "table": "even" if even else "scheduler"})


CONFIGS = [
    {},
    SD3,
    {"shift": 1.73},
    DYNAMIC,
    {**DYNAMIC, "time_shift_type": "linear"},
    {**SD3, "shift_terminal": 0.1},
]


@pytest.mark.parametrize("even", [False, True], ids=["scheduler", "even"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_times_are_the_schedulers(config, steps, even):
    if steps == 1 and "shift_terminal" in config:
        pytest.skip("a single time cannot be stretched")
    scheduler, process = theirs(config, steps, even), ours(config, even)
    times = process.times(steps, SHAPE)
    torch.testing.assert_close(times[:-1].float(), scheduler.sigmas[:-1], rtol=1e-6, atol=1e-6)
    assert times[-1] == TERMINAL
    torch.testing.assert_close(process.network_time(times[:-1]).float(), scheduler.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("config", [SD3, DYNAMIC], ids=["sd3", "dynamic"])
def test_steps_are_the_schedulers(config):
    scheduler, process = theirs(config, 10, True), ours(config, True)
    times, generator = process.times(10, SHAPE), torch.Generator().manual_seed(0)
    x = y = torch.randn(2, *SHAPE, generator=generator)
    for (t, s), told in zip(pairwise(times.tolist()), scheduler.timesteps, strict=True):
        velocity = torch.randn(x.shape, generator=generator)
        x = scheduler.step(velocity, told, x, return_dict=False)[0]
        y = process.reverse(y, process.x0(y, velocity, t), t, s).mean
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_the_linear_path_neither_grows_nor_shrinks():
    """a_t = 1 exactly, b_t = s - t: where DDIM's carried factor over 50 steps is 13, here it is 1."""
    process = ours(SD3, False)
    times = process.times(12).tolist()
    for (a, b), (t, s) in zip(linear_coefficients(process, times, "velocity"), pairwise(times), strict=True):
        assert math.isclose(a, 1, rel_tol=1e-12)
        assert math.isclose(b, max(s, 0.0) - t, rel_tol=1e-12)


def test_the_sizes_shift_is_that_of_the_paper():
    """At 4096 tokens FLUX.1-dev's shift is exp(1.15), at 256 exp(0.5)."""
    process = ours(DYNAMIC, True)
    for shape, mu in (((16, 128, 128), 1.15), ((16, 32, 32), 0.5)):
        t, shift = 0.5, math.exp(mu)
        assert math.isclose(process.times(2, shape)[1].item(), shift * t / (1 + (shift - 1) * t), rel_tol=1e-12)


@pytest.mark.parametrize("t", [1.0, 0.7, 0.01])
def test_x0_inverts_forward(t):
    process, generator = Flow(), torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64).unbind(0)
    x_t = process.forward(x0, t, noise)
    torch.testing.assert_close(process.x0(x_t, noise - x0, t), x0, rtol=1e-13, atol=1e-13)
    many = process.forward(x0, torch.tensor([t, TERMINAL, 0.5], dtype=torch.float64), noise)
    assert torch.equal(many[0], x_t[0])
    assert torch.equal(many[1], x0[1])


MEAN, SPREAD = 0.8, 0.5


def velocity(x, t):
    """The exact velocity field of N(MEAN, SPREAD^2) data."""
    alpha, variance = 1 - t, (1 - t) ** 2 * SPREAD**2 + t**2
    score = -(x - alpha * MEAN) / variance
    eps = -t * score
    return eps - (x - t * eps) / alpha if alpha else x - MEAN


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_the_law_at_the_end_is_the_datas(eta):
    """With the exact field the SDE of any noise level ends in the data's own mean and spread, as the ODE does."""
    process, generator = Flow(eta=eta, table="even"), torch.Generator().manual_seed(2)
    times = process.times(400).tolist()
    x = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    for t, s in pairwise(times):
        kernel = process.reverse(x, process.x0(x, velocity(x, t), t), t, s)
        x = kernel.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
        assert kernel.is_deterministic == (eta == 0 or s == TERMINAL)
    assert abs(x.mean().item() - MEAN) < 4 * SPREAD / 20_000**0.5
    assert abs(x.std().item() - SPREAD) < 0.015


def test_the_sde_is_flow_grpos_formula():
    """Its mean and standard deviation, written out by hand from the paper, at one step and at the first."""
    process = Flow(eta=0.7)
    x, x0 = torch.tensor([[1.5]], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)
    for t, s, under in ((0.6, 0.5, 0.6), (1.0, 0.9, 0.9)):
        v, dt, noise = (1.5 - 0.25) / t, s - t, 0.7 * math.sqrt(t / (1 - under))
        mean = 1.5 * (1 + noise**2 / (2 * t) * dt) + v * (1 + noise**2 * (1 - t) / (2 * t)) * dt
        kernel = process.reverse(x, x0, t, s)
        assert math.isclose(kernel.mean.item(), mean, rel_tol=1e-12)
        assert math.isclose(kernel.std, noise * math.sqrt(-dt), rel_tol=1e-12)


@pytest.mark.parametrize("shift", [0.2, 0.3, 0.45, 3.0])
def test_the_sde_starts_well_at_every_shift(shift):
    """Rounding may leave the first time at 1 - 2e-15, which is 1."""
    process = Flow(eta=0.7, shift=shift)
    t, s = process.times(10).tolist()[:2]
    kernel = process.reverse(torch.ones(1, 1).double(), torch.zeros(1, 1).double(), t, s)
    assert kernel.std == pytest.approx(0.7, rel=1e-6)  # eta sqrt(1 / (1 - sigma_s)) sqrt(1 - sigma_s)
    assert abs(kernel.mean.item()) < 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
    ],
)
def test_tables_without_a_formula(config, message):
    with pytest.raises(UserError, match=message):
        ours(config, False)


def test_numbers_that_cannot_be():
    with pytest.raises(UserError, match="eta is -1"):
        Flow(eta=-1)
    with pytest.raises(UserError, match="steps is 0"):
        Flow().times(0)
    with pytest.raises(UserError, match="'cosine'"):
        Flow(shift_type="cosine")
    with pytest.raises(UserError, match="DDIMScheduler"):
        schedule.flow({"_class_name": "DDIMScheduler"})
