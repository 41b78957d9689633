"""Your own one-step upscaler: a small network, a reward, the same algorithm as everywhere. Seconds on a laptop."""

import torch
from torch.nn import functional as F

from tropism.align.alignprop import alignprop
from tropism.core import Batch
from tropism.models.one_step import OneStep


class Twice(torch.nn.Module):
    """Enlarges twice: the nearest pixel plus what two convolutions add. Yours may be anything that autograd can go through."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, low_res):  # (B, 3, h, w) in [0, 1] -> (B, 3, 2 h, 2 w)
        detail = F.pixel_shuffle(self.second(torch.relu(self.first(2 * low_res - 1))), 2)
        return F.interpolate(low_res, scale_factor=2) + detail


class Mine(OneStep):
    """What `--model examples/own_upscaler.py:Mine` loads."""

    def __init__(self):
        super().__init__(Twice(), scale=2)


def closeness(images, batch):  # to the picture that was made small, (B,), higher is better
    return -(images - batch.reference).square().mean((1, 2, 3))


def pictures(seed, count=16, side=16):
    """Discs of random colours and places, and the same at half the size."""
    g, line = torch.Generator().manual_seed(seed), torch.arange(side)
    place, colour = torch.rand(count, 2, 1, 1, generator=g) * side, torch.rand(count, 2, 3, 1, 1, generator=g)
    disc = ((line.view(1, -1, 1) - place[:, 0]) ** 2 + (line - place[:, 1]) ** 2 < 25).float().unsqueeze(1)
    large = disc * colour[:, 0] + (1 - disc) * colour[:, 1]
    return Batch([""] * count, reference=large, low_res=F.avg_pool2d(large, 2))


def main(updates=60):
    torch.manual_seed(0)
    model, held = Mine(), pictures(seed=1)
    optimiser = torch.optim.Adam(model.trainable().values(), lr=3e-3)
    error = lambda: -closeness(model.decode(model.network(held.low_res)), held).mean().item()
    before, how = error(), {"state": {}, "seed": 0, "steps": 1, "guidance": 1.0}
    for update in range(updates):
        for loss, info in alignprop(model, closeness, pictures(update + 2), update=update, **how):
            optimiser.zero_grad()
            (loss / info.samples).backward()
            optimiser.step()
    print(f"squared error on held-out pictures: {before:.4f} -> {error():.4f}")
    return before, error()


if __name__ == "__main__":
    main()
