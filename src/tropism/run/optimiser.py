"""AdamW on named tensors, for losses that are sums: gradients are divided by the samples of all processes, then
clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import cos, pi
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tropism.core import UserError

Parameters = Mapping[str, Tensor] | Mapping[str, Mapping[str, Tensor]]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + cos(pi * done)) / 2,
}
"""Learning-rate schedules: share of the run that is done, in [0, 1) -> factor on the rate."""


def schedule_of(name: str) -> Callable[[float], float]:
    """A schedule by name. Raises UserError for one that is not known."""
    if name not in SCHEDULES:
        raise UserError(f"There is no schedule {name!r} of the learning rate. Known: {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    return not is_distributed() or dist.get_rank() == 0


def any_process(is_so: bool) -> bool:
    """Whether it is so in any process; asked by all of them."""
    if not is_distributed():
        return is_so
    flag = torch.tensor([float(is_so)], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def named(parameters: Parameters) -> dict[str, dict[str, Tensor]]:
    """Groups of named tensors, every name unique; a flat dict is one group. Raises UserError if there is nothing to
    train.
    """
    groups = {k: dict(v) for k, v in parameters.items() if isinstance(v, Mapping)}
    groups = groups or {"": dict(cast(Mapping[str, Tensor], parameters))}
    flat = {f"{g}/{n}".lstrip("/"): p for g, group in groups.items() for n, p in group.items()}
    if not flat:
        raise UserError(
            "There is nothing to train: the model has no trainable parameter. Add a LoRA adapter, or ask for full "
            "fine-tuning."
        )
    for name, p in flat.items():
        if p.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"Parameter {name} is {p.dtype}; AdamW loses small updates below float32. Keep trained weights in "
                "float32 (parameter.data = parameter.data.float())."
            )
    return {g: {f"{g}/{n}".lstrip("/"): p for n, p in group.items()} for g, group in groups.items()}


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of their names."""
    for name, value in values.items():
        parameters[name].copy_(value)


class Optimiser:
    """AdamW over named tensors (at least float32), with clipping and an optional EMA of the weights.

    lr: one number, or one for each group. clip: the largest norm of the mean gradient; 0 is off.
    ema: decay d of the average, a <- d a + (1 - d) p after each step, starting at the first weights; 0 is off.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float | Mapping[str, float],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip: float,
        ema: float,
    ):
        if not 0 <= ema < 1:
            raise UserError(f"ema is {ema}; a decay must lie in [0, 1), 0 is off. Try --ema 0.99.")
        groups = named(parameters)
        self.named = {n: p for group in groups.values() for n, p in group.items()}
        self.rates = list(lr[k] for k in groups) if isinstance(lr, Mapping) else [lr] * len(groups)
        self.adam = torch.optim.AdamW(
            [{"params": list(g.values()), "lr": rate} for g, rate in zip(groups.values(), self.rates, strict=True)],
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
        )
        self.clip, self.ema, self.steps, self.slowed = clip, ema, 0, 1.0
        self.average = {n: p.detach().clone() for n, p in self.named.items()} if ema else {}

    def pace(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times its own, and what going back has made of it."""
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = self.slowed * factor * rate

    def go_back(self, weights: Mapping[str, Tensor], factor: float) -> None:
        """Take these weights, as trained ones and as their average, forget both moments, and go on at `factor` times the rate."""
        self.fill(weights)
        self.average = {n: self.named[n].detach().clone() for n in self.average}
        self.adam.state.clear()
        self.slowed *= factor

    def backward(self, loss: Tensor, totals: list[float]) -> list[float]:
        """Gradients of `loss` summed over all processes, then divided by totals[0], the samples; the summed totals.

        Gradients and totals travel in one buffer. A parameter the loss does not reach gets a gradient of zero.
        """
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        for p in self.named.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        totals = self._summed(totals) if is_distributed() else totals
        for g in self._gradients():
            g.div_(max(totals[0], 1))
        return totals

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.named.values() if p.grad is not None]

    def _summed(self, totals: list[float]) -> list[float]:
        gradients = self._gradients()
        first = gradients[0]
        flat = torch.cat([g.flatten() for g in gradients] + [first.new_tensor(totals)])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in gradients] + [len(totals)])
        for g, part in zip(gradients, parts, strict=False):
            g.copy_(part.view_as(g))
        return parts[-1].tolist()

    def norm(self) -> float:
        """The norm of the mean gradient, before clipping."""
        return get_total_norm(self._gradients()).item()

    def step(self, norm: float) -> None:
        """Clip by the given norm, step, and let the average follow."""
        if self.clip and norm > self.clip:
            device = next(iter(self.named.values())).device
            clip_grads_with_norm_(list(self.named.values()), self.clip, torch.tensor(norm, device=device))
        self.adam.step()
        self.steps += 1
        for n, a in self.average.items():
            a.lerp_(self.named[n].detach(), 1 - self.ema)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters hold their average (if there is one); the trained weights return at the end."""
        trained = {n: self.named[n].detach().clone() for n in self.average}
        self.fill(self.average)
        try:
            yield
        finally:
            self.fill(trained)

    def use_average(self) -> None:
        """Put the average, if there is one, into the parameters for good."""
        self.fill(self.average)

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters of their names."""
        fill(self.named, values)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint must hold: weights, both moments, the average."""
        state = {n: self.adam.state[p] for n, p in self.named.items() if p in self.adam.state}
        moments = {
            f"{kind}:{n}": s[key] for n, s in state.items() for kind, key in (("m", "exp_avg"), ("v", "exp_avg_sq"))
        }
        return {"weights": dict(self.named), "adam": moments} | ({"ema": self.average} if self.ema else {})

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Take over what `tensors` gave. Raises UserError if names or shapes are not those of this run."""
        wanted = {n: tuple(p.shape) for n, p in self.named.items()}
        _same("weights", wanted, tensors["weights"])
        if self.ema:
            _same("EMA", wanted, tensors.get("ema", {}))
            self.average = {n: tensors["ema"][n].to(a) for n, a in self.average.items()}
        self.fill(tensors["weights"])
        self.steps = steps
        for n, p in self.named.items():
            if f"m:{n}" in tensors["adam"]:
                self.adam.state[p] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": tensors["adam"][f"m:{n}"].to(p),
                    "exp_avg_sq": tensors["adam"][f"v:{n}"].to(p),
                }


def _same(what: str, wanted: dict[str, tuple], found: Mapping[str, Tensor]) -> None:
    shapes = {n: tuple(t.shape) for n, t in found.items()}
    if shapes == wanted:
        return
    wrong = sorted(n for n in wanted.keys() | shapes.keys() if wanted.get(n) != shapes.get(n))
    first = wrong[0]
    raise UserError(
        f"The checkpoint's {what} do not fit this run: {len(wrong)} tensors differ, for example {first} "
        f"(run {wanted.get(first, 'missing')}, checkpoint {shapes.get(first, 'missing')}). "
        "Resume with the settings the run was started with (config.yaml), or choose another --out."
    )
