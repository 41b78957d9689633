"""Tiny LLaVA, Qwen2-VL and Qwen2.5-VL of random weights that spell their words, and know "yes" and "Yes"."""

import torch
from tiny_detector import lively
from tiny_words import spelling
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 512}
QWEN_SPECIAL = [
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def words_of(special, **names):
    words = spelling([*special, "yes", "Yes", "no", "No"], **names)
    words.add_special_tokens({"additional_special_tokens": [s for s in special if s not in names.values()]})
    return words


def bold(model):
    """`lively`, with answers that are far from even."""
    model = lively(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


def tiny_llava():
    words = words_of(["<unk>", "<s>", "</s>", "<image>"], template="<s> $A", bos_token="<s>", eos_token="</s>")
    text = LlamaConfig(**TEXT, vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=None)
    vision = CLIPVisionConfig(**SMALL, image_size=48, patch_size=16, projection_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"))
    return bold(LlavaForConditionalGeneration(config)), words


def qwen(config, model):
    words = words_of(QWEN_SPECIAL, eos_token="<|im_end|>")
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {
        **TEXT,
        "vocab_size": len(words),
        "rope_parameters": rope,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return bold(model(config(words, text, ids))), words


def tiny_qwen2():
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 8}
    make = lambda words, text, ids: Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return qwen(make, Qwen2VLForConditionalGeneration)


def tiny_qwen25():
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32,
              "patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    make = lambda words, text, ids: Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return qwen(make, Qwen2_5_VLForConditionalGeneration)
