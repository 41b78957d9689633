"""A tiny CLIP of random weights, with real tokenizer files, and rewards that need no trained network."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from tropism.rewards.clip import Clip

PROMPTS = [
    "three red circles on sand",
    "one blue star on sky",
    "five white crosses on slate",
    "two black squares on mint",
]


def tiny_clip(tokenizer) -> CLIPModel:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **small,
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**small, image_size=48, patch_size=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16))
    with torch.no_grad():  # the default initialisation is so small that every picture looks alike
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def clip(tokenizer):
    return Clip(tiny_clip(tokenizer), tokenizer)


@pytest.fixture
def images():
    """Four pictures (4, 3, 64, 64), float64, away from 0 and 1."""
    generator = torch.Generator().manual_seed(7)
    return 0.3 + 0.4 * torch.rand(4, 3, 64, 64, generator=generator, dtype=torch.float64)
