"""Training an image adapter from nothing: a fresh one that changes nothing yet, its loss, and its folder.

The U-Net and the image encoder stay frozen; the projection and to_k_ip, to_v_ip train. Pictures and words are dropped at random, so that
either can guide alone. Half of the prompts are another view of the same object: an adapter that only ever sees the picture that it is
to draw learns to copy the view, and pulls every side of an object to the front.
Source: IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, arXiv 2308.06721, section 3.2; the other
view is this library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tropism.core import Batch, Draw, Stream, UserError, noise, uniform
from tropism.models.latent import Latent
from tropism.models.text import Text, TextCond
from tropism.models.visual import ENCODER, FILE, Visual
from tropism.models.visual_attention import cross_attentions, install, parameters, state_of
from tropism.process.gaussian import VP

TOKENS = 4
"""Tokens of a picture, of the base kind."""
OF_IMAGE = ("image", "image_scale")


def fresh(network: Any, width: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The weights of a new adapter for a U-Net and image embeddings (B, width): to_v_ip is 0, so it changes nothing at any weight.

    to_k_ip begins as the text's own keys. Returns the layout that `install` and diffusers read.
    """
    layers, d = cross_attentions(network), network.config.cross_attention_dim
    drawn = noise(seed, Stream.PRIOR, 0, -1, 0, 0, (TOKENS * d, width))[0, 0] / width**0.5
    image = {"proj.weight": drawn, "proj.bias": torch.zeros(TOKENS * d)}
    image |= {"norm.weight": torch.ones(d), "norm.bias": torch.zeros(d)}
    weights: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        keys = getattr(layer.to_k, "base_layer", layer.to_k).weight  # under a LoRA
        weights[f"{2 * i + 1}.to_k_ip.weight"] = keys.detach().float().cpu().clone()
        weights[f"{2 * i + 1}.to_v_ip.weight"] = torch.zeros(keys.shape)
    return {"image_proj": image, "ip_adapter": weights}


def begin(model: Latent, encoder: nn.Module, seed: int = 0) -> dict[str, nn.Parameter]:
    """Give a loaded, frozen model a fresh adapter behind an image encoder; returns the weights that train, by name, as `trainable()` does.

    encoder: such as visual_encoder.PictureEncoder; it is frozen. Raises UserError for a model that reads no visual prompts, has an
    adapter already, trains something else, or is narrower than float32.
    """
    if not model.sees or model.visual is not None:
        why = "has an image adapter already" if model.sees else "reads no visual prompts"
        raise UserError(f"{model.source or type(model).__name__} {why}. Load a Stable Diffusion model without visual.")
    if model.trainable() or torch.finfo(model.dtype).bits < 32:
        raise UserError(
            f"The base must be frozen and at least float32 to train an adapter on; it is {model.dtype} and trains "
            f"{len(model.trainable())} weights. Load it with lora=None, dtype=torch.float32."
        )
    config: Any = encoder.config
    install(model.network, fresh(model.network, config.projection_dim, seed), model.dtype)
    model.visual = Visual(encoder, False, model.device)
    found = parameters(model.network)
    for p in found.values():
        p.requires_grad_(True)
    return found


def adapter_loss(
    model: Latent,
    pictures: Tensor,
    batch: Batch,
    draw: Draw,
    *,
    others: Tensor | None = None,
    other_view: float = 0.5,
    drop_image: float = 0.05,
    drop_text: float = 0.05,
    drop_both: float = 0.05,
    exact: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The mean squared error of the network's native output (epsilon, v or x_0) for each row, (B,), at one uniform time each.

    pictures: what is drawn, (B, 3, H, W) in [0, 1] of the model's size. others: another view of each row's object, (B, 3, h, w) in [0, 1];
    a row is prompted with it with probability other_view, else with the picture itself. batch: the prompts; its visual is not read.
    drop_*: shares of rows without the picture (the embedding of none), without the words (the negative prompt), and without both.
    exact: where it is known, E[x_0 | x_t, what the row is shown] of (x_t, t, words, picture), the last two (B,) bool of what is not
    dropped: the loss then has the same minimiser, without the noise that one drawn x_0 brings.
    Every draw is keyed by `draw`. Raises UserError for shares that are none, and for a model without an adapter.
    """
    shares = (drop_image, drop_text, drop_both)
    if min(*shares, other_view) < 0 or sum(shares) > 1 or other_view > 1:
        raise UserError(
            f"The dropped shares are {shares} and other_view is {other_view}; all must be at least 0, other_view and the "
            "sum of the shares at most 1. Try 0.05 each and 0.5."
        )
    chance = uniform(draw.seed, Stream.SHUFFLE, draw.update, draw.index, 0, 0, (2,))[:, 0]
    shown = pictures if others is None else _chosen(chance[:, 0] < other_view, others, pictures)
    cond = model.encode(replace(batch, visual=shown, visual_scale=None), draw)
    text = dropped(cond, chance[:, 1], shares)
    with torch.no_grad():
        x0 = model.latents(pictures.to(model.device))
    n = len(cast(VP, model.process).alpha_bars)
    t = (uniform(draw.seed, Stream.TIMESTEP, draw.update, draw.index, 0, 0, ())[:, 0] * n).long().to(x0.device)
    eps = draw(Stream.RENOISE, 0, x0.shape[1:]).to(x0)
    x_t = model.process.forward(x0, t, eps)
    out = model.counted(x_t, t, text)
    if exact is not None:
        no_image, no_words = _without(chance[:, 1], shares)
        x0 = exact(x_t, t, ~no_words, ~no_image)
        alpha, sigma = (
            torch.as_tensor(f(t)).to(x_t).view(-1, 1, 1, 1) for f in (model.process.alpha, model.process.sigma)
        )
        eps = (x_t - alpha * x0) / sigma
    return (out - _target(model, x0, eps, t)).square().flatten(1).mean(1)


def dropped(cond: TextCond, chance: Tensor, shares: tuple[float, float, float]) -> Text:
    """A condition's positive half with the pictures, the words or both of some rows taken from the negative one.

    chance: uniforms (B,) on [0, 1); shares: of rows without the picture, without the words, without both, in this order from 0.
    """
    no_image, no_words = _without(chance, shares)
    return {k: _chosen(no_image if k in OF_IMAGE else no_words, cond.negative[k], v) for k, v in cond.positive.items()}


def _without(chance: Tensor, shares: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
    """(B,) bool: the rows without a picture, and those without words."""
    image, words, both = shares
    no_words = (chance >= image) & (chance < image + words + both)
    return (chance < image) | (chance >= image + words) & (chance < image + words + both), no_words


def _chosen(rows: Tensor, these: Tensor, else_those: Tensor) -> Tensor:
    return torch.where(rows.to(these.device).reshape(-1, *[1] * (these.ndim - 1)), these, else_those)


def _target(model: Latent, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should say of x_t: its native output for this x_0 and this noise."""
    tables = model.process.alpha(t), model.process.sigma(t)
    alpha, sigma = (torch.as_tensor(c).to(x0).reshape(-1, 1, 1, 1) for c in tables)
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[model.prediction]


def save(model: Latent, folder: str | Path) -> Path:
    """Write a model's adapter and its image encoder as `visual=FOLDER` and `pipe.load_ip_adapter` read them. Returns the adapter's file."""
    assert model.visual is not None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{part}.{key}": v for part, weights in state_of(model.network).items() for key, v in weights.items()}
    model.visual.encoder.save_pretrained(folder / ENCODER, safe_serialization=True)
    save_file(flat, folder / f"{FILE}.tmp")
    (folder / f"{FILE}.tmp").replace(folder / FILE)
    return folder / FILE
