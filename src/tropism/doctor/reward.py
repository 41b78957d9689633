"""Whether a reward can be followed: its value repeats and is per sample, and its gradient is there, alive and right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from tropism.core import Batch, Reward, name_of, scored
from tropism.doctor.case import Case, Finding, fault, note, proof, warning
from tropism.doctor.holds import held
from tropism.doctor.slopes import STEPS, TOLERANCE, directions, judge, precision, white
from tropism.rewards.frozen import Frozen

OFF = 0.3
"""Relative error of a slope up to which a surrogate gradient still leads upwards: a warning, above it a fault."""
NOISE = 1e-4
"""Relative change of a score between two equal calls; a GPU's sums make 1e-6."""
COMPANY = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The same for other batch sizes, which take other kernels, by precision."""


def reward_runs(case: Case) -> Iterator[Finding]:
    """One finite number for each of the model's own pictures."""
    for name, part in case.parts:
        values = scored(part, case.drawn[2], case.batch)
        finite = torch.isfinite(values)
        if not finite.all():
            told = f"Reward '{name}' is {_plain(values)} on this model's own pictures"
            if not case.by_gradient and finite.any():
                yield warning(
                    f"{told}; where it is not finite a sample takes no part, and more than half of a batch must not be so."
                )
                continue
            yield fault(f"{told}; it must be finite. Guard logarithms, roots and divisions with a small constant.")


def reward_frozen(case: Case) -> Iterator[Finding]:
    """No network that the reward reaches trains or stands in training mode."""
    things = [t.module if isinstance(t, Frozen) else t for t in held(case.reward, case.model)]
    modules = [t for t in things if isinstance(t, nn.Module)]
    tensors = [t for t in things if isinstance(t, Tensor) and t.is_leaf] + [p for m in modules for p in m.parameters()]
    own = {id(p) for p in case.parameters}
    training = [type(m).__name__ for m in modules if any(inner.training for inner in m.modules())]
    free = sum(t.numel() for t in {id(t): t for t in tensors}.values() if t.requires_grad and id(t) not in own)
    if training or free:
        what = f"{free:,} numbers that require a gradient" if free else f"{training[0]} in training mode"
        yield warning(
            f"The reward holds {what}; it judges and must not change, and their gradients cost memory. Call "
            ".eval().requires_grad_(False) on its networks."
        )


@torch.no_grad()
def reward_repeatable(case: Case) -> Iterator[Finding]:
    """Two calls on the same pictures say the same."""
    pictures, batch = case.pictures
    for name, part in case.parts:
        one, two = (scored(part, pictures, batch) for _ in range(2))
        scored(part, _others(pictures), batch)
        three = scored(part, pictures, batch)
        apart = _relative(one, two)
        if apart > NOISE:
            dropout = _dropout(part, case)
            say, remedy = (
                (fault, f"Call .eval() on the network with {dropout}")
                if dropout
                else (warning, "Draw its random numbers once")
            )
            yield say(
                f"Two calls of reward '{name}' on the same pictures differ by {apart:.1%}, the limit is {NOISE:.0e}: scores "
                f"cannot be compared and a resumed run is another one. {remedy}."
            )
        elif (moved := _relative(two, three)) > NOISE:
            yield warning(
                f"The scores of the same pictures under reward '{name}' change by {moved:.1%} once it has seen others, the limit is "
                f"{NOISE:.0e}: it has a memory, so scores of two updates cannot be compared and a resumed run is another one. Leave "
                "running means, records and counts out of it."
            )


def _others(pictures: Tensor) -> Tensor:
    """Four other pictures: two negatives, one red and one blue."""
    found = 1 - pictures
    found[2:] = pictures.new_tensor([[1, 0, 0], [0, 0, 1]])[:, :, None, None]
    return found


def _dropout(part: Reward, case: Case) -> str:
    """The first network in training mode that behaves otherwise in it."""
    things = (t.module if isinstance(t, Frozen) else t for t in held(part, case.model))
    modules = [m for t in things if isinstance(t, nn.Module) for m in t.modules() if m.training]
    return next((type(m).__name__ for m in modules if "Dropout" in type(m).__name__ or "Norm" in type(m).__name__), "")


@torch.no_grad()
def reward_per_sample(case: Case) -> Iterator[Finding]:
    """A picture's score is the same in other company."""
    _, batch = case.pictures
    for name, part in case.parts:
        pictures, dtype = _widest(part, *case.pictures)
        together, rows = scored(part, pictures, batch), ([0, 2], [1, 3])
        apart = torch.cat([scored(part, pictures[r], batch[r]) for r in rows])
        error, limit = _relative(together[[0, 2, 1, 3]], apart), COMPANY[dtype]
        if error > limit:
            yield fault(
                f"The score of a picture under reward '{name}' changes by {error:.2g} of itself with the other pictures of its "
                f"batch, the limit is {limit:g}: the result would depend on the batch size. Reduce over a sample's own "
                "dimensions only, as in .mean((1, 2, 3)), and leave batch statistics out."
            )
            continue
        elsewhere = scored(part, pictures, replace(batch, index=tuple(i + 17 for i in batch.index)))
        if (error := _relative(together, elsewhere)) > limit:
            yield warning(
                f"The score of a picture under reward '{name}' changes by {error:.2g} of itself with its number in the batch "
                "(batch.index), which stands for no prompt: what belongs to a prompt goes into batch.prompts or batch.meta."
            )


@torch.no_grad()
def reward_differs(case: Case) -> Iterator[Finding]:
    """Pictures of one prompt differ in their score: all that a method without the reward's gradient can learn from."""
    pictures, batch = case.pictures
    values = [scored(case.reward, pictures, batch)]
    if len({v for v in values[0][::2].tolist()}) > 1 or len({v for v in values[0][1::2].tolist()}) > 1:
        return
    flat = _of_one_colour(case)
    for at in range(0, len(flat), 9):
        values.append(scored(case.reward, flat[at : at + 9], replace(case.batch[[0] * 9], index=tuple(range(9)))))
    if len(set(torch.cat([values[0][::2], *values[1:]]).tolist())) == 1:
        yield warning(
            f"Reward '{name_of(case.reward)}' is {values[0][0].item():.4g} for {2 + len(flat)} different pictures of the prompt "
            f"{batch.prompts[0][:60]!r}: where all samples are worth the same nothing is learned. Look for a rule that zeroes or cuts "
            "scores off; a reward that is rarely met needs a softer form."
        )


def reward_graph(case: Case) -> Iterator[Finding]:
    """The score hangs on the picture by a graph."""
    for name, part in case.parts:
        if _gradient(part, *case.pictures) is None:
            yield fault(
                f"The score of reward '{name}' has no graph back to the picture, so nothing can be learned from it. Look for "
                "torch.no_grad, .detach(), .item(), numpy or PIL in it and write it in torch operations."
            )


def reward_flat(case: Case) -> Iterator[Finding]:
    """The gradient is finite, and somewhere not zero."""
    pictures, batch = case.pictures
    for name, part in case.parts:
        gradient = _gradient(part, pictures, batch)
        assert gradient is not None, "reward_graph came before"
        if not torch.isfinite(gradient).all():
            yield fault(
                f"The gradient of reward '{name}' is not finite for ordinary pictures. Guard roots, norms and divisions: the "
                "gradient of sqrt(x) at 0 is infinite, so write (x + 1e-12).sqrt()."
            )
        elif not gradient.any():
            with torch.no_grad():
                values = scored(part, pictures, batch)
            same = bool((values == values[0]).all())
            if same and len(case.parts) > 1:  # a guard that is satisfied, or a part that is dead: the others teach
                yield warning(
                    f"Reward '{name}' is {values[0].item():.4g} for all four pictures, without a slope. If it is a guard, it is "
                    "satisfied and bites later; if not, it teaches nothing: replace rounding and thresholds."
                )
                continue
            if _slopes_elsewhere(part, case):
                yield warning(
                    f"Reward '{name}' has no slope on this model's own pictures of two prompts, though it has for others, or on pictures "
                    "of one colour: it is sparse, and may teach nothing until a sample comes near. Widen or soften it."
                )
                continue
            why = "the same for all four" if same else "different, so it rounds or compares"
            yield fault(
                f"The gradient of reward '{name}' is exactly zero for four pictures; its scores are {why} "
                f"({_plain(values)}). Replace rounding, thresholds, argmax and integer casts by smooth functions."
            )
        elif not gradient[:2].any():
            yield warning(
                f"The gradient of reward '{name}' is exactly zero on this model's own pictures, though not on others: it is "
                "saturated there. Widen or soften it so that it also tells poor pictures apart."
            )


def _slopes_elsewhere(part: Reward, case: Case) -> bool:
    """Whether any of the model's pictures under the run's other prompts (27 of them), or of 27 pictures of one colour with a little
    grain, black to white, has a gradient that is finite and not zero."""
    flat, asked = _of_one_colour(case), len(case.asked)
    own = case.pictures[0][[0] * len(flat)]
    for pictures, prompts in ((own, [i % asked for i in range(27)]), (flat, [i % asked for i in range(27)])):
        for at in range(0, 27, 9):
            rows = slice(at, at + 9)
            gradient = _gradient(
                part, pictures[rows], replace(case.asked[prompts[rows]], index=tuple(range(9)), parent=None)
            )
            if gradient is not None and bool((torch.isfinite(gradient) & (gradient != 0)).any()):
                return True
    return False


def _of_one_colour(case: Case) -> Tensor:
    """27 pictures (27, 3, H, W) of one colour with a little grain, black to white."""
    levels, shape = (0.02, 0.5, 0.98), case.drawn[2].shape[1:]
    colours = torch.tensor([[red, green, blue] for red in levels for green in levels for blue in levels])
    flat = colours.to(case.drawn[2])[:, :, None, None].expand(-1, *shape)
    return flat + 0.02 * white(flat, case.seed, 5)


def reward_gradient(case: Case) -> Iterator[Finding]:
    """Autograd's slopes are those that finite differences of the score measure."""
    pictures, batch = case.pictures
    for name, part in case.parts:
        gradient = _gradient(part, pictures, batch)
        assert gradient is not None, "reward_graph came before"
        wide, dtype = _widest(part, pictures, batch)
        if dtype not in STEPS:
            yield note(f"The gradient of reward '{name}' is finite; in half precision its slopes cannot be measured.")
            continue
        verdicts = []
        for d in directions(gradient, case.seed):
            value = lambda h, d=d, part=part, wide=wide: scored(part, wide + h * d.to(wide), batch)
            verdicts.append(judge((gradient * d).double().flatten(1).sum(1), value, STEPS[dtype]))
        yield _said(name, verdicts)


def _said(name: str, verdicts: list) -> Finding:
    wrong = max((v for v in verdicts if v.wrong), key=lambda v: v.error, default=None)
    if wrong:
        return (fault if wrong.error > OFF else warning)(
            f"The gradient of reward '{name}' is not the slope of its score: autograd says {wrong.claimed:.3g}, finite differences "
            f"{wrong.measured:.3g} (apart by {wrong.error:.0%}, the limit is {TOLERANCE:.0%}). Look for a custom "
            "autograd.Function, a straight-through trick or a .detach() of a part."
        )
    right = [v.error for v in verdicts if v.right]
    if right:
        return proof(f"gradient of {name} against finite differences {max(right):.1g}", max(right))
    return note(f"The slopes of reward '{name}' are too rough for finite differences: its gradient was not checked.")


def reward_finite(case: Case) -> Iterator[Finding]:
    """Score and gradient are finite on black, grey and white pictures."""
    flat = torch.stack([torch.full_like(case.drawn[2][0], level) for level in (0.0, 0.5, 1.0)])
    for name, part in case.parts:
        batch = case.batch[[0, 0, 0]]
        x = flat.requires_grad_()
        values = scored(part, x, batch)
        gradient = torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None
        wrong = ~torch.isfinite(values.detach())
        if gradient is not None:
            wrong = wrong | ~torch.isfinite(gradient).flatten(1).all(1)
        if wrong.any():
            which = " and ".join(colour for colour, bad in zip(("black", "grey", "white"), wrong, strict=True) if bad)
            yield warning(
                f"Reward '{name}' or its gradient is not finite on a {which} picture: one such sample stops the run. Guard "
                "logarithms, roots, std() and divisions with a small constant, as in (x + 1e-12).sqrt()."
            )


# ---------------------------------------------------------------------------------------------------- measuring


def _gradient(part: Reward, pictures: Tensor, batch: Batch) -> Tensor | None:
    """d(sum of scores)/d pictures, or None where there is no graph."""
    x = pictures.detach().requires_grad_()
    values = scored(part, x, batch)
    return torch.autograd.grad(values.sum(), x, allow_unused=True)[0] if values.requires_grad else None


def _widest(part: Reward, pictures: Tensor, batch: Batch) -> tuple[Tensor, torch.dtype]:
    """The pictures in the widest precision that the reward takes, and the one it computes in."""
    for wide in (torch.float64, pictures.dtype):
        try:
            x = pictures.to(wide)
            return x, precision(lambda x=x: scored(part, x, batch), x)
        except Exception:
            if wide == pictures.dtype:
                raise
    raise AssertionError


def _relative(one: Tensor, two: Tensor) -> float:
    scale = max(one.abs().max().item(), two.abs().max().item())
    return (one - two).abs().max().item() / scale if scale else 0.0


def _plain(values: Tensor) -> str:
    return ", ".join(f"{v:.4g}" for v in values.flatten().tolist())
