"""AlignProp: back-propagate a differentiable reward through the denoising chain into the model's weights.

Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor

from tropism.align.truncation import Policy, active_steps
from tropism.align.update import begin, climb, drift_penalty, reward_loss, step_of
from tropism.core import Batch, Info, Model, Reward, Stream, generator


def alignprop(
    model: Model,
    reward: Reward,
    batch: Batch,
    *,
    state: dict,
    update: int,
    seed: int,
    micro_batch: int | None = None,
    steps: int = 50,
    guidance: float = 7.5,
    truncation: str | int | Policy = "suffix-uniform",
    detach_input: bool = False,
    hinge: float | None = None,
    target: float | None = None,
    drift: float = 0.0,
    drift_detach: bool = False,
) -> Generator[tuple[Tensor, Info], None, dict]:
    """One update: sample the whole chain, ascend the reward's own gradient through its active steps. Yields one (loss, Info).

    steps: N denoising steps. guidance: w of uncond + w (cond - uncond).
    truncation: which steps carry a gradient; see `align.truncation`. detach_input: DRTune's stop-gradient on the network's
    input (arXiv 2405.00760), the linear path x_t -> x_s keeps its gradient.
    hinge: loss max(0, hinge - r) instead of -r. target: loss |r - target|.
    drift: weight of the mean squared difference between this model's and the base model's outputs on the active steps.
    drift_detach: the base's prediction sees x_t without its gradient (cheaper, biased).
    Raises UserError for both hinge and target, a negative drift, or a truncation that cannot be.
    """
    loss = reward_loss(hinge, target)
    chain, x_T = begin(model, reward, batch, seed=seed, update=update, steps=steps, guidance=guidance)
    drawn = active_steps(truncation, steps - chain.first, generator(seed, Stream.TRUNCATION, update))
    chain = replace(
        chain,
        active=(False,) * chain.first + drawn,
        detach_input=detach_input,
        step_loss=drift_penalty(model, guidance, drift, sum(drawn), drift_detach),
    )
    yield step_of(chain, climb(chain, x_T, loss, micro_batch))
    return state
