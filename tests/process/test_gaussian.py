"""Our chain against diffusers' schedulers on the same latents, and against closed forms."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tropism.core import Normal, UserError
from tropism.models.schedule import prediction_of, process
from tropism.process.gaussian import PREDICTIONS, SPACINGS, VP, linear_coefficients

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def doubled(scheduler):
    """A diffusers scheduler with its float32 tables made anew in float64."""
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    scheduler.betas = root**2
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    if isinstance(scheduler, DDIMScheduler):
        to_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = scheduler.one if to_one else scheduler.alphas_cumprod[0]
    return scheduler


def network(x, t):
    return torch.tanh(x * (1 + t / 1000)).roll(1, -1) + 0.1 * x


def noises(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(steps)]


def ours(scheduler, x, steps, eta, noise):
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    chain, prediction = process(config, eta), prediction_of(config)
    times = chain.times(steps).tolist()
    assert times[:-1] == [float(t) for t in scheduler.timesteps]
    for t, s, z in zip(times[:-1], times[1:], noise, strict=True):
        x = chain.reverse(x, chain.x0(x, network(x, t), t, prediction), t, s).sample(z)
    return x


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 30, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_times_are_the_pipelines(spacing, steps, offset):
    scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    theirs = scheduler.timesteps.clamp(0, 999).double()  # an offset may reach past the table
    assert torch.equal(process(scheduler.config).times(steps)[:-1], theirs)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"timestep_spacing": "leading", "steps_offset": 1}, 50),
        ({"timestep_spacing": "leading", "steps_offset": 1}, 7),
        ({"timestep_spacing": "leading"}, 125),
        ({"timestep_spacing": "trailing"}, 20),
        ({"timestep_spacing": "trailing"}, 1),
    ],
)
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim(eta, prediction, options, steps, to_one):
    scheduler = doubled(DDIMScheduler(**SD, **options, prediction_type=prediction, set_alpha_to_one=to_one))
    scheduler.set_timesteps(steps)
    first, *noise = noises(steps + 1)
    x = first
    for t, z in zip(scheduler.timesteps, noise, strict=True):
        x = scheduler.step(network(x, float(t)), t, x, eta=eta, variance_noise=z).prev_sample
    torch.testing.assert_close(ours(scheduler, first, steps, eta, noise), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("offset", "steps"), [(0, 50), (1, 50), (0, 1000)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm(offset, steps, prediction):
    """eta = 1 with final = 1 is DDPM; diffusers keeps a std of 1e-10 on its last step."""
    scheduler = doubled(DDPMScheduler(**SD, steps_offset=offset, prediction_type=prediction))
    scheduler.set_timesteps(steps)
    first, *noise = noises(steps + 1)
    generator, x = torch.Generator().manual_seed(1), first
    torch.randn(first.shape, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=generator).prev_sample
    expected = ours(scheduler, first, steps, 1.0, noise)
    assert (x - expected).abs().max() < 1e-10 * max(1.0, 10 * expected.abs().max().item())


def test_product_of_a_over_sd15():
    chain = process({**SD, "steps_offset": 1, "set_alpha_to_one": False, "_class_name": "PNDMScheduler"})
    coefficients = linear_coefficients(chain, chain.times(50).tolist(), "epsilon")
    assert math.prod(a for a, _ in coefficients) == pytest.approx(13.15, abs=0.005)
    assert [round(coefficients[i][1], 3) for i in (0, -1)] == [-0.123, -0.012]


def test_normal_density():
    mean, other, x = (torch.randn(3, 2, 5, dtype=torch.float64) for _ in range(3))
    for std in (0.7, torch.tensor([0.3, 1.0, 2.0]).reshape(3, 1, 1)):
        law = torch.distributions.Normal(mean, torch.as_tensor(std, dtype=torch.float64))
        expected = law.log_prob(x).sum((1, 2))
        torch.testing.assert_close(Normal(mean, std).log_prob(x), expected)
        second = torch.distributions.Normal(other, 1.3).log_prob(x).sum((1, 2))
        torch.testing.assert_close(Normal(mean, std).log_ratio(Normal(other, 1.3), x), expected - second)
    assert Normal(mean.float(), 0.7).log_prob(x.float()).dtype == torch.float64


def test_deterministic_steps_have_no_density():
    chain = process(SD)
    kernel = chain.reverse(torch.zeros(1, 2), torch.zeros(1, 2), 501.0, 401.0)
    assert kernel.is_deterministic
    with pytest.raises(UserError, match="eta > 0"):
        kernel.log_prob(torch.zeros(1, 2))
    # DDPM's last step ends at the clean state itself
    assert process(SD, 1.0).reverse(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, -1.0).is_deterministic


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_outside(eta):
    with pytest.raises(UserError, match=f"eta is {eta}"):
        process(SD, eta)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_outside(steps):
    with pytest.raises(UserError, match=r"1\.\.1000"):
        process(SD).times(steps)


@pytest.mark.parametrize("spacing", ["karras", "Leading", ""])
def test_an_unknown_spacing_is_not_taken_for_another(spacing):
    with pytest.raises(UserError, match=rf"'{spacing}'.*leading, trailing, linspace.*timestep_spacing"):
        VP((0.9, 0.5, 0.1), spacing)


@pytest.mark.parametrize("prediction", ["flow", "v", ""])
def test_an_unknown_prediction_is_not_taken_for_another(prediction):
    x = torch.zeros(1, 2)
    with pytest.raises(UserError, match=rf"'{prediction}'.*epsilon, v_prediction, sample.*prediction_type"):
        VP((0.9, 0.5, 0.1)).x0(x, x, 1.0, prediction)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_go_down_through_the_table_to_the_terminal(spacing):
    for steps in (1, 2, 7, 10):
        times = VP(tuple(0.9**i for i in range(1, 11)), spacing).times(steps)
        assert times.shape == (steps + 1,)
        assert (times.diff() < 0).all()
        assert times[-1] == -1
        assert 0 <= times[-2] <= times[0] <= 9


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1.0, torch.tensor([0, 2]), -1.0, torch.tensor([-1, 1])], ids=str)
def test_x0_undoes_forward(prediction, t):
    """What a perfect network would say of forward's x_t leads back to x_0, at one time or one a row, also at TERMINAL."""
    chain = VP((0.9, 0.5, 0.1), final=0.95)
    x0, eps = torch.randn(2, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = chain.forward(x0, t, eps)
    bar = torch.tensor([0.9, 0.5, 0.1, 0.95], dtype=torch.float64)[torch.as_tensor(t).long()].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, bar.sqrt() * x0 + (1 - bar).sqrt() * eps)
    native = {"epsilon": eps, "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * x0, "sample": x0}[prediction]
    torch.testing.assert_close(chain.x0(x_t, native, t, prediction), x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [1.0, torch.tensor([0, 2])], ids=str)
def test_tables_never_change_the_precision_of_a_state(dtype, t):
    chain, x = VP((0.9, 0.5, 0.1), eta=1.0), torch.ones(2, 3, dtype=dtype)
    assert chain.forward(x, t, torch.ones(2, 3)).dtype == dtype
    assert all(chain.x0(x, x, t, p).dtype == dtype for p in PREDICTIONS)
    assert chain.reverse(x, x, 2.0, 0.0).sample(torch.ones(2, 3)).dtype == dtype


def test_after_the_last_step_nothing_is_left_to_complete():
    x, x0, eps = torch.randn(3, 2, 4).unbind(0)
    assert torch.equal(VP((0.9, 0.5, 0.1)).complete(x, x0, eps), x)
