"""`tropism pretrain solids`: the bundled networks of the `solids` world, trained from nothing on one core.

Every stage checkpoints into OUT/.train and goes on where it stopped. OUT/reward.safetensors rewards and OUT/judge.safetensors only judges:
two classifiers of different build, seed and data. The one that rewards never sees the solids that are held out; the judge, which must
read those too, sees all. OUT/model and OUT/adapter are the diffusion model and its image adapter (pretrain_solids_model).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from tropism.run.pretrain_loop import train
from tropism.run.pretrain_solids_model import solids_model
from tropism.space.cameras import Cameras, drawn
from tropism.worlds import solids, solids_features, solids_library
from tropism.worlds.solids import Scene
from tropism.worlds.solids_features import HEADS, Classifier


@dataclass(frozen=True)
class Lengths:
    """Updates of every stage, the views from which each shape and size is rendered for classifiers, and the sides for the model."""

    reward: int = 5000
    judge: int = 5000
    denoiser: int = 12_000
    encoder: int = 1500
    adapter: int = 2000
    views: int = 160
    sides: int = solids_library.AZIMUTHS


QUICK = Lengths(reward=2, judge=2, denoiser=2, encoder=2, adapter=2, views=4, sides=1)
"""Enough to see every stage work, in seconds; the networks know nothing."""
BATCH = 64
DENSITIES = (solids.DENSITY, 6.0, 2.0)
"""Of the solids that classifiers learn from: as they are, soft, and a fog that the middle of a cube lets 15 % through."""
ELEVATIONS = (-10.0, 85.0)
TRAINING, CHECKING = 1, 2
"""Seeds of the cameras."""


# ---------------------------------------------------------------------------------------------------- classifiers


@dataclass(frozen=True)
class Bank:
    """Pictures without colours of G shapes and sizes from V cameras in D densities: channels (D, G, V, 2, S, S), opacity likewise.

    face: (G, V) bool, whether a face is turned to the camera.
    """

    plain: tuple[Scene, ...]
    cameras: Cameras
    channels: Tensor
    opacity: Tensor
    face: Tensor

    def values(self, scene: Scene, shape: int, camera: int, views: list[str]) -> dict[str, int]:
        """By head, which of its values a picture of this scene shows."""
        said = scene.solids[0].said
        numbers = {name: HEADS[name].index(value) for name, value in said.items()}
        return numbers | {"view": HEADS["view"].index(views[camera]), "face": int(self.face[shape, camera])}


def bank(folder: Path, views: int, seed: int, densities: tuple[float, ...] = DENSITIES) -> Bank:
    """Rendered once, then read from `folder`."""
    rig = drawn(views, seed, 0, elevation=ELEVATIONS)
    plain = tuple(dict.fromkeys(solids_library.colourless(s) for s in solids.scenes()))
    kept = [[solids_library.shaded(s, rig, density=d, folder=folder) for s in plain] for d in densities]
    channels, opacity = (torch.stack([torch.stack([one[k] for one in row]) for row in kept]) for k in (0, 1))
    face = torch.stack([solids_library.turned(s, c) for s, c in zip(plain, channels[0], strict=True)])
    return Bank(plain, rig, channels, opacity, face)


def train_classifier(name: str, folder: Path, updates: int, views: int, batch: int = BATCH) -> Classifier:
    """Which solid a spoilt picture shows, from where, and whether its face is seen: cross-entropy, summed over heads."""
    torch.manual_seed({"reward": 1, "judge": 2}[name])
    network, stream = solids_features.new(name), {"reward": 31, "judge": 32}[name]
    of = bank(folder / "pictures", views, TRAINING)
    pool = solids.scenes(held_out=False if name == "reward" else None)

    def loss(update: int) -> Tensor:
        pictures, wanted = spoilt_solids(of, pool, np.random.default_rng([stream, update]), batch)
        logits = network.logits(pictures)
        return torch.stack([F.cross_entropy(logits[head], wanted[head]) for head in HEADS]).sum()

    return train(name, network, loss, folder, updates=updates, lr=2e-3, ema=0.99, every=100)


def spoilt_solids(
    of: Bank, pool: list[Scene], rng: np.random.Generator, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (B, 3, S, S) in [0, 1] and, by head, what they show as probabilities (B, K).

    A third are dense, the others soft or fog. Half are mixtures of two solids, and their targets are mixed alike; a third are
    half-transparent, with targets as sure as they are opaque: so a reward made of a network has a slope from nothing to a solid and from
    one solid to another. Then a background, blur, a shift and grain.
    """
    number = lambda low, high: torch.from_numpy(rng.uniform(low, high, count).astype(np.float32)).view(-1, 1, 1, 1)
    density, camera = (rng.integers(n, size=count) for n in (len(of.channels), len(of.cameras)))
    (first, dense, one), (second, other_dense, two) = (_clean(of, pool, rng, density, camera) for _ in range(2))
    share = torch.where(number(0, 1) < 0.5, 1.0, number(0.5, 1))
    opaque = torch.where(number(0, 1) < 2 / 3, 1.0, number(0, 1))
    light = opaque * (share * first + (1 - share) * second)
    cover = opaque * (share * dense + (1 - share) * other_dense)
    x = light + (1 - cover) * _grounds(rng, light, cover)
    for _ in range(2):
        blur = torch.where(number(0, 1) < 0.5, 0.0, number(0, 1))
        x = (1 - blur) * x + blur * F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.roll(rng.integers(-2, 3, 2).tolist(), (2, 3))
    x = x + number(0, 0.12) * torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32))
    s, o = share.flatten(1), opaque.flatten(1)
    return x.clamp(0, 1), {h: o * (s * one[h] + (1 - s) * two[h]) + (1 - o) / one[h].shape[1] for h in HEADS}


def _clean(
    of: Bank, pool: list[Scene], rng: np.random.Generator, density: np.ndarray, camera: np.ndarray
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Light, opacity and one-hot targets by head of solids drawn from the pool, seen by these cameras; colours vary a little."""
    chosen, views = [pool[i] for i in rng.integers(len(pool), size=len(camera))], of.cameras.views()
    shape = [of.plain.index(solids_library.colourless(s)) for s in chosen]
    channels, cover = of.channels[density, shape, camera], of.opacity[density, shape, camera]
    colours = torch.stack([solids.palette(s, channels) for s in chosen])
    varied = colours + 0.05 * torch.from_numpy(rng.standard_normal(tuple(colours.shape), np.float32))
    rows = [of.values(s, g, c, views) for s, g, c in zip(chosen, shape, camera.tolist(), strict=True)]
    hot = {h: F.one_hot(torch.tensor([r[h] for r in rows]), len(HEADS[h])).float() for h in HEADS}
    return solids_library.painted(channels, varied.clamp(0, 1)), cover, hot


def _grounds(rng: np.random.Generator, light: Tensor, cover: Tensor) -> Tensor:
    """Colours (B, 3, 1, 1), a third each white, grey and any; grey instead of any that the solid would be lost on."""
    kind, any_, grey = (
        rng.integers(3, size=len(light)),
        rng.uniform(0, 1, (len(light), 3)),
        rng.uniform(0, 1, len(light)),
    )
    mean = (light.sum((2, 3)) / cover.sum((2, 3)).clamp_min(1e-3)).numpy()
    lost = np.linalg.norm(mean - any_, axis=1) < 0.4
    colours = np.where((kind == 0)[:, None], 1.0, np.where(((kind == 1) | lost)[:, None], grey[:, None], any_))
    return torch.from_numpy(colours.astype(np.float32))[:, :, None, None]


@torch.no_grad()
def read_right(network: Classifier, of: Bank, scenes: list[Scene]) -> dict[str, float]:
    """By head, the share of clean pictures of scenes on white, from all cameras, that are read right."""
    right, views = dict.fromkeys(HEADS, 0.0), of.cameras.views()
    for scene in scenes:
        g = of.plain.index(solids_library.colourless(scene))
        light = solids_library.painted(of.channels[0, g], solids.palette(scene, of.channels))
        guess = network.logits(light + 1 - of.opacity[0, g])
        wanted = [of.values(scene, g, c, views) for c in range(len(views))]
        for head in HEADS:
            same = guess[head].argmax(1) == torch.tensor([w[head] for w in wanted])
            right[head] += same.float().mean().item() / len(scenes)
    return right


def solids_world(out: Path, lengths: Lengths) -> None:
    """Train everything, write the networks, and say how well each classifier reads views it never saw."""
    folder, console = out / ".train", Console(soft_wrap=True, highlight=False)
    checked = bank(folder / "pictures", max(2, lengths.views // 4), CHECKING, DENSITIES[:1])
    for name, updates in (("reward", lengths.reward), ("judge", lengths.judge)):
        network = train_classifier(name, folder, updates, lengths.views)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / f"{name}.safetensors")
        for held_out in (False, True):
            right = read_right(network, checked, solids.scenes(held_out=held_out))
            said = ", ".join(f"{head} {share:.1%}" for head, share in right.items())
            console.print(f"{name} reads {'held-out' if held_out else 'trained'} solids: {said}")
    pictures = solids_library.library(azimuths=lengths.sides, folder=folder / "pictures")
    solids_model(out, pictures, {n: getattr(lengths, n) for n in ("denoiser", "encoder", "adapter")})
