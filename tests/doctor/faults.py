"""Planted faults: one mistake each, as it is made in the field, with the check that must name it and how loudly."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import ToyCond, ToyModel

from tropism.core import UserError
from tropism.rewards.combine import weighted
from tropism.rewards.named import Named


class Painter(ToyModel):
    """A user's own model with what the protocol asks for and no more: pictures (B, 3, 4, 4) inside (0, 1), float64."""

    def __init__(self):
        super().__init__()
        del self.calls

    def encode(self, batch, draw=None):
        return ToyCond(torch.tensor([[(len(p) % 7 + 1) / 8] for p in batch.prompts], dtype=torch.float64))

    def _net(self, x, t, c):
        self.calls = {}
        out = super()._net(x, t, c)
        del self.calls
        return out

    def decode(self, x0):
        return torch.sigmoid((x0.flatten(1) @ self.read.T).reshape(-1, 3, 4, 4))


def colour(images, batch):
    """Red above the rest: healthy."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def named(function):
    return Named("planted", True, function)


# ---------------------------------------------------------------------------------------------------- rewards


class Doubled(torch.autograd.Function):
    """The identity, with half of its gradient turned round."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.cat([gradient[:, :1], -gradient[:, 1:]], 1)


def mean(x):
    return x.flatten(1).mean(1)


def without_graph(images, batch):
    with torch.no_grad():
        return colour(images, batch)


def straight_through(images, batch):
    hard = (images > 0.5).to(images)
    return mean(hard + 3 * (images - images.detach()))


def left_half_detached(images, batch):
    half = images.shape[-1] // 2
    return mean(torch.cat([images[..., :half].detach(), images[..., half:]], -1).square())


def contrast(images, batch):
    return mean((images - images.mean((1, 2, 3), keepdim=True)).square()).sqrt()


def above_the_best():
    """Scores are told as distances to the best so far."""
    best = [-1e9]

    def score(images, batch):
        found = colour(images, batch)
        best[0] = max(best[0], found.max().item())
        return found - best[0]

    return score


def standardised(images, batch):
    score = colour(images, batch)
    return (score - score.mean()) / (score.std() + 1e-6)


def network(training=False, dropout=0.0, frozen=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 1)).double()
    return net.train(training).requires_grad_(not frozen)


def judged_by(net):
    return lambda images, batch: net(images.double())[:, 0]


def broken(images, batch):
    raise KeyError("width")


def refusing(images, batch):
    raise UserError("The prompt names no colour. Name one.")


REWARDS = {
    "under no_grad": ("reward graph", "fault", lambda: without_graph),
    "detached": ("reward graph", "fault", lambda: lambda images, batch: colour(images.detach(), batch)),
    "through numpy": (
        "reward graph",
        "fault",
        lambda: lambda images, batch: torch.as_tensor(images.detach().numpy().mean((1, 2, 3))),
    ),
    "a dead part of a sum": ("reward graph", "fault", lambda: weighted([(named(colour), 1), (without_graph, 0.1)])),
    "rounded": ("reward flat", "fault", lambda: lambda images, batch: mean((255 * images).round())),
    "compared": ("reward flat", "fault", lambda: lambda images, batch: mean((images > 0.5).to(images) + 0 * images)),
    "constant": ("reward flat", "fault", lambda: lambda images, batch: 0 * mean(images)),
    "infinite slope": ("reward flat", "fault", lambda: lambda images, batch: mean((images - images).sqrt() + images)),
    "wrong backward": ("reward gradient", "fault", lambda: lambda images, batch: mean(Doubled.apply(images).square())),
    "straight through": ("reward gradient", "fault", lambda: straight_through),
    "half detached": ("reward gradient", "fault", lambda: left_half_detached),
    "weights detached": (
        "reward gradient",
        "warning",
        lambda: lambda images, batch: mean(images + 0.15 * images.detach()),
    ),
    "batch statistics": ("reward per sample", "fault", lambda: standardised),
    "batch mean": ("reward per sample", "fault", lambda: lambda images, batch: images.mean() + 0 * mean(images)),
    "by place": (
        "reward per sample",
        "warning",
        lambda: lambda images, batch: mean(images) * (1 + images.new_tensor(batch.index)),
    ),
    "sparse": ("reward flat", "warning", lambda: lambda images, batch: (mean(images[:, 0]) - 0.85).clamp_min(0)),
    "dropout": ("reward repeatable", "fault", lambda: judged_by(network(True, 0.5))),
    "own randomness": (
        "reward repeatable",
        "warning",
        lambda: lambda images, batch: mean(images + 0.1 * torch.randn_like(images)),
    ),
    "remembers the best": ("reward repeatable", "warning", above_the_best),
    "not frozen": ("reward frozen", "warning", lambda: judged_by(network(frozen=False))),
    "infinite on black": ("reward finite", "warning", lambda: lambda images, batch: mean(images).log()),
    "no slope on grey": ("reward finite", "warning", lambda: contrast),
    "not a number": ("reward runs", "fault", lambda: lambda images, batch: mean(images) / 0 - mean(images) / 0),
    "one number": ("reward runs", "fault", lambda: lambda images, batch: images.mean()),
    "raises": ("reward runs", "fault", lambda: broken),
    "refuses": ("reward runs", "fault", lambda: refusing),
}
"""name: (check, level, the reward's builder)."""


# ---------------------------------------------------------------------------------------------------- models


def wrapped(name, change):
    """Put a method of the model through `change(old) -> new`."""

    def alter(model):
        setattr(model, name, change(getattr(model, name)))

    return alter


def no_grad(old):
    def new(*args):
        with torch.no_grad():
            return old(*args)

    return new


def first_rows_detached(old):
    """The right output; the upper half of the picture has lost its gradient."""

    def new(*args):
        out = old(*args)
        half = out.shape[-2] // 2
        return torch.cat([out[..., :half, :].detach(), out[..., half:, :]], -2)

    return new


def unmapped(model):
    """-1..1 taken for 0..1, from a VAE whose scaling factor was forgotten."""
    model.decode = lambda x0: (200 * (model.decode_raw(x0) - 0.5)).clamp(0, 1)


def swapped(old):
    """The halves of the doubled batch the wrong way round."""
    return lambda x, t, cond, w: old(x, t, cond, 1.0 if w == 1 else 1 - w)


def shifted(old):
    """Imagen's convention: 0 is off."""
    return lambda x, t, cond, w: old(x, t, cond, 1 + w)


def rescaled(old):
    def new(x, t, cond, w):
        out = old(x, t, cond, w)
        size = lambda y: y.std((1, 2, 3), keepdim=True)
        return out if w <= 1 else out * size(old(x, t, cond, 1.0)) / size(out)

    return new


def whitened(old):
    """Statistics over the whole batch."""

    def new(x, t, cond, w):
        out = old(x, t, cond, w)
        return out / out.std()

    return new


def doubled(old):
    """w (cond - uncond) added once too often."""
    return lambda x, t, cond, w: old(x, t, cond, 2 * w)


def unkeyed(old):
    return lambda cond, draw, times: (torch.randn_like(old(cond, draw, times)[0]), 0)


def alike(old):
    return lambda cond, draw, times: (old(cond, draw, times)[0][:1].expand(len(cond), -1, -1, -1).clone(), 0)


def input_detached(old):
    return lambda x, t, cond, w: old(x.detach(), t, cond, w)


def half_adapter(model):
    """The adapters' outputs are right; half of each has lost its gradient to the weights, none to the latents."""
    for layer in layers(model):

        def hook(module, inputs, out):
            with torch.no_grad():
                frozen = module.weight.detach().clone()
            again = F.linear(inputs[0], frozen)
            half = out.shape[-1] // 2
            return torch.cat([again[..., :half], out[..., half:]], -1)

        layer.lora_B["default"].register_forward_hook(hook)


def timeless(old):
    return lambda x, t, cond, w: old(x, 500.0, cond, w)


def first_prompt_for_all(old):
    return lambda x, t, cond, w: old(x, t, cond[[0] * len(cond)], w)


def deaf(old):
    """The first prompt of every encoding for all."""
    return lambda batch, draw=None: old(batch, draw)[[0] * len(batch)]


def layers(model):
    return [m for m in model.network.modules() if isinstance(m, LoraLayer)]


def cut_off_layer(model):
    """One adapter's output is taken by .data, as in a hand-written cache."""
    layer = layers(model)[3].lora_B["default"]
    layer.register_forward_hook(lambda module, inputs, out: out.data)


def unused_layer(model):
    layer = layers(model)[3].lora_B["default"]
    layer.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))


def narrow(model):
    for layer in layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()


def scale_zero(model):
    for layer in layers(model):
        layer.set_scale("default", 0)


def base_stays_off(model):
    @contextmanager
    def base():
        for layer in layers(model):
            layer._disable_adapters = True
        yield

    model.base = base


def base_half_off(model):
    @contextmanager
    def base():
        chosen = layers(model)[: len(layers(model)) // 2]
        for layer in chosen:
            layer._disable_adapters = True
        yield
        for layer in chosen:
            layer._disable_adapters = False

    model.base = base


def late_checkpoint(model):
    """Blocks recomputed with the adapter as it is by then: what diffusers does by itself."""
    model.network.enable_gradient_checkpointing(lambda m, *inputs: checkpoint(m, *inputs, use_reentrant=False))


def cached_casts(model):
    """Autocast's weight cache as older versions of torch have it: a weight cast under no_grad is used again."""
    cache = {}

    def cast(weight):
        if not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()):
            return weight
        if weight not in cache:
            cache[weight] = weight.clone()
        return cache[weight]

    for layer in layers(model):
        for linear in (layer.lora_A["default"], layer.lora_B["default"]):
            linear.forward = lambda x, linear=linear: F.linear(x, cast(linear.weight))


def overflowing(model):
    """Activations that leave float16's range, as in SDXL's VAE."""
    model.vae.decoder.conv_in.register_forward_hook(lambda module, inputs, out: (out * 1e6).half().to(out))


def drops_out(model):
    model.network.conv_in.register_forward_hook(lambda module, inputs, out: F.dropout(out, 0.1))


def bad_text(old):
    def new(batch, draw=None):
        cond = old(batch, draw)
        cond.positive["text"] = cond.positive["text"] * torch.nan
        return cond

    return new


def divided_by_zero(old):
    return lambda *args: old(*args) / 0


def crashing(old):
    def new(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    return new


def nothing(model):
    pass


MODELS = {
    "decoder under no_grad": ("decoder graph", "fault", wrapped("decode", no_grad)),
    "decoder half detached": ("decoder gradient", "fault", wrapped("decode", first_rows_detached)),
    "decoder unmapped": ("clamped pixels", "fault", unmapped),
    "decoder wide open": ("clamped pixels", "warning", wrapped("decode", lambda old: lambda x0: 3 * old(x0) - 1)),
    "decoder overflows": ("model runs", "fault", overflowing),
    "clip_sample": ("x0 linear", "fault", wrapped("x0", lambda old: lambda *args: old(*args).clamp(-1, 1))),
    "halves swapped": ("guidance", "fault", wrapped("predict", swapped)),
    "guidance shifted": ("guidance", "fault", wrapped("predict", shifted)),
    "guidance doubled": ("guidance", "fault", wrapped("predict", doubled)),
    "guidance rescaled": ("guidance", "warning", wrapped("predict", rescaled)),
    "batch statistics": ("rows", "fault", wrapped("predict", whitened)),
    "noise of its own": ("start", "fault", wrapped("start", unkeyed)),
    "one noise for all": ("start", "fault", wrapped("start", alike)),
    "adapter half detached": ("chain gradient", "fault", half_adapter),
    "time ignored": ("time", "warning", wrapped("predict", timeless)),
    "first prompt for all": ("rows", "fault", wrapped("predict", first_prompt_for_all)),
    "prompts ignored": ("prompts", "warning", wrapped("encode", deaf)),
    "text not finite": ("model runs", "fault", wrapped("encode", bad_text)),
    "denoiser not finite": ("model runs", "fault", wrapped("predict", divided_by_zero)),
    "denoiser raises": ("model runs", "fault", wrapped("predict", crashing)),
    "denoiser drops out": ("model repeatable", "fault", drops_out),
    "denoiser input detached": ("input gradient", "fault", wrapped("predict", input_detached)),
    "denoiser half detached": ("input gradient", "fault", wrapped("predict", first_rows_detached)),
    "denoiser under no_grad": ("adapter reached", "fault", wrapped("predict", no_grad)),
    "adapter cut off": ("adapter reached", "fault", cut_off_layer),
    "adapter unused": ("adapter reached", "warning", unused_layer),
    "adapter in bfloat16": ("adapter precision", "warning", narrow),
    "adapter scale 0": ("adapter acts", "fault", scale_zero),
    "base keeps the adapter": ("base", "fault", lambda model: setattr(model, "base", nullcontext)),
    "base keeps a half": ("base", "fault", base_half_off),
    "base stays off": ("base", "fault", base_stays_off),
    "base recomputed adapted": ("base", "fault", late_checkpoint),
    "autocast cache": ("autocast", "fault", cached_casts),
    "autocast around": ("autocast", "warning", nothing),
}
"""name: (check, level, what is done to a healthy Stable Diffusion 1). Those called autocast run inside one."""
