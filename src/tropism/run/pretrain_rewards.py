"""The reward networks of the shapes world: a counter, a small CLIP, and a preference head trained from votes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.rewards.aesthetic import Head, bradley_terry_loss
from tropism.rewards.clip import MEAN, STD, clip_pixels
from tropism.rewards.count import Counter, training_loss
from tropism.run.pretrain import drawn, rows_of, tokens, train
from tropism.worlds import shapes, taste


@torch.no_grad()
def reconstructed(folder: Path, vae, n: int, seed: int) -> tuple[Tensor, list[shapes.Scene]]:
    """n pictures, every second one through the VAE, uint8 (n, 3, 64, 64), cached: rewards must know what decoded pictures look like."""
    pictures, chosen = drawn(folder, n, seed)
    file = folder / f"reconstructed-{seed}-{n}.safetensors"
    if not file.exists():
        x = 2 * pictures[::2].float() / 255 - 1
        y = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in x.split(100)])
        pictures = pictures.clone()
        pictures[::2] = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        save_file({"pictures": pictures}, file)
    return load_file(file)["pictures"], chosen


def _shown(pictures: Tensor, rows: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures with a little noise, so that gradients of the finished network mean something beside the data."""
    x = pictures[rows].float() / 255
    level = torch.from_numpy(rng.random((len(x), 1, 1, 1), np.float32)) * 0.04
    return (x + level * torch.from_numpy(rng.standard_normal(x.shape, np.float32))).clamp(0, 1)


def train_counter(folder: Path, vae, updates: int = 1500, batch: int = 32, n: int = 8_000) -> Counter:
    """The density counter on pictures and reconstructions."""
    torch.manual_seed(2)
    pictures, chosen = reconstructed(folder, vae, n, 3)
    where = shapes.centres(chosen, 3)

    def loss(update: int) -> Tensor:
        rows, rng = rows_of(n, batch, 13, update)
        return training_loss(counter, _shown(pictures, rows, rng), [where[i] for i in rows])

    counter = Counter()
    return train("counter", counter, loss, folder, updates=updates, lr=3e-3, ema=0.995)


def new_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=shapes.SIZE,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def _near_misses(scene: shapes.Scene, rng: np.random.Generator) -> list[str]:
    """Four training prompts that differ from the scene in one attribute each."""
    values = {
        "count": range(1, len(shapes.COUNTS) + 1),
        "shape": shapes.SHAPES,
        "colour": tuple(shapes.COLOURS),
        "background": tuple(shapes.BACKGROUNDS),
    }
    misses = []
    for attribute, choices in values.items():
        others = [shapes.Scene(**{**scene.__dict__, attribute: c}) for c in choices if c != getattr(scene, attribute)]
        others = [s for s in others if not s.held_out] or others
        misses.append(others[rng.integers(len(others))].prompt)
    return misses


def train_clip(folder: Path, vae, tokenizer, updates: int = 2200, batch: int = 64, n: int = 24_000):
    """CLIP's symmetric contrastive loss, with four near misses a picture among the wrong texts."""
    torch.manual_seed(3)
    clip = new_clip(tokenizer)
    pictures, chosen = reconstructed(folder, vae, n, 2)

    def loss(update: int) -> Tensor:
        rows, rng = rows_of(n, batch, 14, update)
        scenes = [chosen[i] for i in rows]
        prompts = [s.prompt for s in scenes]
        prompts += [miss for s in scenes for miss in _near_misses(s, rng)]
        x = clip_pixels(_shown(pictures, rows, rng), shapes.SIZE, MEAN, STD)
        x = x.flip(3) if rng.random() < 0.5 else x
        with torch.autocast("cpu", torch.bfloat16):
            seen = clip.get_image_features(pixel_values=x).pooler_output.float()
            read = clip.get_text_features(input_ids=tokens(tokenizer, prompts)).pooler_output.float()
        seen, read = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
        logits = clip.logit_scale.exp() * seen @ read.T
        # the same prompt may stand twice in a batch: that is no wrong answer
        same = torch.tensor([[a == b for b in prompts] for a in prompts[: len(rows)]]) & ~torch.eye(
            len(rows), len(prompts), dtype=torch.bool
        )
        logits = logits.masked_fill(same, -1e4)
        answer = torch.arange(len(rows))
        return 0.5 * (F.cross_entropy(logits, answer) + F.cross_entropy(logits[:, : len(rows)].T, answer))

    return train("clip", clip, loss, folder, updates=updates, lr=1.5e-3, ema=0.995)


@torch.no_grad()
def _embeddings(clip, pictures: Tensor) -> Tensor:
    parts = [clip_pixels(p.float() / 255, shapes.SIZE, MEAN, STD) for p in pictures.split(200)]
    return torch.cat([F.normalize(clip.get_image_features(pixel_values=p).pooler_output, dim=-1) for p in parts])


def train_aesthetic(folder: Path, vae, clip, updates: int = 1500, votes: int = 20_000, n: int = 8_000) -> Head:
    """The preference head, from one noisy vote a pair; it never sees the rule."""
    torch.manual_seed(4)
    pictures, _ = reconstructed(folder, vae, n, 3)
    rng = np.random.default_rng(15)
    pairs = torch.from_numpy(rng.integers(n, size=(votes, 2)))
    preferred = taste.votes(pictures.float() / 255, pairs, rng)
    seen = _embeddings(clip, pictures)
    head = Head(seen.shape[1], 32)

    def loss(update: int) -> Tensor:
        rows, _ = rows_of(votes, 256, 16, update)
        a, b = (head(seen[pairs[rows, side]]) for side in (0, 1))
        return bradley_terry_loss(a, b, preferred[rows])

    return train("aesthetic", head, loss, folder, updates=updates, lr=3e-3, every=500)


def save_rewards(out: Path, counter: Counter, clip, tokenizer, head: nn.Module):
    """Write the three reward networks where the rewards look for them, float16."""
    half = lambda m: {k: v.half().contiguous() for k, v in m.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(half(counter), out / "counter.safetensors")
    save_file(half(head), out / "aesthetic.safetensors")
    clip.half().save_pretrained(out / "clip", safe_serialization=True)
    clip.float()
    tokenizer.save_pretrained(out / "clip")


def shapes_rewards(out: Path, vae, tokenizer, counter_updates: int = 1500, clip_updates: int = 2200) -> None:
    """Train the three reward networks and write them beside OUT/model."""
    folder = out / ".train"
    counter = train_counter(folder, vae, counter_updates)
    clip = train_clip(folder, vae, tokenizer, clip_updates)
    save_rewards(out, counter, clip, tokenizer, train_aesthetic(folder, vae, clip))
