"""A tiny SegFormer, YOLOS and DETR of random weights."""

from tiny_detector import lively
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    YolosConfig,
    YolosForObjectDetection,
)


def tiny_segformer():
    config = SegformerConfig(
        depths=[1, 1], hidden_sizes=[8, 16], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=7,
    )  # fmt: skip
    return lively(SegformerForSemanticSegmentation(config))


def tiny_yolos():
    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[32, 32], patch_size=8,
        num_detection_tokens=10, num_labels=4,
    )  # fmt: skip
    return lively(YolosForObjectDetection(config))


def tiny_detr():
    eyes = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = DetrConfig(
        backbone_config=eyes, use_timm_backbone=False, d_model=32, encoder_layers=1, decoder_layers=1, **heads, num_queries=10, num_labels=4
    )  # fmt: skip
    return lively(DetrForObjectDetection(config))
