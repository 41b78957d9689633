"""Tiny vision towers of random weights, one of each family, and a convolution that is nobody's."""

import torch
from tiny_detector import lively, tiny_dino
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_registers():
    return lively(
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, image_size=56, patch_size=14))
    )


def tiny_clip_vision():
    return lively(CLIPVisionModel(CLIPVisionConfig(**SMALL, intermediate_size=48, image_size=48, patch_size=8)))


def tiny_siglip_vision():
    return lively(SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=48, image_size=48, patch_size=8)))


MODELS = {
    "dinov2": tiny_dino,
    "registers": tiny_registers,
    "clip": tiny_clip_vision,
    "siglip": tiny_siglip_vision,
}


class Convolutions(nn.Module):
    """Two layers of two grids, without a summary: a map each, and pixels as they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.one, self.two = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 8, 2, stride=2)

    def forward(self, images):
        first = self.one(images).tanh()
        return [first, self.two(first)]
