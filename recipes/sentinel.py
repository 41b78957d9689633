"""Does the sentinel see over-optimisation, and nothing else? 40 runs with a planted shortcut, 60 healthy ones, on a mixture of Gaussians.

    python recipes/sentinel.py --out docs/results/sentinel       10 minutes on one core

A run: AlignProp on the exact denoiser of four Gaussians in the plane plus a small network, 100 updates of 32 samples, evaluated every 4
updates on 64. gold: nearness to a place. Trained: gold with an error of its own (random waves, a tenth of gold's range) and, if planted, a
shortcut: a narrow corridor out of the good place along which the reward rises threefold, found late. Held out: gold with another error.
Waves, place and corridor are drawn from the seed.
Counted: planted runs whose chosen update has a gold score within 10 % of the best, and healthy runs with an alarm.
"""

import argparse
import csv
import math
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tropism.align.alignprop import alignprop
from tropism.align.rollout import sample
from tropism.core import Batch, Draw
from tropism.core import kernel as default_kernel
from tropism.process.gaussian import VP
from tropism.run.sentinel import Seen, assess
from tropism.worlds.mixture import Law, MixtureModel

LAW = Law.of([1, 1, 1, 1], [[-1.5, -1.5], [-1.5, 1.5], [1.5, -1.5], [1.5, 1.5]], [0.2] * 4)
UPDATES, EVERY, B, HELD, STEPS = 100, 4, 32, 64, 10


class Trained(MixtureModel):
    """The exact noise prediction plus a small network that starts at zero."""

    def __init__(self, seed: int):
        super().__init__(LAW, exact=False)
        self.process, self.on = VP(self.process.alpha_bars, "trailing", 0, 0.0, 1.0), True
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2)).double()
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def predict(self, x_t, t, cond, guidance):
        eps = (x_t - self.process.alpha(t) * super().predict(x_t, t, cond, guidance)) / self.process.sigma(t)
        time = torch.full((len(x_t), 1), float(t) / 10, dtype=torch.float64)
        return eps + self.net(torch.cat([x_t, time], 1)) if self.on else eps

    def x0(self, x_t, out, t):
        return self.process.x0(x_t, out, t, "epsilon")

    kernel = default_kernel

    @contextmanager
    def base(self):
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def trainable(self):
        return dict(self.net.named_parameters())


def world(seed: int, planted: bool):
    """(gold, trained, held out): functions (B, 2) -> (B,)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    centre = draw(2) * 0.8
    gold = lambda x: torch.exp(-(x - centre).square().sum(-1) / 4)

    def waves():
        w, phase, size = draw(8, 2), draw(8) * 6, draw(8) / 8**0.5
        return lambda x: 0.1 * (size * torch.cos(x @ w.T + phase)).sum(-1)

    first, second, angle = waves(), waves(), draw(1).item() * math.pi
    away = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    height, width = 1.5 + 1.5 * torch.rand(1, generator=g).item(), 0.1 + 0.1 * torch.rand(1, generator=g).item()
    across = torch.stack([-away[1], away[0]])

    def shortcut(x: Tensor):
        """A narrow corridor out of the good place, along which the reward rises: found late, by those that are good already."""
        along, off = (x - centre) @ away, (x - centre) @ across
        return height / 3 * along.clamp(0, 3) * torch.exp(-off.square() / (2 * width**2)) if planted else 0.0

    return gold, (lambda x, batch=None: gold(x) + first(x) + shortcut(x)), (lambda x: gold(x) + second(x))


def run(seed: int, planted: bool) -> tuple[list[Seen], list[float]]:
    """(evaluations, gold at each)."""
    gold, trained, held = world(seed, planted)
    model, asked = Trained(seed), Batch([""] * HELD)
    adam, seen, golds = torch.optim.Adam(model.trainable().values(), lr=3e-3), [], []
    for update in range(UPDATES + 1):
        if update % EVERY == 0:
            x: Tensor = sample(model, asked, Draw(seed, 2**40, asked.index), steps=STEPS, guidance=1.0)
            seen.append(Seen(update, trained(x), {"held out": held(x)}))
            golds.append(gold(x).mean().item())
        loss, _ = next(alignprop(model, trained, Batch([""] * B), state={}, update=update, seed=seed, steps=STEPS,
                                 guidance=1.0, truncation="full"))  # fmt: skip
        adam.zero_grad()
        (loss / B).backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), 1.0)
        adam.step()
    return seen, golds


def judged(seen: list[Seen], golds: list[float]) -> tuple[bool, int, float, float]:
    """(alarm, chosen update, its share of the best gold score, the last update's share)."""
    stopped = next((i for i in range(2, len(seen) + 1) if assess(seen[:i]).alarm), None)
    found = assess(seen[: stopped or len(seen)])
    chosen = found.best if stopped else seen[-1].update
    share = lambda update: golds[update // EVERY] / max(golds)
    return stopped is not None, chosen, share(chosen), share(seen[-1].update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sentinel"))
    parser.add_argument("--planted", type=int, default=40)
    parser.add_argument("--healthy", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for planted, count in ((True, asked.planted), (False, asked.healthy)):
        for seed in range(asked.first, asked.first + count):
            rows.append([planted, seed, *judged(*run(seed, planted))])
            print(*rows[-1], flush=True)
    with (asked.out / "sentinel.csv").open("w", newline="") as f:
        csv.writer(f).writerows(
            [["planted", "seed", "alarm", "chosen update", "share of best gold", "share at the end"], *rows]
        )
    planted, healthy = [r for r in rows if r[0]], [r for r in rows if not r[0]]
    within = sum(r[4] >= 0.9 for r in planted)
    spoilt = sum(r[5] < 0.9 for r in planted)
    print(
        f"planted: {within} of {len(planted)} end within 10 % of the best gold score ({spoilt} would not without the sentinel)"
    )
    print(f"healthy: {sum(r[2] for r in healthy)} alarms in {len(healthy)}")


if __name__ == "__main__":
    main()
