"""The reward networks of the shapes world: a counter, a small CLIP, and a preference head trained from votes."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropism.align.rollout import sample
from tropism.core import Batch, Draw, Model
from tropism.models.load import load_model
from tropism.rewards.aesthetic import Head, bradley_terry_loss
from tropism.rewards.clip import MEAN, STD, clip_pixels, pooled
from tropism.rewards.count import Counter, training_loss
from tropism.run.pretrain import tokens
from tropism.run.pretrain_loop import Lengths, another, cache, drawn, rows_of, train, training_scenes
from tropism.worlds import shapes, taste


@torch.no_grad()
def reconstructed(folder: Path, vae, n: int, seed: int, **kind) -> tuple[Tensor, list[shapes.Scene]]:
    """`drawn`, every second picture through the VAE: rewards must know what decoded pictures look like."""
    pictures, chosen = drawn(folder, n, seed, **kind)
    file = cache(folder, "reconstructed", n, seed, **kind)
    if not file.exists():
        x = 2 * pictures[::2].float() / 255 - 1
        y = torch.cat([vae.decode(vae.encode(p).latent_dist.mean).sample for p in x.split(100)])
        pictures = pictures.clone()
        pictures[::2] = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        save_file({"pictures": pictures}, file)
    return load_file(file)["pictures"], chosen


def sampled(folder: Path, model: Model, n: int, seed: int) -> tuple[Tensor, list[shapes.Scene]]:
    """n samples of the finished generator as uint8 (n, 3, 64, 64), cached, and what the parser reads on them."""
    file = cache(folder, "sampled", n, seed)
    if not file.exists():
        batch = Batch([s.prompt for s in training_scenes(n, np.random.default_rng([seed, 1]))])
        parts = [
            sample(model, piece, Draw(seed, 0, piece.index), steps=8, guidance=2.0)
            for piece in (batch[at : at + 50] for at in range(0, n, 50))
        ]
        save_file({"pictures": (torch.cat(parts) * 255).round().byte().contiguous()}, file)
    pictures = load_file(file)["pictures"]
    return pictures, shapes.read(pictures.float() / 255)


def _shown(pictures: Tensor, rows: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures with a little noise, so that gradients of the finished network mean something beside the data."""
    x = pictures[rows].float() / 255
    level = torch.from_numpy(rng.random((len(x), 1, 1, 1), np.float32)) * 0.04
    return (x + level * torch.from_numpy(rng.standard_normal(x.shape, np.float32))).clamp(0, 1)


def train_counter(folder: Path, vae, updates: int, n: int, batch: int = 32) -> Counter:
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


def _spoiled(x: Tensor, twins: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures (B, 3, H, W) that no caption fits any more: half of them on the way to a twin, a quarter faded, a quarter blurred."""
    random = lambda *shape: torch.from_numpy(rng.random(shape, np.float32))
    kind, strength = random(len(x), 1, 1, 1), random(len(x), 1, 1, 1)
    between = torch.lerp(x, twins, 0.25 + 0.5 * strength)
    faded = torch.lerp(x, random(len(x), 3, 1, 1).expand_as(x), 0.15 + 0.45 * strength)
    blurred = F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), 7, 1)
    return torch.where(kind < 0.5, between, torch.where(kind < 0.75, faded, blurred))


def train_clip(folder: Path, vae, tokenizer, model: Model, updates: int, n: int, batch: int = 64):
    """CLIP's symmetric contrastive loss, with four near misses a picture among the wrong texts and spoiled pictures among the wrong
    pictures: without them the score does not notice fading colours, half-made shapes or one object of five that is no star.
    Half of a batch has twins, changed or with odd objects among them. A quarter is the generator's own samples under the caption that
    the parser reads, and samples it cannot read are wrong pictures: renders alone do not show how a generator goes wrong.
    """
    torch.manual_seed(3)
    clip = new_clip(tokenizer)
    parts = [reconstructed(folder, vae, n, 2), reconstructed(folder, vae, n // 4, 5, texture="flat")]
    pictures, chosen = torch.cat([p for p, _ in parts]), [s for _, scenes in parts for s in scenes]
    paired, described = reconstructed(folder, vae, n // 3, 6)
    twins, odd = (reconstructed(folder, vae, n // 3, 6, twin=kind)[0] for kind in ("changed", "odd"))
    samples, found = sampled(folder, model, n // 3, 8)
    illegible = [i for i, s in enumerate(found) if None in astuple(s)]
    legible = [i for i, s in enumerate(found) if None not in astuple(s) and not s.held_out]

    def loss(update: int) -> Tensor:
        rows, rng = rows_of(len(chosen), batch // 4, 14, update)
        twinned = torch.from_numpy(rng.integers(len(described), size=batch // 2))
        own, failed = (torch.from_numpy(rng.permutation(some)[: batch // 4]).long() for some in (legible, illegible))
        scenes = [described[i] for i in twinned] + [chosen[i] for i in rows] + [found[i] for i in own]
        prompts, right = [s.prompt for s in scenes], len(scenes)
        prompts += [another(s, a, rng).prompt for s in scenes for a in ("count", "shape", "colour", "background")]
        x = torch.cat([_shown(paired, twinned, rng), _shown(pictures, rows, rng), _shown(samples, own, rng)])
        spoiled = _spoiled(x[: batch // 2], twins[twinned].float() / 255, rng)
        spoiled[::2] = _shown(odd, twinned[::2], rng)
        x = clip_pixels(torch.cat([x, spoiled, _shown(samples, failed, rng)]), shapes.SIZE, MEAN, STD)
        x = x.flip(3) if rng.random() < 0.5 else x
        with torch.autocast("cpu", torch.bfloat16):
            seen = pooled(clip.get_image_features(pixel_values=x)).float()
            read = pooled(clip.get_text_features(input_ids=tokens(tokenizer, prompts))).float()
        seen, read = F.normalize(seen, dim=-1), F.normalize(read, dim=-1)
        logits = clip.logit_scale.exp() * seen @ read.T
        # the same prompt may stand twice in a batch: that is no wrong answer
        same = torch.tensor([[a == b for b in prompts] for a in prompts[:right]]) & ~torch.eye(
            right, len(prompts), dtype=torch.bool
        )
        logits[:right] = logits[:right].masked_fill(same, -1e4)
        answer = torch.arange(right)
        return 0.5 * (F.cross_entropy(logits[:right], answer) + F.cross_entropy(logits[:, :right].T, answer))

    return train("clip", clip, loss, folder, updates=updates, lr=1.5e-3, ema=0.995)


@torch.no_grad()
def _embeddings(clip, pictures: Tensor) -> Tensor:
    parts = [clip_pixels(p.float() / 255, shapes.SIZE, MEAN, STD) for p in pictures.split(200)]
    return torch.cat([F.normalize(pooled(clip.get_image_features(pixel_values=p)), dim=-1) for p in parts])


def train_aesthetic(folder: Path, vae, clip, updates: int, n: int, votes: int = 20_000) -> Head:
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


def shapes_rewards(out: Path, vae, tokenizer, lengths: Lengths) -> None:
    """Train the three reward networks and write them beside OUT/model."""
    folder, n = out / ".train", lengths.pictures
    counter = train_counter(folder, vae, lengths.counter, n // 3)
    model = load_model(out / "model", lora=None)
    clip = train_clip(folder, vae, tokenizer, model, lengths.clip, n)
    save_rewards(out, counter, clip, tokenizer, train_aesthetic(folder, vae, clip, lengths.head, n // 3))
