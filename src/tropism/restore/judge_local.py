"""A judge that runs here: LLaVA, Qwen2-VL or Qwen2.5-VL from a folder or hub id, without a server and without torchvision.

Other families answer through a server of their own (vLLM, llama.cpp, Ollama) and `judge_client.Endpoint`.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tropism.core import UserError
from tropism.restore.judge_client import UNREAD, WARMER
from tropism.restore.judge_ledger import Ledger
from tropism.restore.judge_pictures import Picture
from tropism.restore.judge_prompt import Question
from tropism.restore.judge_reply import JudgeFailed, JudgeUnavailable, ParseError, Verdict, parse
from tropism.rewards.clip import pooled
from tropism.rewards.protocol import of_png
from tropism.rewards.sources import configuration, pretrained, tokenizer_of
from tropism.rewards.vqa import EXAMPLE, QWEN, Family, Llava, Qwen, chat_of, family_of

PLACES = {"llava": "<image>\n", **dict.fromkeys(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")}
"""Where a picture stands in the plain forms of chat, for folders that hold no template."""


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    family: Family
    chat: str
    place: str


class LocalJudge:
    """A vision-language model that is loaded with the first question, since a full cache needs none.

    source: a folder or hub id. dtype: bfloat16 on an accelerator and float32 on a CPU without one. temperature: above 0, or all repeats
    would be equal. Replies depend on (seed, repeat), the precision and the device. `ask` raises JudgeUnavailable for weights that cannot
    be read.
    """

    def __init__(
        self,
        source: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        temperature: float = WARMER,
        seed: int = 0,
        max_tokens: int = 1024,
    ):
        self.name, self.device = source, torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self.sampling: dict[str, Any] = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
        self.sampling |= {"backend": "transformers", "dtype": str(self.dtype).removeprefix("torch.")}
        self.ledger, self._lock, self._loaded = Ledger(), threading.Lock(), None

    def ask(self, question: Question, repeat: int) -> Verdict:
        """The verdict on a question. Raises ParseError where no reply held a score, JudgeFailed where the question cannot be put."""
        unread = 0
        while True:
            try:
                with self._lock:  # torch's random numbers are the process's
                    return self._asked(question, repeat, unread)
            except ParseError:
                unread += 1
                if unread > UNREAD:
                    raise

    @property
    def loaded(self) -> _Loaded:
        if self._loaded is None:
            try:
                self._loaded = _load(self.name, self.device, self.dtype)
            except UserError as error:  # of no single picture
                raise JudgeUnavailable(str(error)) from error
        return self._loaded

    def _asked(self, question: Question, repeat: int, unread: int) -> Verdict:
        loaded = self.loaded
        inputs = inputs_of(loaded, question, self.device, self.dtype)
        temperature = max(self.sampling["temperature"], WARMER if unread else 0.0)
        self.ledger.request()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.no_grad():
            torch.manual_seed(self.sampling["seed"] + repeat + 1000 * unread)
            written = self._generated(loaded, inputs, temperature)
        usage = (inputs["attention_mask"].shape[1], len(written))
        self.ledger.reply(usage)
        text = loaded.tokenizer.decode(written, skip_special_tokens=True)
        if len(written) >= self.sampling["max_tokens"]:
            raise ParseError("was cut off", text)
        candidate = next(p for p in question.pictures if p.label == "C")
        return replace(parse(text, (candidate.width, candidate.height)), usage=usage)

    def _generated(self, loaded: _Loaded, inputs: dict[str, Tensor], temperature: float) -> Tensor:
        """The ids (L,) of what is written after the question."""
        how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        pad = loaded.tokenizer.pad_token_id
        pad = loaded.tokenizer.eos_token_id if pad is None else pad
        ids = loaded.model.generate(**inputs, **how, max_new_tokens=self.sampling["max_tokens"], pad_token_id=pad)[0]
        return ids[inputs["input_ids"].shape[1] :] if "input_ids" in inputs else ids


def _load(source: str, device: torch.device, dtype: torch.dtype) -> _Loaded:
    from transformers import AutoModelForImageTextToText

    what = "vision-language model"
    config = configuration(source, ("llava", *QWEN), what, EXAMPLE)
    tokenizer = tokenizer_of(source, what, EXAMPLE)
    model = (
        pretrained(AutoModelForImageTextToText, source, what, EXAMPLE).to(device, dtype).eval().requires_grad_(False)
    )
    chat = chat_of(source, tokenizer, config.model_type)
    return _Loaded(model, tokenizer, family_of(config, source), chat, PLACES[config.model_type])


def inputs_of(loaded: _Loaded, question: Question, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's generate and forward take for a question, pictures at their places. Raises JudgeFailed."""
    ids = torch.tensor(_ids(loaded, question), device=device)
    pictures = [of_png(base64.b64encode(p.png).decode())[None].to(device) for p in question.pictures]
    family = loaded.family
    if isinstance(family, Llava):
        seen = [family.prepare(picture).to(dtype) for picture in pictures]
        return _joined(
            loaded.model, ids, [pooled(loaded.model.get_image_features(pixel_values=x))[0] for x in seen], family
        )
    assert isinstance(family, Qwen)
    patches, grids = zip(*(family.patches(picture) for picture in pictures), strict=True)
    counts = [len(p) // family.merge**2 for p in patches]
    whole = _expanded(ids, family.image_token, counts)[None]
    return {
        "input_ids": whole,
        "attention_mask": torch.ones_like(whole),
        "mm_token_type_ids": (whole == family.image_token).int(),
        "pixel_values": torch.cat(patches).to(dtype),
        "image_grid_thw": torch.cat(grids),
    }


def _joined(model: Any, ids: Tensor, seen: list[Tensor], family: Llava) -> dict[str, Tensor]:
    """The text's embeddings with each picture's features where its token stood."""
    words, parts, at = model.get_input_embeddings()(ids), list[Tensor](), 0
    for place, features in zip((ids == family.image_token).nonzero()[:, 0].tolist(), seen, strict=True):
        parts += [words[at:place], features.to(words)]
        at = place + 1
    embeddings = torch.cat([*parts, words[at:]])[None]
    return {"inputs_embeds": embeddings, "attention_mask": ids.new_ones(1, embeddings.shape[1])}


def _expanded(ids: Tensor, token: int, counts: list[int]) -> Tensor:
    """ids with the k-th image token repeated counts[k] times."""
    times = torch.ones_like(ids)
    times[ids == token] = torch.tensor(counts, device=ids.device)
    return ids.repeat_interleave(times)


def _ids(loaded: _Loaded, question: Question) -> list[int]:
    words = loaded.tokenizer
    text = _chatted(loaded, question.parts())
    begun = bool(words.bos_token) and text.startswith(words.bos_token)
    ids, token = words(text, add_special_tokens=not begun)["input_ids"], loaded.model.config.image_token_id
    if ids.count(token) != len(question.pictures):
        raise JudgeFailed(
            f"The chat template of '{words.name_or_path}' places {ids.count(token)} pictures where {len(question.pictures)} were "
            f"shown. Give a model whose template takes several, such as {EXAMPLE}."
        )
    return ids


def _chatted(loaded: _Loaded, parts: list[str | Picture]) -> str:
    """The question as the model's user asks it, up to where its answer begins, an image token at each picture's place."""
    if "{question}" in loaded.chat:
        text = "".join(f"{part}\n" if isinstance(part, str) else loaded.place for part in parts)
        return loaded.chat.replace(loaded.place, "").replace("{question}", text)
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
    said = [{"role": "user", "content": content}]
    return loaded.tokenizer.apply_chat_template(
        said, chat_template=loaded.chat, tokenize=False, add_generation_prompt=True
    )
