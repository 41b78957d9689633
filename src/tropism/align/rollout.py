"""Draw x_0 from noise so that the gradient of its reward costs the memory of one step.

`sweep` is the engine: a forward pass without a graph that keeps only the latents x_t, decode-and-score in pieces down to
dR/dx_0, then the active steps walked in reverse, one recomputed at a time. `plain` is its readable twin, one autograd graph
over the whole chain; both return the same gradient. Steps before the first active one never see a graph; holes in the active
set are carried by their cached outputs, without a network call.

Cost of `sweep` in network rows, B samples, N steps that run, K active, c = 2 under guidance, else 1: c B (N forward,
K recomputed, K backward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from tropism.core import Batch, Cond, Draw, Model, Reward, Stream, in_pieces, name_of, scored_parts

Loss = Callable[[Tensor], Tensor]
"""An elementwise loss of rewards, (B,) -> (B,)."""

StepLoss = Callable[[Tensor, Tensor, float, Cond], Tensor]
"""(x_t, out, t, cond) -> (B,), added to the loss at every active step."""


@dataclass(frozen=True)
class Chain:
    """One rollout's fixed parts. `active` says which of the steps carry a gradient; `stop` ends the chain at that step's x_0.

    apart: also measure the gradient of every part of a combination at x_0, and how they agree.
    """

    model: Model
    reward: Reward
    batch: Batch
    cond: Cond
    draw: Draw
    times: tuple[float, ...]
    guidance: float
    active: tuple[bool, ...]
    first: int = 0
    stop: int | None = None
    detach_input: bool = False
    step_loss: StepLoss | None = None
    apart: bool = False

    def __getitem__(self, rows: slice | list[int]) -> Chain:
        return Chain(**{**self.__dict__, "batch": self.batch[rows], "cond": self.cond[rows], "draw": self.draw[rows]})

    @property
    def running(self) -> range:
        return range(self.first, len(self.times) - 1 if self.stop is None else self.stop + 1)

    @property
    def first_active(self) -> int:
        """The earliest active step that runs; one past the end if there is none."""
        return next((i for i in self.running if self.active[i]), self.running.stop)

    def predict(self, i: int, x: Tensor) -> Tensor:
        return self.model.predict(x.detach() if self.detach_input else x, self.times[i], self.cond, self.guidance)

    def advance(self, i: int, x: Tensor, out: Tensor) -> Tensor:
        """x_t and the native output at step i -> the next state; linear in both for a Gaussian chain."""
        t, s = self.times[i], self.times[i + 1]
        if i == self.stop:
            return self.model.x0(x, out, t)
        kernel, _ = self.model.kernel(x, t, s, self.cond, self.guidance, out)
        if kernel.is_deterministic:
            return kernel.sample(x)
        return kernel.sample(self.draw(Stream.TRANSITION, i, kernel.noise_shape).to(x.device))


@dataclass
class Swept:
    """What a rollout yields: gradient of the summed loss by parameter, rewards (B,), loss (B,), parts, pictures, last states, costs."""

    gradient: list[Tensor]
    rewards: Tensor
    losses: Tensor
    parts: dict[str, Tensor]
    images: Tensor
    step_losses: Tensor
    ends: Tensor
    step_norms: dict[int, float] = field(default_factory=dict)
    clamped: float = 0.0
    agreement: dict[str, Tensor] = field(default_factory=dict)
    has_graph: bool = True
    rows: dict[str, int] = field(default_factory=dict)
    piece: int = 0


@torch.no_grad()
def sample(model: Model, batch: Batch, draw: Draw, *, steps: int, guidance: float) -> Tensor:
    """Samples (B, 3, H, W) in [0, 1] by the plain chain, no gradient: what evaluation and users draw."""
    cond = model.encode(batch, draw)
    times = model.process.times(steps, cond.shape)
    x, first = model.start(cond, draw, times)
    unscored: Reward = lambda images, batch: images.new_zeros(len(batch))
    chain = Chain(model, unscored, batch, cond, draw, tuple(times.tolist()), guidance, (False,) * steps, first)
    for i in chain.running:
        x = chain.advance(i, x, chain.predict(i, x))
    return model.decode(model.process.complete(x, x))


@torch.no_grad()
def _forward(chain: Chain, x: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor], Tensor]:
    """Run the chain. Keeps x_t from the first active step on, and the outputs of the inactive steps after it."""
    states, outputs, begin = {}, {}, chain.first_active
    for i in chain.running:
        out = chain.predict(i, x)
        if i >= begin:
            states[i] = x
            if not chain.active[i]:
                outputs[i] = out
        x = chain.advance(i, x, out)
    return states, outputs, x


def _score(chain: Chain, x: Tensor, loss: Loss):
    """(rewards, signed gradient of the loss's direction at x, parts, images, has_graph, agreement) of one piece.

    Gradients are taken of d * r with d the sign of dl/dr, so that `clamp` sees a loss; the magnitude |dl/dr| is applied later.
    """
    x = x.detach().requires_grad_(chain.first_active in chain.running)
    with torch.enable_grad():
        images = chain.model.decode(chain.model.process.complete(x, x))
        rewards, parts = scored_parts(chain.reward, images, chain.batch)
        direction = _slope(loss, rewards).sign()
        gradient, agreement = None, agreement_of(chain.reward, parts, x) if chain.apart and x.requires_grad else {}
        if rewards.requires_grad and x.requires_grad:
            (gradient,) = torch.autograd.grad((direction * rewards).sum(), x, allow_unused=True)
    alive = gradient is not None or not x.requires_grad
    gradient = torch.zeros_like(x) if gradient is None else gradient
    return rewards.detach(), gradient, {k: v.detach() for k, v in parts.items()}, images.detach(), alive, agreement


def agreement_of(reward: Reward, parts: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Norms of the weighted parts' gradients at x_0, "part_norm/<a>", and their cosines, "cosine/<a>|<b>", each (B,).

    A negative cosine is a conflict: what raises one part lowers the other.
    """
    slopes = {}
    for part, weight in getattr(reward, "terms", ()):
        name = name_of(part)
        spread = getattr(reward, "scales", {}).get(name, (0.0, 1.0))[1]
        if parts[name].requires_grad:
            loss = -(weight / spread * parts[name]).nansum()  # clamped pixels keep the gradient of what is descended
            (g,) = torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True)
            slopes[name] = torch.zeros_like(x).flatten(1) if g is None else -g.flatten(1)
    found = {f"part_norm/{name}": g.norm(dim=1) for name, g in slopes.items()}
    for (a, g), (b, h) in combinations(slopes.items(), 2):
        found[f"cosine/{a}|{b}"] = torch.cosine_similarity(g, h, dim=1)
    return found


def _slope(loss: Loss, rewards: Tensor) -> Tensor:
    """dl_i/dr_i (B,) of an elementwise loss."""
    with torch.enable_grad():
        r = rewards.detach().requires_grad_()
        return torch.autograd.grad(loss(r).sum(), r)[0]


def _back_through(chain: Chain, i: int, x: Tensor, out: Tensor | None, above: Tensor, parameters: Sequence[Tensor]):
    """Pull the cotangent `above` of step i's result back: (cotangent of x_t, parameter gradients or None, step loss (B,))."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        fresh = chain.predict(i, x) if out is None else out
        total, extra = (chain.advance(i, x, fresh) * above).sum(), x.new_zeros(len(x))
        if out is not None:
            return torch.autograd.grad(total, x)[0], None, extra
        if chain.step_loss is not None:
            extra = chain.step_loss(x, fresh, chain.times[i], chain.cond)
            total = total + extra.sum()
        gradient = torch.autograd.grad(total, [x, *parameters], allow_unused=True)
    return (
        gradient[0],
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient[1:], strict=True)],
        extra.detach(),
    )


def sweep(chain: Chain, x: Tensor, loss: Loss, parameters: Sequence[Tensor], micro_batch: int | None = None) -> Swept:
    """The gradient of sum_i loss(r_i) + step losses, by the reverse sweep; x (B, *S) is the chain's start."""
    size, network = min(micro_batch or len(x), len(x)), _Counter(chain.model)
    states, outputs, ends = {}, {}, torch.empty_like(x)

    def forward(rows: slice):
        kept, cached, ends[rows] = _forward(chain[rows], x[rows])
        for store, new in ((states, kept), (outputs, cached)):
            for i, value in new.items():
                store.setdefault(i, torch.empty_like(x))[rows] = value

    scores: dict[int, tuple] = {}

    def score(rows: slice):
        scores[rows.start] = _score(chain[rows], ends[rows], loss)

    size = in_pieces(forward, len(x), size)
    rows = {"forward": network.rows("network")}
    size = in_pieces(score, len(x), size)
    rewards, gradient, parts, images, alive, agreement = _joined([scores[k] for k in sorted(scores)])
    above = gradient * _slope(loss, rewards).abs().to(gradient).reshape(-1, *[1] * (x.ndim - 1))
    result = Swept(
        [torch.zeros_like(p) for p in parameters],
        rewards,
        loss(rewards),
        parts,
        images,
        x.new_zeros(len(x)),
        ends,
        agreement=agreement,
        clamped=((images <= 0) | (images >= 1)).float().mean().item(),
        has_graph=alive,
    )
    for i in reversed(chain.running):
        if i < chain.first_active:
            break
        below, total = torch.empty_like(x), [torch.zeros_like(p) for p in parameters]

        def step(rows: slice, i=i, below=below, total=total, above=above):
            cotangent, gradients, extra = _back_through(
                chain[rows], i, states[i][rows], outputs[i][rows] if i in outputs else None, above[rows], parameters
            )
            below[rows] = cotangent
            result.step_losses[rows] += extra
            for a, g in zip(total, gradients or [], strict=False):
                a += g

        size = in_pieces(step, len(x), size)
        if chain.active[i]:
            result.step_norms[i] = torch.stack([g.norm() for g in total]).norm().item()
            result.gradient = [a + g for a, g in zip(result.gradient, total, strict=True)]
        above = below
        states.pop(i)
    result.rows = {**rows, "recompute": network.rows("network"), "backward": network.rows("backward")}
    result.piece = size
    return result


def plain(chain: Chain, x: Tensor, loss: Loss, parameters: Sequence[Tensor]) -> Swept:
    """The readable twin of `sweep`: the whole chain as one autograd graph, inactive outputs detached."""
    network, extra = _Counter(chain.model), x.new_zeros(len(x))
    with torch.enable_grad():
        for i in chain.running:
            out = chain.predict(i, x)
            if not chain.active[i]:
                out = out.detach()
            elif chain.step_loss is not None:
                extra = extra + chain.step_loss(x, out, chain.times[i], chain.cond)
            x = chain.advance(i, x, out)
        images = chain.model.decode(chain.model.process.complete(x, x))
        rewards, parts = scored_parts(chain.reward, images, chain.batch)
        losses = loss(rewards)
        total = losses.sum() + extra.sum()
        alive = total.requires_grad
        gradient = torch.autograd.grad(total, parameters, allow_unused=True) if alive else [None] * len(parameters)
    return Swept(
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient, strict=True)],
        rewards.detach(),
        losses.detach(),
        {k: v.detach() for k, v in parts.items()},
        images.detach(),
        extra.detach(),
        x.detach(),
        has_graph=alive,
        rows={"forward": network.rows("network"), "backward": network.rows("backward")},
    )


def surrogate(gradient: list[Tensor], parameters: Sequence[Tensor], value: Tensor) -> Tensor:
    """A scalar equal to `value` whose backward is exactly `gradient`."""
    return value.detach() + sum(((p - p.detach()) * g).sum() for p, g in zip(parameters, gradient, strict=True))


def _joined(pieces: list[tuple]):
    rewards, gradient, parts, images, alive, agreement = zip(*pieces, strict=True)
    return (
        torch.cat(rewards),
        torch.cat(gradient),
        {k: torch.cat([p[k] for p in parts]) for k in parts[0]},
        torch.cat(images),
        all(alive),
        {k: torch.cat([a[k] for a in agreement]) for k in agreement[0]},
    )


class _Counter:
    """Rows through the network, and gradients back through it, since the last look."""

    def __init__(self, model: Model):
        self.calls: dict[str, int] = getattr(model, "calls", {})
        self.seen = dict(self.calls)

    def rows(self, kind: str) -> int:
        now, before = self.calls.get(kind, 0), self.seen.get(kind, 0)
        self.seen[kind] = now
        return now - before
