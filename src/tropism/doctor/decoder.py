"""Whether pictures hang on the latents as they should: mapped and scaled right, off the walls, with a gradient that is their slope."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tropism.core import Stream, noise
from tropism.doctor.case import Case, Finding, change, fault, finite, note, proof, warning
from tropism.doctor.slopes import STEPS, TOLERANCE, UPDATE, directions, judge, precision

MANY, MOST = 0.5, 0.95
"""Shares of clamped pixels that are a warning and a fault. A healthy model at high guidance has some 10 %."""
SHUT = 0.1
"""Share of clamped pixels from which it matters whether they may come back."""
INSIDE = 0.1
"""Distance from black and white at which a pixel is not clamped by a small step."""
SAME = {True: 1e-3, False: 2e-2}
"""Relative difference below which two decodings are one, in float32 and in half precision."""


def clamped_pixels(case: Case) -> Iterator[Finding]:
    """Few pixels stand at the walls of [0, 1], and none beyond."""
    pictures = case.drawn[2]
    low, high = pictures.min().item(), pictures.max().item()
    share = ((pictures == 0) | (pictures == 1)).double().mean().item()
    if low < -0.001 or high > 1.001:
        yield warning(
            f"The decoder's pictures reach from {low:.3g} to {high:.3g}; rewards expect [0, 1]. Map them there (x / 2 + 0.5) "
            "and end `decode` with tropism.core.clamp."
        )
    elif share > MANY:
        yield (fault if share > MOST else warning)(
            f"{share:.0%} of the pixels are clamped to black or white, the limit is {MANY:.0%}: they pass little or no gradient. "
            "Check that decode maps the VAE's -1..1 by x / 2 + 0.5 and divides by its scaling factor, or lower --guidance."
        )
    elif share > SHUT and _is_shut(case):
        yield warning(
            f"{share:.0%} of the pixels are clamped to black or white and no gradient leads them back, the limit is {SHUT:.0%}: what is "
            "too dark stays so. Check that decode maps the VAE's -1..1 by x / 2 + 0.5, and end it with tropism.core.clamp."
        )


def _is_shut(case: Case) -> bool:
    """Whether the gradient that leads inwards stops at every clamped pixel."""
    x = case.drawn[1].detach().requires_grad_()
    pictures = case.model.decode(case.model.process.complete(x, x))
    if not pictures.requires_grad:  # decoder graph says so
        return False
    inwards = (pictures.detach() == 1).to(pictures) - (pictures.detach() == 0).to(pictures)
    gradient = torch.autograd.grad((inwards * pictures).sum(), x, allow_unused=True)[0]
    return gradient is None or not gradient.any()


@torch.no_grad()
def decoder_repeatable(case: Case) -> Iterator[Finding]:
    """Two decodings of the same latents are equal: pictures before and after training differ by the training alone."""
    latents = case.drawn[1]
    apart = change(case.drawn[2], case.model.decode(case.model.process.complete(latents, latents)))
    limit = SAME[torch.finfo(case.model.dtype).bits >= 32]
    if apart > limit:
        yield warning(
            f"Two decodings of the same latents differ by {apart:.1%}, the limit is {limit:.1%}: the decoder draws noise of its own, so "
            "runs do not repeat and pictures before and after training do not compare. Call .eval() on it, and take the mean of what it "
            "predicts rather than a sample."
        )


@torch.no_grad()
def decoder_scale(case: Case) -> Iterator[Finding]:
    """A diffusers VAE (the model's `vae`) is asked as its configuration says, and its -1..1 mapped to 0..1, red first.

    Only a decoding that equals a known mistake is named; one that is nobody's is left alone.
    """
    vae = getattr(case.model, "vae", None)
    scale = getattr(getattr(vae, "config", None), "scaling_factor", None)
    if vae is None or scale is None:
        return
    shift, seen = getattr(vae.config, "shift_factor", None) or 0.0, case.drawn[2][:1]
    latents = case.model.process.complete(case.drawn[1][:1], case.drawn[1][:1])
    limit = SAME[torch.finfo(vae.dtype).bits >= 32]

    def is_seen(x: Tensor, mapped: Callable[[Tensor], Tensor] = lambda y: y / 2 + 0.5) -> bool:
        return change(mapped(vae.decode(x.to(vae.dtype)).sample).clamp(0, 1).to(seen), seen) <= limit

    try:
        if is_seen(latents / scale + shift):
            return
        mistakes = {
            f"does not divide by the VAE's scaling_factor {scale:g}": is_seen(latents + shift) or is_seen(latents),
            f"divides by the VAE's scaling_factor {scale:g} twice": is_seen(latents / scale**2 + shift),
            f"multiplies by the VAE's scaling_factor {scale:g}": is_seen(latents * scale + shift),
            f"leaves out the VAE's shift_factor {shift:g}": is_seen(latents / scale),
            "takes the VAE's -1..1 for 0..1": is_seen(latents / scale + shift, lambda y: y),
            "swaps red and blue": is_seen(latents / scale + shift, lambda y: y.flip(1) / 2 + 0.5),
        }
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
    ):  # no VAE as diffusers has them, or latents of another shape
        return
    for mistake in (m for m, made in mistakes.items() if made):
        yield fault(
            f"`decode` {mistake}, so the reward judges other pictures than the model's users will see. Compute "
            "vae.decode(x / scaling_factor + shift_factor).sample / 2 + 0.5."
        )
        return


def decoder_graph(case: Case) -> Iterator[Finding]:
    """Pictures hang on the latents by a graph."""
    x = case.drawn[1][:1].detach().requires_grad_()
    pictures = case.model.decode(case.model.process.complete(x, x))
    inner = pictures.detach().clamp(INSIDE, 1 - INSIDE) == pictures.detach()
    gradient = torch.autograd.grad(pictures.sum(), x, allow_unused=True)[0] if pictures.requires_grad else None
    if gradient is None or (inner.any() and not gradient.any()):
        yield fault(
            "Pictures have no gradient back to the latents, so the reward cannot reach the chain. Take torch.no_grad and "
            ".detach() out of `decode`; diffusers' own pipeline calls run under no_grad."
        )
    elif not finite([gradient]):
        yield fault("The decoder's gradient is not finite. Use --dtype float32 or bfloat16, for the VAE at least.")


def decoder_gradient(case: Case) -> Iterator[Finding]:
    """The decoder's gradient is the slope of its pictures, off the walls."""
    latents, pictures = case.drawn[1][:1].detach(), case.drawn[2][:1]
    weights = noise(case.seed, Stream.EVAL, UPDATE, -1, 0, 4, pictures.shape[1:])[0].to(pictures)
    inner = (pictures.clamp(INSIDE, 1 - INSIDE) == pictures).to(pictures)
    decode = case.model.decode
    if inner.mean() < 0.25 and hasattr(case.model, "decode_raw"):
        decode, inner = case.model.decode_raw, torch.ones_like(inner)  # pyright: ignore[reportAttributeAccessIssue]
    value = lambda x: (weights * inner * decode(x)).double().flatten(1).sum(1)
    dtype = precision(lambda: decode(latents), latents)
    if dtype not in STEPS:
        yield note("The decoder's gradient is finite; in half precision its slopes cannot be measured.")
        return
    x = latents.requires_grad_()
    (gradient,) = torch.autograd.grad(value(x).sum(), x)
    claims = [(d, (gradient * d).double().flatten(1).sum(1)) for d in directions(gradient, case.seed)]
    latents, usual = latents.detach(), 0.1 * gradient.norm().item()
    verdicts = [judge(claim, lambda h, d=d: value(latents + h * d), STEPS[dtype], usual) for d, claim in claims]
    wrong = max((v for v in verdicts if v.wrong), key=lambda v: v.error, default=None)
    right = [v.error for v in verdicts if v.right]
    if wrong:
        yield fault(
            f"The decoder's gradient is not the slope of its pictures: autograd says {wrong.claimed:.3g}, finite differences "
            f"{wrong.measured:.3g} (apart by {wrong.error:.0%}, the limit is {TOLERANCE:.0%}). Look for a .detach(), a custom "
            "autograd.Function or a cache in `decode`."
        )
    elif right:
        yield proof(f"gradient of the decoder against finite differences {max(right):.1g}", max(right))
    else:
        yield note("The decoder is too rough for finite differences: its gradient was not checked.")
