"""The diffusion model of the `solids` world, from nothing: text with view words to pictures, and its image adapter.

Like the glyphs' upscaler it learns from exact means: of a noisy picture, a prompt and a background the probability of every picture of the
library is known, so the target of the squared loss is E[x_0 | x_t, y] itself (worlds.solids_oracle), with the same minimiser and none of
the noise that drawing x_0 brings. The image encoder learns to name what it sees, and is frozen before the adapter begins; half of the
adapter's prompts show another side of the solid than the one to be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from tropism.core import Batch, Draw
from tropism.models import visual_training
from tropism.models.latent import Latent
from tropism.models.load import load_model
from tropism.models.text_pixel import PixelTextPipeline
from tropism.models.visual import MEAN, STD
from tropism.models.visual_encoder import PictureEncoder
from tropism.run import pictures as drawings
from tropism.run.pretrain import new_text_encoder, new_tokenizer, tokens
from tropism.run.pretrain_loop import train
from tropism.worlds import solids
from tropism.worlds.solids import Scene, Solid
from tropism.worlds.solids_features import HEADS
from tropism.worlds.solids_library import Library
from tropism.worlds.solids_oracle import OracleModel

BATCH, WIDTH = 16, 64
KEPT = 0.8
"""Of every word of a prompt that can be left out."""
WHITE = 0.75
"""Share of pictures on white; the others are on any colour, which no prompt names."""


def new_unet() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 48, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text",  # words reach every layer by the time's embedding too: learnt several times sooner
        addition_embed_type_num_heads=8,
    )


def new_scheduler() -> Any:
    """The table of worlds.solids_oracle."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="linear", prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
    )


# ---------------------------------------------------------------------------------------------------- what is shown


def worded(rng: np.random.Generator, scene: Scene, view: str) -> str:
    """A prompt of a solid seen from there, with some words left out."""
    kept = lambda: bool(rng.random() < KEPT)
    said = {name: value for name, value in scene.solids[0].said.items() if kept()}
    return Scene((Solid(**said),), view if kept() else None).prompt


def shown(rng: np.random.Generator, library: Library, rows: Sequence[int]) -> tuple[Tensor, Batch]:
    """Pictures (B, 3, S, S) in [0, 1] of the library's rows, most on white, the others on any colour, and what asks for them."""
    views = library.cameras.views()
    prompts = [worded(rng, library.scenes[int(library.which[i])], views[i]) for i in rows]
    colours = np.where(rng.random((len(rows), 1)) < WHITE, 1.0, rng.random((len(rows), 3)))
    meta = [{"background": colour.tolist()} for colour in colours]
    pictures = library[list(rows)].over(torch.from_numpy(colours.astype(np.float32)))
    return pictures, Batch(prompts, meta=meta, index=tuple(range(len(rows))))


def another_side(rng: np.random.Generator, library: Library, rows: Sequence[int]) -> list[int]:
    """For every row one of the same scene."""
    sides = len(library) // len(library.scenes)
    return [int(library.which[i]) * sides + int(rng.integers(sides)) for i in rows]


# ---------------------------------------------------------------------------------------------------- the model


def train_denoiser(folder: Path, library: Library, updates: int, batch: int = BATCH) -> PixelTextPipeline:
    """The U-Net and its text encoder together: v-prediction at uniform times against exact means; one prompt in ten is empty.

    Places on and beside the solid weigh four times, as they are a quarter of a picture, and its face, which tells front from back in a
    few pixels, ten times. A colour behind it, which no prompt names, is nothing to learn from where next to nothing is left of the
    picture: there such a row weighs by (4 alpha)^2.
    """
    torch.manual_seed(5)
    tokenizer, oracle = new_tokenizer(folder / "tokenizer", solids.VOCABULARY), OracleModel(library)
    unet = new_unet().to(memory_format=torch.channels_last)  # a tenth faster
    both = nn.ModuleDict({"unet": unet, "text": new_text_encoder(tokenizer, WIDTH)})

    def loss(update: int) -> Tensor:
        rng = np.random.default_rng([51, update])
        pictures, asked = shown(rng, library, rng.integers(len(library), size=batch).tolist())
        free = torch.from_numpy(rng.random(batch) < 0.1)
        cond = oracle.encode(asked)
        cond = replace(cond, positive=torch.where(free[:, None], cond.negative, cond.positive))
        t = torch.from_numpy((np.arange(batch) + rng.random(batch)) * 1000 / batch).long()
        noise = torch.from_numpy(rng.standard_normal(pictures.shape, np.float32))
        x_t = oracle.process.forward(2 * pictures - 1, t, noise)
        eps = oracle.predict(x_t, t, cond, 1.0)
        tables = oracle.process.alpha(t), oracle.process.sigma(t)
        alpha, sigma = (torch.as_tensor(c).to(x_t).view(-1, 1, 1, 1) for c in tables)
        target = alpha * eps - sigma * (x_t - sigma * eps) / alpha
        prompts = ["" if dropped else p for p, dropped in zip(asked.prompts, free.tolist(), strict=True)]
        v = both["unet"](x_t, t, both["text"](tokens(tokenizer, prompts)).last_hidden_state).sample
        behind = torch.tensor([m["background"] for m in asked.meta or []])[..., None, None]
        solid = (pictures - behind).abs().amax(1, keepdim=True) > 0.02
        face = solid & (pictures.amax(1, keepdim=True) < 0.3)
        weight = 1 + F.max_pool2d(3 * solid.float() + 6 * face.float(), 3, 1, 1)
        weight = weight * torch.where((behind < 1).any(1, keepdim=True), (4 * alpha).square().clamp(max=1), 1.0)
        return (weight / weight.mean() * (v - target).square()).mean()

    pipe = PixelTextPipeline(both["unet"], both["text"], tokenizer, new_scheduler())
    train("denoiser", both, loss, folder, updates=updates, lr=2e-3, ema=0.999, every=100)
    return pipe


# ---------------------------------------------------------------------------------------------------- the adapter


class Naming(nn.Module):
    """An image encoder with heads that say what it sees, as the world's classifiers do; only the encoder is kept."""

    def __init__(self):
        super().__init__()
        self.encoder = PictureEncoder(image_size=32, projection_dim=WIDTH)
        self.heads = nn.ModuleDict({h: nn.Linear(WIDTH, len(HEADS[h])) for h in ("shape", "colour", "size", "view")})


def train_encoder(folder: Path, library: Library, updates: int, batch: int = 64) -> PictureEncoder:
    """Cross-entropy over shape, colour, size and view, on pictures with a little grain."""
    torch.manual_seed(6)
    network, views = Naming(), library.cameras.views()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def loss(update: int) -> Tensor:
        rng = np.random.default_rng([52, update])
        rows = rng.integers(len(library), size=batch).tolist()
        pictures, _ = shown(rng, library, rows)
        grain = torch.from_numpy(0.05 * rng.standard_normal(pictures.shape, np.float32))
        found = network.encoder((pictures + grain - mean) / std).image_embeds
        said = [library.scenes[int(library.which[i])].solids[0].said | {"view": views[i]} for i in rows]
        wanted = {h: torch.tensor([HEADS[h].index(row[h]) for row in said]) for h in network.heads}
        return torch.stack([F.cross_entropy(head(found), wanted[h]) for h, head in network.heads.items()]).sum()

    train("encoder", network, loss, folder, updates=updates, lr=2e-3, ema=0.99, every=100)
    return network.encoder


def train_adapter(folder: Path, library: Library, model: Latent, encoder: PictureEncoder, updates: int) -> None:
    """IP-Adapter's loss on a frozen model, in place, against exact means: a picture says which solid it is, the words from where."""
    weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in visual_training.begin(model, encoder).items()})
    oracle = OracleModel(library)

    def loss(update: int) -> Tensor:
        rng = np.random.default_rng([53, update])
        rows = rng.integers(len(library), size=BATCH).tolist()
        pictures, asked = shown(rng, library, rows)
        others, _ = shown(rng, library, another_side(rng, library, rows))
        shows = [library.scenes[int(library.which[i])] for i in rows]
        exact = lambda *seen: exact_mean(oracle, asked, shows, *seen)
        draw = Draw(53, update, asked.index)
        how = {"others": others, "drop_text": 0.2, "exact": exact}
        return visual_training.adapter_loss(model, pictures, asked, draw, **how).mean()

    train("adapter", weights, loss, folder, updates=updates, lr=2e-3, ema=0.99, every=100)


def exact_mean(
    oracle: OracleModel, asked: Batch, shows: Sequence[Scene], x_t: Tensor, t: Tensor, words: Tensor, picture: Tensor
) -> Tensor:
    """E[x_0 | x_t] (B, 3, S, S) in [-1, 1] of rows that read their words, a picture that shows this scene, both or neither."""
    prompts = []
    for prompt, scene, read, seen in zip(asked.prompts, shows, words.tolist(), picture.tolist(), strict=True):
        said = solids.parse(prompt) if read else Scene((Solid(),))
        prompts.append(Scene(scene.solids if seen else said.solids, said.view).prompt)
    cond = oracle.encode(replace(asked, prompts=prompts))
    return oracle.x0(x_t, oracle.predict(x_t, t, cond, 1.0), t)


def solids_model(out: Path, library: Library, updates: dict[str, int]) -> None:
    """Train everything, write OUT/model and OUT/adapter, and OUT/samples.png: drawn from words, and from words with a picture."""
    folder = out / ".train"
    train_denoiser(folder, library, updates["denoiser"]).save_pretrained(out / "model", safe_serialization=True)
    encoder = train_encoder(folder, library, updates["encoder"])
    model = cast(Latent, load_model(out / "model", lora=None))
    train_adapter(folder, library, model, encoder, updates["adapter"])
    visual_training.save(model, out / "adapter")
    _sheet(model, library).save(out / "samples.png")


@torch.no_grad()
def _sheet(model: Any, library: Library) -> Image:
    """Words alone, and words that leave the colour open beside a picture of another solid."""
    from tropism.run.evaluate import evaluate

    asked = [
        Scene((replace(s.solids[0], size=None),), "front")
        for s in library.scenes[:: max(1, len(library.scenes) // 4)][:4]
    ]
    nothing = lambda images, batch: images.new_zeros(len(images))
    how = {"steps": 10, "guidance": 3.0, "seed": 0}
    words = evaluate(model, nothing, [s.prompt for s in asked], **how).images
    v = library[[0] * len(asked)].over([1.0, 1.0, 1.0])
    bare = [Scene((replace(s.solids[0], colour=None),), "front").prompt for s in asked]
    styled = evaluate(model, nothing, Batch(bare, visual=v, visual_scale=torch.ones(len(v))), **how).images
    cells = [[a, b, c] for a, b, c in zip(words, v, styled, strict=True)]
    return drawings.grid(cells, [s.prompt for s in asked], bare, heads=("words", "picture", "both"))
