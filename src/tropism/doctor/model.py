"""Whether a model draws and can be differentiated: finite everywhere, a linear x_0, guidance the right way round."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tropism.core import Cond, Draw, Stream, noise
from tropism.doctor.case import NEGATIVE, Case, Finding, change, fault, finite, note, proof, warning
from tropism.doctor.holds import modules_of
from tropism.doctor.slopes import STEPS, TOLERANCE, UPDATE, directions, judge, precision

LINEAR = 1e-3
"""Relative error of a linear map in float32, where terms of size 30 cancel."""
COMPANY = {True: 1e-3, False: 0.1}
"""The same between batch sizes, in float32 and in half precision, which take other kernels."""
STRAIGHT = {True: 1e-2, False: 1e-1}
"""Relative error of the line in w, in float32 and in half precision: other batch sizes take other kernels on a GPU."""


def model_runs(case: Case) -> Iterator[Finding]:
    """Prompts, denoiser and decoder give finite numbers."""
    outs, latents, pictures = case.drawn
    narrow = torch.finfo(case.model.dtype).bits < 32
    remedy = (
        "float16 ends at 65504: use --dtype float32 or bfloat16"
        if narrow
        else "look for a bad weight or a division by 0"
    )
    if not finite([t for t in tree_leaves(_plain(case.cond)) if isinstance(t, Tensor)]):
        yield fault(f"The text encoder's output is not finite (NaN or infinity) for {case.batch.prompts}; {remedy}.")
    elif not finite(outs):
        bad = next(i for i, out in enumerate(outs) if not finite([out]))
        yield fault(f"The denoiser's output is not finite at time {case.times[case.first + bad]:g}; {remedy}.")
    elif not finite([latents]):
        yield fault("The chain's latents are not finite though the denoiser's outputs are. Check x0 and the process.")
    elif not finite([pictures]):
        yield fault(
            f"The decoder makes pictures that are not finite from finite latents; {remedy}{', for the VAE at least' if narrow else ''}."
        )


def _plain(cond: Any) -> Any:
    """What a cond holds, as containers that can be searched for tensors."""
    return vars(cond) if hasattr(cond, "__dict__") else cond


def model_frozen(case: Case) -> Iterator[Finding]:
    """Nothing of the model's networks requires a gradient but what trains."""
    own = {id(p) for p in case.parameters}
    every = {id(p): p for module in modules_of(case.model) for p in module.parameters()}
    free = sum(p.numel() for i, p in every.items() if p.requires_grad and i not in own)
    if free:
        yield warning(
            f"{free:,} numbers of the model's networks require a gradient but are not in `trainable()`: their gradients cost memory "
            "and train nothing. Call requires_grad_(False) on what is frozen, or name what shall train."
        )


def model_repeatable(case: Case) -> Iterator[Finding]:
    """Two predictions of the same latents are equal: the backward pass recomputes them."""
    if case.jitter > LINEAR:
        yield fault(
            f"Two predictions of the same latents differ by {case.jitter:.1%}, the limit is {LINEAR:.1%}: the gradient belongs to "
            "another chain than the pictures. Call .eval() on the denoiser; dropout is the usual cause."
        )


@torch.no_grad()
def rows(case: Case) -> Iterator[Finding]:
    """A sample's prediction is the same in other company, each row with its own prompt."""
    together = case.drawn[0][0]
    alone = torch.cat([case.found, case.predict(case.x[1:], case.cond[1:])]) if len(together) > 1 else case.found
    limit = COMPANY[precision(case.predict, case.x) in STEPS] + 2 * case.jitter
    error = max(change(a, b) for a, b in zip(together, alone, strict=True))
    if error > limit:
        yield fault(
            f"The prediction of a sample changes by {error:.1%} with the other samples of its batch, the limit is {limit:.1%}: "
            "--micro-batch would change the result. Check that `predict` pairs every row with its own row of the cond (a guided "
            "batch is all negatives, then all prompts), and leave batch statistics out."
        )


@torch.no_grad()
def time(case: Case) -> Iterator[Finding]:
    """Another time gives another prediction."""
    other = [t for t in case.times[:-1] if t != case.t]
    if (
        other
        and change(case.found, case.model.predict(case.x[:1], other[-1], case.cond[:1], case.guidance))
        <= 2 * case.jitter
    ):
        yield warning(
            f"The prediction is the same at times {case.t:g} and {other[-1]:g}: the model does not hear how noisy its input is. "
            "Check that `predict` passes t on, in the units that the network was trained with."
        )


# ---------------------------------------------------------------------------------------------------- the chain


@torch.no_grad()
def start(case: Case) -> Iterator[Finding]:
    """The chain's start is the same for the same key, and another one for every sample and every update."""
    times = torch.tensor(case.times, dtype=torch.float64)
    again, _ = case.model.start(case.cond, case.draw, times)
    later, _ = case.model.start(case.cond, Draw(case.seed, UPDATE + 1, case.batch.index), times)
    if not torch.equal(case.x, again):
        yield fault(
            "Two starts of the same samples differ: a resumed run would be another one, and pictures before and after could not be "
            "compared. Draw the noise from `draw` in `start`, not from torch's own generator."
        )
    elif len(case.x) > 1 and case.x.is_floating_point() and torch.equal(case.x[0], case.x[1]):
        yield fault(
            "Every sample starts from the same noise, so a prompt has one picture only. Draw (B, *shape) from `draw` in `start`."
        )
    elif case.x.is_floating_point() and torch.equal(case.x, later):
        yield warning(
            "Every update starts from the same noise, so training sees few pictures again and again and learns these. Draw the noise from "
            "`draw` in `start`, which is another one for every update, and keep none."
        )


def input_gradient(case: Case) -> Iterator[Finding]:
    """The gradient of a prediction at the latents is its slope: the chain hands the reward's gradient on through it."""
    given = case.x[:1].detach()
    x = given.clone().requires_grad_()
    out = case.predict(x)
    gradient = torch.autograd.grad(case.weigh(out).sum(), x, allow_unused=True)[0] if out.requires_grad else None
    if gradient is None or not gradient.any():
        yield fault(
            "The prediction has no gradient back to the latents it is made from, so a step learns nothing of the steps after it. Look for "
            ".detach() or torch.no_grad on the way of x_t through `predict`."
        )
        return
    dtype = precision(lambda: case.predict(given), given)
    if dtype not in STEPS:
        return
    usual = 0.1 * gradient.norm().item()
    value = lambda h, d: case.weigh(case.predict(given + h * d).double())
    claims = [(d, (gradient * d).double().flatten(1).sum(1)) for d in directions(gradient, case.seed)]
    verdicts = [judge(claim, lambda h, d=d: value(h, d), STEPS[dtype], usual) for d, claim in claims]
    wrong = max((v for v in verdicts if v.wrong), key=lambda v: v.error, default=None)
    right = [v.error for v in verdicts if v.right]
    if wrong:
        yield fault(
            f"The gradient of a prediction at its latents is not its slope: autograd says {wrong.claimed:.3g}, finite differences "
            f"{wrong.measured:.3g} (apart by {wrong.error:.0%}, the limit is {TOLERANCE:.0%}). Look for a .detach() of a part of x_t in "
            "`predict`, or a custom autograd.Function."
        )
    elif right:
        yield proof(f"gradient of the denoiser at its latents {max(right):.1g}", max(right))


@torch.no_grad()
def x0_linear(case: Case) -> Iterator[Finding]:
    """x_0 and the step that follows are linear in (x_t, out), also for large values, so no clipping eats gradients."""
    model, cond = case.model, case.cond[:1]
    a, b, c, d = (30 * v for v in noise(case.seed, Stream.EVAL, UPDATE, 0, 2, range(4), case.cond.shape)[0][:, None])
    a, b, c, d = (v.to(case.x) for v in (a, b, c, d))

    def step(x: Tensor, out: Tensor) -> Tensor:
        kernel, _ = model.kernel(x, case.t, case.s, cond, case.guidance, out)
        return kernel.sample(x.new_zeros(1, *kernel.noise_shape))

    limit = LINEAR if torch.finfo(case.x.dtype).bits >= 32 else 100 * LINEAR  # ours are never narrower
    for what, function in (("x0", lambda x, out: model.x0(x, out, case.t)), ("the step after x0", step)):
        error = change(2 * function(a, c) + function(b, d), function(2 * a + b, 2 * c + d))
        if error > limit:
            yield fault(
                f"{what} is not linear in the latents and the network's output (off by {error:.0%} at values of 30, the limit is "
                f"{limit:.1%}): it clips, and clipped values pass no gradient. Set clip_sample and thresholding to False."
            )
            return


@torch.no_grad()
def prompts(case: Case) -> Iterator[Finding]:
    """Another prompt gives another prediction."""
    two = _two_prompts(case)
    if len(two) == 1:
        yield note("Whether prompts are heard was not checked: the batch has only one.")
    elif change(*(case.predict(cond=cond, guidance=1.0) for cond in two)) <= 2 * case.jitter:
        yield warning(
            "The prediction is the same for two different prompts: the model does not hear them, and cannot learn what "
            "they ask for. Check that `encode` and `predict` pass the prompt's embedding on."
        )


def _two_prompts(case: Case) -> list[Cond]:
    """The first sample as it is and, if the batch has two prompts, with the other one, all else equal."""
    texts = list(dict.fromkeys(case.batch.prompts))
    batch = replace(case.batch[[0] * len(texts)], prompts=texts, index=tuple(range(len(texts))), parent=None)
    cond = case.model.encode(batch, case.draw[: len(texts)])
    return [cond[i : i + 1] for i in range(len(texts))]


@torch.no_grad()
def guidance(case: Case) -> Iterator[Finding]:
    """predict is uncond + w (cond - uncond), and its w = 0 end does not hear the prompt."""
    rows = getattr(case.model, "rows", None)
    if not _is_guided(case):
        return
    first, *other = _two_prompts(case)
    zero, one, three = (case.predict(cond=first, guidance=w) for w in (0.0, 1.0, 3.0))
    if max(change(zero, three), change(one, three)) <= 2 * case.jitter:
        asked, negative = case.batch.prompts[0], (case.batch.negative_prompts or [""])[0]
        yield (note if asked == negative else warning)(
            f"Guidance {case.guidance:g} has no effect on the prediction, so pictures are drawn without it. Compute uncond + w (cond - "
            "uncond) in `predict`, or ask for --guidance 1."
        )
        return
    curved, effect = change(zero + 3 * (one - zero), three), (three - zero).norm() / 3
    moved = max([((case.predict(cond=c, guidance=0.0) - zero).norm() / effect).item() for c in other], default=0.0)
    limit = STRAIGHT[precision(lambda: case.predict(guidance=3.0), case.x) in STEPS]
    if moved > TOLERANCE and not (rows is None and curved > limit):
        yield fault(
            f"At guidance 0 the prediction changes with the prompt (by {moved:.0%} of the guidance's effect, the limit is "
            f"{TOLERANCE:.0%}): the halves are swapped or w is shifted by 1. Compute uncond + w (cond - uncond), with the "
            "negative prompt's rows as uncond."
        )
    elif (felt := _negative_felt(case, one, effect)) > TOLERANCE:
        yield fault(
            f"At guidance 1 the prediction changes with the negative prompt (by {felt:.0%} of the guidance's effect, the limit is "
            f"{TOLERANCE:.0%}): guidance is applied more strongly than asked for. Compute uncond + w (cond - uncond), once."
        )
    elif curved > limit:
        yield warning(
            f"The prediction is not a straight line in the guidance w (off by {curved:.1%}, the limit is {limit:.1%}). If that is "
            "no rescaled or clipped guidance on purpose, compute uncond + w (cond - uncond); a model with distilled guidance says "
            "so by rows(w) == 1."
        )
    elif (unheard := _unguided_time(case, first)) is not None:
        yield warning(
            f"Guidance {case.guidance:g} has no effect on the prediction at time {unheard:g}, though it has at {case.t:g}. If guidance is "
            "not limited to a part of the chain on purpose, use w at every call of `predict`."
        )
    else:
        yield proof(f"guidance is uncond + w (cond - uncond) to {curved:.1g}", curved)


def _unguided_time(case: Case, cond: Cond) -> float | None:
    """A later time of the chain at which the prediction does not change with w."""
    for t in case.times[case.first + 1 : -1]:
        off, on = (case.model.predict(case.x[:1], t, cond, w) for w in (1.0, 3.0))
        if change(off, on) <= 2 * case.jitter:
            return t
    return None


def _is_guided(case: Case) -> bool:
    """Whether guidance is neither off nor distilled into the network."""
    rows = getattr(case.model, "rows", None)
    return case.guidance != 1 and (rows is None or rows(3.0) != 1)


@torch.no_grad()
def negative_prompts(case: Case) -> Iterator[Finding]:
    """Where the run has negative prompts, another one gives another guided prediction."""
    own = [text for text in case.asked.negative_prompts or () if text and text != NEGATIVE]
    if not own or not _is_guided(case):
        return
    asked = [replace(case.batch[[0]], negative_prompts=[text], parent=None) for text in (own[0], NEGATIVE)]
    mine, other = (case.predict(cond=case.model.encode(batch, case.draw[:1])) for batch in asked)
    if change(mine, other) <= 2 * case.jitter:
        yield warning(
            "The prediction is the same for two different negative prompts, though the run has some: they are dropped. Check that "
            "`encode` reads batch.negative_prompts and `predict` uses them as uncond."
        )


def _negative_felt(case: Case, one: Tensor, effect: Tensor) -> float:
    """How far another negative prompt moves the prediction at guidance 1, in units of the guidance's effect."""
    batch = replace(case.batch[[0]], negative_prompts=[NEGATIVE], index=(0,), parent=None)
    try:
        cond = case.model.encode(batch, case.draw[:1])
    except Exception:  # it takes none
        return 0.0
    return ((case.predict(cond=cond, guidance=1.0) - one).norm() / effect).item()
