"""What a vision-language model says when it is asked: P("yes") to "Does this figure show '...'? Please answer yes or no."

It is read off the logits of the first answer token, so nothing is sampled and the gradient reaches the picture. Families
that work: LLaVA (model_type llava), Qwen2-VL and Qwen2.5-VL. A row is asked alone, without padding.
Source: Evaluating Text-to-Visual Generation with Image-to-Text Generation (VQAScore), arXiv 2404.01291, section 3, whose
own CLIP-FlanT5 is no class of transformers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tropism.core import Batch, UserError
from tropism.rewards.clip import pooled
from tropism.rewards.frozen import Frozen, at_least_float32
from tropism.rewards.pixels import MEAN, STD, Preparation, normalised, processor_settings, published, resized
from tropism.rewards.sources import About, configuration, pretrained, tokenizer_of

QUESTION = "Does this figure show '{prompt}'? Please answer yes or no."
EXAMPLE = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN = ("qwen2_vl", "qwen2_5_vl")
QWEN_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
    "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
# What the published models were trained on, for folders that hold no chat template.
CHAT = {"llava": "USER: <image>\n{question} ASSISTANT:", "qwen2_vl": QWEN_CHAT, "qwen2_5_vl": QWEN_CHAT}


class Family(Protocol):
    """How a family of models looks at one picture (1, 3, H, W) and reads ids (L,) with one image token in them."""

    @property
    def size(self) -> int | None: ...
    def answer(self, model: Any, image: Tensor, ids: Tensor) -> Tensor:
        """Logits (V,) of the first answer token."""
        ...


@dataclass(frozen=True)
class Llava:
    """Pictures of one size, whose features stand in the text where the image token stood."""

    prepare: Preparation
    image_token: int

    @property
    def size(self) -> int | None:
        return (self.prepare.crop or self.prepare.resize)[0]

    def answer(self, model: Any, image: Tensor, ids: Tensor) -> Tensor:
        seen = pooled(model.get_image_features(pixel_values=self.prepare(image)))[0]
        place = int((ids == self.image_token).nonzero()[0, 0])
        words = model.get_input_embeddings()(ids)
        joined = torch.cat([words[:place], seen, words[place + 1 :]])[None]
        return model(inputs_embeds=joined, logits_to_keep=1, use_cache=False).logits[0, -1]


@dataclass(frozen=True)
class Qwen:
    """Pictures at about their own size, cut into patches, `merge` x `merge` of which become one token."""

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    image_token: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    size: int | None = None

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size nearest to the picture's own whose sides are whole tokens and whose area is from least to most pixels."""
        unit = self.patch * self.merge
        near = tuple(round(n / unit) * unit for n in (height, width))
        if near[0] * near[1] > self.most:
            shrink = math.sqrt(height * width / self.most)
            near = tuple(max(unit, math.floor(n / shrink / unit) * unit) for n in (height, width))
        elif near[0] * near[1] < self.least:
            grow = math.sqrt(self.least / (height * width))
            near = tuple(math.ceil(n * grow / unit) * unit for n in (height, width))
        return near[0], near[1]

    def patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) in [0, 1] -> patches (N, 3 frames patch^2), token by token, and the grid (1, 3): frames, rows, columns."""
        height, width = self.target(*image.shape[-2:])
        x = normalised(resized(image, height, width), self.mean, self.std)[0]
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(3, rows // self.merge, self.merge, self.patch, columns // self.merge, self.merge, self.patch)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)  # token's row and column, patch's row and column in it, channel, pixel
        x = x.unsqueeze(5).expand(-1, -1, -1, -1, -1, self.frames, -1, -1)  # a still picture is equal frames
        return x.reshape(rows * columns, -1), torch.tensor([[1, rows, columns]], device=x.device)

    def answer(self, model: Any, image: Tensor, ids: Tensor) -> Tensor:
        patches, grid = self.patches(image)
        place = int((ids == self.image_token).nonzero()[0, 0])
        tokens = ids[place].expand(len(patches) // self.merge**2)
        ids = torch.cat([ids[:place], tokens, ids[place + 1 :]])[None]
        kinds = (ids == self.image_token).int()
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            pixel_values=patches,
            image_grid_thw=grid,
            logits_to_keep=1,
            use_cache=False,
        ).logits[0, -1]


class Vqa:
    """The reward P("yes") among all tokens that could come first, (B,) in [0, 1]. Differentiable.

    Upper and lower case count together. Raises UserError if the tokenizer has no token "yes", or if a prompt holds the
    image token.
    """

    differentiable = True

    def __init__(self, model: Any, tokenizer: Any, family: Family, chat: str, name: str = "vqa", source: str = ""):
        self.frozen, self.tokenizer, self.family, self.chat, self.name = Frozen(model), tokenizer, family, chat, name
        self.image_token: int = model.config.image_token_id
        self.yes = one_token_words(tokenizer, "yes")
        self.about = About((0.0, 1.0), family.size, "that of the model given", source)
        self._tokens: dict[str, list[int]] = {}

    def tokens(self, prompt: str) -> list[int]:
        """Token ids of the question in the model's chat, with one image token; cached."""
        if prompt not in self._tokens:
            text = chatted(self.tokenizer, self.chat, QUESTION.format(prompt=prompt))
            begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
            ids = self.tokenizer(text, add_special_tokens=not begun)["input_ids"]
            if ids.count(self.image_token) != 1:
                raise UserError(
                    f"The question about {prompt[:60]!r} holds {ids.count(self.image_token)} image tokens, and must hold "
                    "one. Take special tokens out of the prompt, or give a model with its own chat template."
                )
            self._tokens[prompt] = ids
        return self._tokens[prompt]

    def check_prompts(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt that cannot be asked about, before anything is drawn."""
        for prompt in prompts:
            self.tokens(prompt)

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        model, pictures = self.frozen.like(samples), samples.to(at_least_float32(samples))
        rows = []
        for picture, prompt in zip(pictures, batch.prompts, strict=True):
            ids = torch.tensor(self.tokens(prompt), device=samples.device)
            rows.append(self.family.answer(model, picture[None], ids).to(pictures).softmax(-1)[self.yes].sum())
        return torch.stack(rows)


def one_token_words(tokenizer: Any, word: str) -> list[int]:
    """The tokens that spell `word` in any case, with or without a space before it. Raises UserError if there is none."""
    forms = [space + case for case in (word, word.capitalize(), word.upper()) for space in ("", " ")]
    ids = {i for form in forms for i in tokenizer(form, add_special_tokens=False)["input_ids"]}
    found = sorted(i for i in ids if tokenizer.decode([i]).strip().lower() == word)
    if not found:
        raise UserError(
            f"This model's tokenizer has no token '{word}', so its answer cannot be read off one. Give another model, such "
            f"as {EXAMPLE}."
        )
    return found


def chatted(tokenizer: Any, chat: str, question: str) -> str:
    """The question as the model's user asks it, up to where its answer begins; `chat` is a template or a plain form."""
    if "{question}" in chat:
        return chat.format(question=question)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return tokenizer.apply_chat_template(said, chat_template=chat, tokenize=False, add_generation_prompt=True)


def chat_of(source: str, tokenizer: Any, kind: str) -> str:
    """The chat template of a folder or hub id: its tokenizer's, else its processor's, else its family's plain form."""
    from transformers.utils.hub import cached_file

    if tokenizer.chat_template:
        return tokenizer.chat_template
    try:
        file = cached_file(source, "chat_template.json")
    except OSError:
        return CHAT[kind]
    return json.loads(Path(file).read_text())["chat_template"] if file else CHAT[kind]


def full_precision(model: nn.Module) -> nn.Module:
    """transformers' RMS norms go down to float32 and back; torch's, of the same formula, keep what they are given."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)  # pyright: ignore
                norm.weight = child.weight  # pyright: ignore
                setattr(module, name, norm)
    return model


def family_of(config: Any, source: str) -> Family:
    """How this model looks at pictures, by its configuration and its preprocessor file."""
    if config.model_type in QWEN:
        return _qwen(config, processor_settings(source))
    side = config.vision_config.image_size
    return Llava(published(source, Preparation((side,), (side, side))), config.image_token_id)


def _qwen(config: Any, settings: dict[str, Any]) -> Qwen:
    vision, size = config.vision_config, settings.get("size") or {}
    return Qwen(
        patch=vision.patch_size,
        merge=vision.spatial_merge_size,
        frames=vision.temporal_patch_size,
        least=settings.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
        most=settings.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
        image_token=config.image_token_id,
        mean=tuple(settings.get("image_mean") or MEAN),
        std=tuple(settings.get("image_std") or STD),
    )


def vqa_score(source: str) -> Vqa:
    """The reward `vqa:SOURCE` of a folder or hub id of a LLaVA, Qwen2-VL or Qwen2.5-VL, in float32. Raises UserError."""
    from transformers import AutoModelForImageTextToText

    what = "vision-language model"
    config = configuration(source, ("llava", *QWEN), what, EXAMPLE)
    tokenizer = tokenizer_of(source, what, EXAMPLE)
    model = full_precision(pretrained(AutoModelForImageTextToText, source, what, EXAMPLE))
    chat = chat_of(source, tokenizer, config.model_type)
    return Vqa(model, tokenizer, family_of(config, source), chat, f"vqa:{source}", source)
