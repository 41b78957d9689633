"""A tiny CLIP of random weights."""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

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
