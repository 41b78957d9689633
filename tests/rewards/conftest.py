"""Real tokenizer files, a tiny CLIP on them, and pictures."""

import json

import pytest
import torch
from tiny_clip import tiny_clip
from transformers import CLIPTokenizer

from tropism.rewards.clip import Clip


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
