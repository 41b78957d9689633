"""Scheduler configurations become the same tables diffusers makes, in float64."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from tropism.core import UserError
from tropism.models import schedule


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=["linear", "scaled_linear", "cosine", "trained", "zero_snr"],
)
def test_tables(options):
    scheduler = DDIMScheduler(**options)
    ours = torch.tensor(schedule.alpha_bars(scheduler.config), dtype=torch.float64)
    torch.testing.assert_close(ours, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)
    assert ours[-1] == 0 if "rescale_betas_zero_snr" in options else ours[-1] > 0


@pytest.mark.parametrize(
    ("scheduler", "to_one"),
    [
        (DDIMScheduler(), True),
        (DDIMScheduler(set_alpha_to_one=False), False),
        (PNDMScheduler(), False),
        (PNDMScheduler(set_alpha_to_one=True), True),
        (DDPMScheduler(), True),
        (EulerDiscreteScheduler(), True),
    ],
)
def test_final(scheduler, to_one):
    process = schedule.process({**scheduler.config, "_class_name": type(scheduler).__name__})
    assert process.final == (1.0 if to_one else process.alpha_bars[0])


def test_zero_snr_needs_another_prediction():
    with pytest.raises(UserError, match="divided by zero"):
        schedule.process(DDIMScheduler(rescale_betas_zero_snr=True).config)


def test_unknown_schedule():
    with pytest.raises(UserError, match="beta_schedule is 'sigmoid'"):
        schedule.process({**DDIMScheduler().config, "beta_schedule": "sigmoid"})


def test_unknown_spacing():
    with pytest.raises(UserError, match="timestep_spacing is 'karras'"):
        schedule.process({**DDIMScheduler().config, "timestep_spacing": "karras"})
