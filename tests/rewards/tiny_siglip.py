"""A tiny SigLIP of random weights that spells its words."""

import torch
from tiny_words import spelling
from transformers import SiglipConfig, SiglipModel


def tiny_siglip():
    words = spelling(["<pad>", "</s>", "<unk>"], "$A </s>", pad_token="<pad>", eos_token="</s>")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 64, "projection_size": 32,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config={**small, "image_size": 48, "patch_size": 8})
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
    return model, words
