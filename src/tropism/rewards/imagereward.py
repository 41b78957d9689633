"""ImageReward: a BLIP that reads the prompt while it looks at the picture, tuned on rankings.

The published file is in its authors' layout; its weights are moved into transformers' BLIP classes here.
Source: ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation, arXiv 2304.05977.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tropism.core import Batch, UserError
from tropism.rewards.aesthetic import LinearHead, linear_head
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import Preparation
from tropism.rewards.sources import About, fill, read_weights, tokenizer_of

SOURCE, FILE = "THUDM/ImageReward", "ImageReward.pt"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score over the authors' pictures
LONGEST = 35  # tokens; the authors cut longer prompts
HEAD = 64  # the width of one attention head, in both halves; no weight tells

VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def vision_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries "blip.visual_encoder." of the published state dict, under the names of transformers' BlipVisionModel."""
    out = {}
    for name, value in below(state, "blip.visual_encoder.").items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            out[f"encoder.layers.{block[1]}.{INSIDE.get(block[2], block[2])}.{block[3]}"] = value
            continue
        for theirs, ours in VISION.items():
            if name == theirs or name.startswith(theirs + "."):
                out[ours + name.removeprefix(theirs)] = value
    return out


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


class Judge(nn.Module):
    """Prepared pixels (B, 3, s, s) and tokens (B, L) -> raw scores (B,): the first token's last state, through the head."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: LinearHead, size: int):
        super().__init__()
        self.vision, self.text, self.head, self.size = vision, text, head, size

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        return self.head(read.last_hidden_state[:, 0])


def judge_of(state: dict[str, Tensor], source: str) -> Judge:
    """The network of a published state dict, its sizes read off the weights. Raises UserError for another layout."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = vision_weights(state), below(state, "blip.text_encoder.")
    try:
        (width, _, _, patch), places = vision["embeddings.patch_embedding.weight"].shape, _places(vision)
        (words, hidden), longest = (text["embeddings.word_embeddings.weight"].shape, _longest(text))
        inner = (vision["encoder.layers.0.mlp.fc1.weight"], text["encoder.layer.0.intermediate.dense.weight"])
    except KeyError as missing:
        raise UserError(
            f"{source} is not ImageReward's file: it has no {missing}. Give {FILE} of {SOURCE}."
        ) from missing
    eyes = BlipVisionConfig(
        hidden_size=width, intermediate_size=inner[0].shape[0], num_hidden_layers=_depth(vision),
        num_attention_heads=width // HEAD, patch_size=patch, image_size=patch * round((places - 1) ** 0.5),
        layer_norm_eps=1e-6,
    )  # fmt: skip
    words_config = BlipTextConfig(
        vocab_size=words, hidden_size=hidden, encoder_hidden_size=width, intermediate_size=inner[1].shape[0],
        num_hidden_layers=_depth(text), num_attention_heads=hidden // HEAD, max_position_embeddings=longest,
        bos_token_id=None, sep_token_id=None, eos_token_id=None,  # nothing is generated
    )  # fmt: skip
    return Judge(
        fill(BlipVisionModel(eyes), vision, source, "ImageReward's picture half"),
        fill(BlipTextModel(words_config, add_pooling_layer=False), text, source, "ImageReward's text half"),
        linear_head(below(state, "mlp."), hidden, source),
        eyes.image_size,  # pyright: ignore
    )


def _places(vision: dict[str, Tensor]) -> int:
    return vision["embeddings.position_embedding"].shape[1]


def _longest(text: dict[str, Tensor]) -> int:
    return text["embeddings.position_embeddings.weight"].shape[0]


def _depth(state: dict[str, Tensor]) -> int:
    return len({found[1] for name in state if (found := re.match(r"encoder\.layers?\.(\d+)\.", name))})


class ImageReward:
    """The reward (raw - .167) / 1.033, (B,), unbounded, about -2 to 2 for drawings of a prompt. Differentiable.

    No embedding of a prompt can be kept, for the network reads it together with the picture; its tokens are.
    """

    differentiable = True

    def __init__(self, judge: Judge, tokenizer: Any, name: str = "imagereward", about: About | None = None):
        self.frozen, self.tokenizer, self.name = Frozen(judge), tokenizer, name
        self.prepare = Preparation((judge.size,), (judge.size, judge.size))
        self.about = about or About((float("-inf"), float("inf")), judge.size, "Apache-2.0", SOURCE)
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of a prompt; cached. Raises UserError above 35."""
        if prompt not in self._tokens:
            ids = self.tokenizer(prompt)["input_ids"]
            if len(ids) > LONGEST:
                raise UserError(
                    f"The prompt {prompt[:60]!r}... has {len(ids)} tokens; ImageReward reads {LONGEST} and would ignore "
                    "the rest. Shorten the prompt."
                )
            self._tokens[prompt] = ids
        return self._tokens[prompt]

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that is too long, before anything is drawn."""
        for prompt in prompts:
            self.tokens(prompt)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        pixels = self.prepare(samples.to(at_least_float32(samples)))
        rows = [self.tokens(prompt) for prompt in batch.prompts]
        # Always padded to the full length, as published: a row's shape must not depend on its company.
        ids = torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows], device=samples.device)
        mask = torch.tensor([[1] * len(row) + [0] * (LONGEST - len(row)) for row in rows], device=samples.device)
        return (self.frozen.like(samples)(pixels, ids, mask) - MEAN) / STD


def image_reward(source: str = SOURCE, tokenizer: str = "") -> ImageReward:
    """The reward `imagereward`, or `imagereward:SOURCE`: ImageReward.pt, its folder, or a hub id. Raises UserError.

    tokenizer: a folder or hub id of BERT's uncased vocabulary, by default bert-base-uncased.
    """
    judge = judge_of(read_weights(source, FILE), source)
    words = tokenizer_of(tokenizer or TOKENIZER, "BERT tokenizer", TOKENIZER)
    published = source == SOURCE
    licence = "Apache-2.0" if published else "that of the file given"
    about = About((float("-inf"), float("inf")), judge.size, licence, source)
    return ImageReward(judge, words, "imagereward" if published else f"imagereward:{source}", about)
