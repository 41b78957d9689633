"""Human Preference Score v2 and v2.1: a CLIP H/14 tuned on rankings of pictures; the cosine itself, without a scale.

The published files are in open_clip's layout; their weights are moved into transformers' CLIPModel here. Scores of v2
and v2.1 are not comparable with each other, nor between prompts.
Source: Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis, arXiv
2306.09341.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tropism.core import UserError
from tropism.rewards.clip import Clip, ClipScore
from tropism.rewards.pixels import normalised, resized
from tropism.rewards.sources import About, fill, read_weights, tokenizer_of

HUB = "xswu/HPSv2"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VISION_HEAD, TEXT_HEAD = 80, 64  # the widths of one attention head of H/14, which no weight tells

TOPS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers spells it so
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "logit_scale": "logit_scale",
}
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's CLIP -> that of transformers' CLIPModel; entries of neither are dropped.

    Queries, keys and values are three matrices there, one here; the two projections are stored transposed.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if block := BLOCK.fullmatch(name):
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            out |= _of_block(layer, block[3], value)
            continue
        for theirs, ours in TOPS.items():
            if name == theirs or name.startswith(theirs + "."):
                out[ours + name.removeprefix(theirs)] = value.T if name in ("text_projection", "visual.proj") else value
    return out


def _of_block(layer: str, name: str, value: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        thirds = zip("qkv", value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": part for letter, part in thirds}
    stem, _, kind = name.rpartition(".")
    return {f"{layer}.{INSIDE[stem]}.{kind}": value} if stem in INSIDE else {}


def open_clip_model(state: dict[str, Tensor], source: str) -> Any:
    """A CLIPModel with the sizes and weights of an open_clip state dict, exact GELU. Raises UserError for another layout.

    Heads are taken to be as wide as H/14's: 80 numbers for pictures, 64 for text.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        text_width, vision_width = state["ln_final.weight"].shape[0], state["visual.ln_pre.weight"].shape[0]
        patch, positions = state["visual.conv1.weight"].shape[-1], state["visual.positional_embedding"].shape[0]
        hidden = [state[f"{side}transformer.resblocks.0.mlp.c_fc.weight"].shape[0] for side in ("", "visual.")]
        longest, words = state["positional_embedding"].shape[0], state["token_embedding.weight"].shape[0]
        shared = state["text_projection"].shape[1]
    except KeyError as missing:
        raise UserError(
            f"{source} is not a CLIP in open_clip's layout: it has no {missing}. Give {FILES['v2']} or {FILES['v2.1']}."
        ) from missing
    depth = {
        side: len({b[2] for n in state if (b := BLOCK.fullmatch(n)) and b[1] == side}) for side in (None, "visual.")
    }
    text = {
        "hidden_size": text_width, "intermediate_size": hidden[0], "num_hidden_layers": depth[None],
        "num_attention_heads": text_width // TEXT_HEAD, "hidden_act": "gelu", "vocab_size": words,
        "max_position_embeddings": longest,
        "bos_token_id": words - 2, "eos_token_id": words - 1,  # the end is pooled
    }  # fmt: skip
    vision = {
        "hidden_size": vision_width, "intermediate_size": hidden[1], "num_hidden_layers": depth["visual."],
        "num_attention_heads": vision_width // VISION_HEAD, "hidden_act": "gelu", "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=shared)
    return fill(CLIPModel(config), from_open_clip(state), source, "HPS v2")


@dataclass(frozen=True)
class Letterbox:
    """What HPS was measured with: longer side to `size` (bicubic, antialiased), black bars, CLIP's normalisation.

    (B, 3, H, W) in [0, 1] -> (B, 3, size, size). A square picture has no bars.
    """

    size: int

    def __call__(self, images: Tensor) -> Tensor:
        scale = self.size / max(images.shape[-2:])
        height, width = (round(n * scale) for n in images.shape[-2:])
        down, across = self.size - height, self.size - width
        bars = (across // 2, across - across // 2, down // 2, down - down // 2)
        return normalised(F.pad(resized(images, height, width), bars))


def human_preference(version: str = "v2.1", tokenizer: str = "") -> ClipScore:
    """The reward `hps:v2` or `hps:v2.1`, or `hps:FILE` of a file in that layout: cosines, about .2 to .35 for pictures.

    tokenizer: a folder or hub id of CLIP's, by default H/14's own.
    Raises UserError where a file cannot be read or is of another architecture.
    """
    published = version in FILES
    source = HUB if published else version
    state = read_weights(source, FILES.get(version, FILES["v2.1"]))
    model = open_clip_model(state, source)
    size = model.config.vision_config.image_size
    words = tokenizer_of(tokenizer or TOKENIZER, "CLIP tokenizer", TOKENIZER)
    about = About((-1.0, 1.0), size, "Apache-2.0" if published else "that of the file given", source)
    return ClipScore(Clip(model, words, Letterbox(size)), f"hps:{version}", about=about)
