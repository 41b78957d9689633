"""A tiny OWLv2 of random weights with CLIP's tokenizer, and a tiny DINOv2."""

import torch
from transformers import Dinov2Config, Dinov2Model, Owlv2Config, Owlv2ForObjectDetection


def lively(model, gain=1.5, seed=0):
    """The default initialisation is so small that every picture looks alike."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, gain / p[0].numel() ** 0.5)
            elif p.ndim == 1:  # gains of 1 and biases of 0 would hide that they were dropped
                p.copy_(float((p == 1).all()) + 0.1 * torch.randn_like(p))
    return model.eval()


def tiny_owl(tokenizer):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 60,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}  # fmt: skip
    config = Owlv2Config(
        text_config=text, vision_config={**small, "image_size": 48, "patch_size": 8}, projection_dim=32
    )
    model = lively(Owlv2ForObjectDetection(config))
    with torch.no_grad():  # sure of some things, unsure of most, as a trained one
        model.class_head.logit_scale.bias.fill_(6.0)
        model.class_head.logit_shift.bias.fill_(-0.5)
    return model


def tiny_dino():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    return lively(Dinov2Model(Dinov2Config(**small, image_size=56, patch_size=14)))
