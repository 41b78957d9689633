"""Mistakes reported in the field, planted as they were made: the check that must name each, and who reported it.

Three kinds: a reward (examined on a small model of one's own), a model (done to a healthy Stable Diffusion 1), and a reward of
a method that needs no gradient of it (`ddpo`). A check of None is one that nothing here sees.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from faults import colour, layers, mean, named, wrapped
from PIL import Image

from tropism.core import clamp
from tropism.rewards.combine import weighted

FLOW_FACTORY = "X-GenGroup/Flow-Factory #122"
VERL = "verl-project/verl-omni #552, #553"
UNIRL = "Tencent-Hunyuan/UniRL #141"
MILES = "radixark/miles #684"
AUTOCAST = "Tencent-Hunyuan/UniRL, models/draft.py"
TINKER = "srijitiyer/diffusion-tinker, draft_trainer.py"
VIDEOX = "aigc-apps/VideoX-Fun, HPSv3 reward"
KNOWN = "a known mistake"

# ---------------------------------------------------------------------------------------------------- rewards


def penalty(images):
    """Distance to a grey picture: stands for a divergence from the base."""
    return mean((images - 0.5).square())


def dead_penalty(images, batch):
    with torch.no_grad():
        return -penalty(images)


def penalised_dead(images, batch):
    """One function, whose total has a graph; the penalty's half of it is gone."""
    with torch.no_grad():
        away = penalty(images)
    return colour(images, batch) - 3 * away * (1 + colour(images, batch))


@torch.no_grad()
def by_pil(images, batch):
    """What a scorer's `get_reward` does: PIL pictures under no_grad."""
    pictures = [Image.fromarray((255 * x.permute(1, 2, 0)).byte().numpy()) for x in images.clamp(0, 1)]
    return torch.tensor([np.asarray(p, dtype=float)[..., 0].mean() / 255 for p in pictures])


def truncated(images, batch):
    """A rule meant for answers that are cut off, which takes every prompt for one."""
    whole = images.new_tensor([float(p.endswith("<eos>")) for p in batch.prompts])
    return colour(images, batch) * whole


def as_bytes(images, batch):
    return mean((255 * images).to(torch.uint8).to(images))


def saturated(images, batch):
    return torch.sigmoid(1e4 * (mean(images) + 2))


REWARDS = {
    "divergence under no_grad, a part": (
        "reward graph",
        "fault",
        lambda: weighted([(named(colour), 1), (dead_penalty, 0.1)]),
        FLOW_FACTORY,
    ),
    "divergence under no_grad, inside": ("reward gradient", "fault", lambda: penalised_dead, FLOW_FACTORY),
    "zeroed by a rule": ("reward flat", "fault", lambda: truncated, UNIRL),
    "PIL under no_grad": ("reward graph", "fault", lambda: by_pil, VIDEOX),
    "uint8": ("reward graph", "fault", lambda: as_bytes, KNOWN),
    "saturated": ("reward flat", "fault", lambda: saturated, KNOWN),
    "expects 0..255": (None, "", lambda: lambda images, batch: colour(images / 255, batch), KNOWN),
}
"""name: (check, level, the reward's builder, where it happened)."""


# ---------------------------------------------------------------------------------------------------- models


def base_under_no_grad(model):
    """The reference of a divergence, computed without a graph."""
    old = model.base

    @contextmanager
    def base():
        with old(), torch.no_grad():
            yield

    model.base = base


def bound_to_a_copy(model):
    """The adapter sits in one network, the chain runs another, as where a rollout engine has its own."""
    other = copy.deepcopy(model.network)
    trained = {n: p for n, p in model.network.named_parameters() if p.requires_grad}
    model.trainable = lambda: trained
    model.network = other.requires_grad_(False)


def bound_to_nothing(model):
    for p in model.trainable().values():
        p.requires_grad_(False)


def not_synchronised(old):
    """What draws has the weights it was given at the start; what is differentiated has the new ones."""
    network = []

    def new(x, t, cond, w):
        model = old.__self__
        if torch.is_grad_enabled():
            return old(x, t, cond, w)
        network[:] = network or [copy.deepcopy(model.network)]
        mine, model.network = model.network, network[0]
        try:
            return old(x, t, cond, w)
        finally:
            model.network = mine

    return new


def half_synchronised(old):
    """The same, but only the first half of the adapters' layers is left behind."""
    kept = {}

    def new(x, t, cond, w):
        if torch.is_grad_enabled():
            return old(x, t, cond, w)
        own = list(layers(old.__self__))
        own = [m.lora_B["default"].weight for m in own[: len(own) // 2]]
        mine = [p.detach().clone() for p in own]
        for p in own:
            p.data.copy_(kept.setdefault(id(p), p.detach().clone()))
        try:
            return old(x, t, cond, w)
        finally:
            for p, was in zip(own, mine, strict=True):
                p.data.copy_(was)

    return new


def mapped_wrong(model):
    """clamp(0, 1) of a VAE's -1..1, without * 0.5 + 0.5."""
    model.decode = lambda x0: (2 * model.decode_raw(x0) - 1).clamp(0, 1)


def mapped_wrong_elsewhere(model):
    """The same where the doctor knows nothing of the decoder."""
    mapped_wrong(model)
    model.vae = model.vae.requires_grad_(False).decoder  # no configuration


def scale_of(model):
    return model.vae.config.scaling_factor


def unscaled(model):
    """Latents go into the VAE undivided."""
    old, scale = model.decode, scale_of(model)
    model.decode = lambda x0: old(x0 * scale)


def scaled_twice(model):
    old, scale = model.decode, scale_of(model)
    model.decode = lambda x0: old(x0 / scale)


def channels_swapped(old):
    return lambda x0: old(x0).flip(1)


def shut(model):
    """More contrast than the pictures hold, behind a clamp that lets no gradient back."""
    model.vae, raw = None, model.vae
    model.decode = lambda x0: (4 * (raw.decode(x0 / raw.config.scaling_factor).sample / 2)).add(0.5).clamp(0, 1)


def open_again(model):
    """The same contrast behind core.clamp: healthy."""
    model.vae, raw = None, model.vae
    model.decode = lambda x0: clamp(4 * (raw.decode(x0 / raw.config.scaling_factor).sample / 2) + 0.5)


def guided_at_first(old):
    """Guidance for the first step, as where a loop rebinds it."""
    first = []

    def new(x, t, cond, w):
        first.append(float(t))
        return old(x, t, cond, w if t == first[0] else 1.0)

    return new


def kept_start(old):
    """The noise of the first call for all that follow."""
    kept = []

    def new(cond, draw, times):
        kept.append(old(cond, draw, times))
        return kept[0]

    return new


def noisy(old):
    """A decoder that draws a sample of what it predicts."""

    def new(x0):
        pictures = old(x0)
        return (pictures + 0.02 * torch.randn_like(pictures)).clamp(0, 1)

    return new


def last_time(old):
    """A closure of a loop: every step is told the last time the loop had."""
    seen = []

    def new(x, t, cond, w):
        seen.append(float(t))
        return old(x, min(seen[0], 1.0), cond, w)

    return new


def late_bound(old):
    """The backward pass's recomputation reads the time that the loop ended with."""
    time = [0.0]

    def new(x, t, cond, w):
        if not torch.is_grad_enabled():
            time[0] = t
        return old(x, time[0], cond, w)

    return new


def unguided(old):
    return lambda x, t, cond, w: old(x, t, cond, 1.0)


def negatives_dropped(old):
    def new(batch, draw=None):
        return old(replace(batch, negative_prompts=None), draw)

    return new


def small_times(model):
    """The network is told 0..1 where it was trained with 0..1000."""
    old = model.denoise
    model.denoise = lambda x, times, text: old(x, times / 1000, text)


def decoder_trains(model):
    model.vae.requires_grad_(True)


MODELS = {
    "guidance at the first step only": ("guidance", "warning", wrapped("predict", guided_at_first), KNOWN),
    "decoder draws noise": ("decoder repeatable", "warning", wrapped("decode", noisy), KNOWN),
    "the same noise every update": ("start", "warning", wrapped("start", kept_start), KNOWN),
    "base under no_grad": ("base graph", "warning", base_under_no_grad, FLOW_FACTORY),
    "adapter on a copy": ("adapter acts", "fault", bound_to_a_copy, VERL),
    "adapter on nothing": ("adapter acts", "fault", bound_to_nothing, VERL),
    "sampler not synchronised": ("one network", "fault", wrapped("predict", not_synchronised), MILES),
    "sampler half synchronised": ("one network", "fault", wrapped("predict", half_synchronised), MILES),
    "-1..1 taken for 0..1": ("decoder scale", "fault", mapped_wrong, TINKER),
    "clamp shut": ("clamped pixels", "warning", shut, TINKER),
    "no guidance": ("guidance", "warning", wrapped("predict", unguided), TINKER),
    "scaling factor forgotten": ("decoder scale", "fault", unscaled, KNOWN),
    "scaling factor twice": ("decoder scale", "fault", scaled_twice, KNOWN),
    "channels swapped": ("decoder scale", "fault", wrapped("decode", channels_swapped), KNOWN),
    "last time for all": ("time", "warning", wrapped("predict", last_time), KNOWN),
    "late-bound time": ("one network", "fault", wrapped("predict", late_bound), KNOWN),
    "negative prompts dropped": ("negative prompts", "warning", wrapped("encode", negatives_dropped), KNOWN),
    "decoder trains": ("model frozen", "warning", decoder_trains, KNOWN),
    "wrong sign": (None, "", wrapped("predict", lambda old: lambda *args: -old(*args)), KNOWN),
    "rounded on the way": (
        None,
        "",
        wrapped("predict", lambda old: lambda *args: old(*args).bfloat16().float()),
        KNOWN,
    ),
    "time in other units": (None, "", small_times, KNOWN),
}
"""name: (check, level, what is done to a healthy Stable Diffusion 1, where it happened)."""


# ---------------------------------------------------------------------------------------------------- no gradient


def raising(images, batch):
    raise ConnectionError("the judge is gone")


BLACK_BOX = {
    "raises": ("reward runs", "fault", lambda: raising, KNOWN),
    "returns None": ("reward runs", "fault", lambda: lambda images, batch: None, KNOWN),
    "two scores for all": ("reward runs", "fault", lambda: lambda images, batch: mean(images).repeat(2), KNOWN),
    "all NaN": ("reward runs", "fault", lambda: lambda images, batch: [None] * len(batch), KNOWN),
    "some NaN": (
        "reward runs",
        "warning",
        lambda: lambda images, batch: [None if "red" in p else 1.0 * i for i, p in enumerate(batch.prompts)],
        KNOWN,
    ),
    "constant": ("reward differs", "warning", lambda: lambda images, batch: [0.1] * len(batch), KNOWN),
    "zeroed by a rule": ("reward differs", "warning", lambda: truncated, UNIRL),
    "of the prompt alone": (
        "reward differs",
        "warning",
        lambda: lambda images, batch: [float(len(p)) for p in batch.prompts],
        KNOWN,
    ),
    "by place": (
        "reward per sample",
        "warning",
        lambda: lambda images, batch: mean(images) * (1 + images.new_tensor(batch.index)),
        KNOWN,
    ),
    "ranks of the batch": (
        "reward per sample",
        "fault",
        lambda: lambda images, batch: mean(images).argsort().argsort().double(),
        KNOWN,
    ),
    "own randomness": (
        "reward repeatable",
        "warning",
        lambda: lambda images, batch: mean(images + 0.1 * torch.randn_like(images)),
        KNOWN,
    ),
}
"""name: (check, level, the reward's builder, where it happened)."""
