"""What a frozen vision tower sees in a picture, layer by layer: DINOv2 with and without registers, CLIP and SigLIP.

A tower is any torch module that takes pixels (B, 3, h, w), normalised, and returns one entry a layer, first to last: a map (B, C, p, q), or
a pair of a map and a summary (B, C), such as a class token. It may say of itself, each with a default: `size`, the shorter side in
pixels that pictures are brought to (None: they keep theirs), `patch`, of which both sides are multiples (1), `mean` and `std`, by which
pixels are normalised (0 and 1).
Source: DINOv2, arXiv 2304.07193; Vision Transformers Need Registers, arXiv 2309.16588; CLIP, arXiv 2103.00020; SigLIP, arXiv 2303.15343.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tropism.core import UserError
from tropism.rewards import pixels
from tropism.rewards.sources import configuration, pretrained

SOURCE = "facebook/dinov2-base"
SIZE = 448
"""The shorter side that pictures are brought to. A multiple of 14, 16 and 32; at the 224 of most processors fine detail is gone."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
KINDS = {
    "dinov2": ("Dinov2Model", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", IMAGENET),
    "clip": ("CLIPVisionModel", (pixels.MEAN, pixels.STD)),
    "clip_vision_model": ("CLIPVisionModel", (pixels.MEAN, pixels.STD)),
    "siglip": ("SiglipVisionModel", HALF),
    "siglip_vision_model": ("SiglipVisionModel", HALF),
}
"""By model_type: transformers' class of the tower, and the mean and standard deviation of its pixels where no file says otherwise."""


class Layer(NamedTuple):
    """Of one layer: a map (B, C, p, q), one vector a patch, and a summary (B, C) of the whole picture, None without one."""

    map: Tensor
    summary: Tensor | None = None


class Tower(nn.Module):
    """A transformers vision tower by its blocks: tokens behind each, through the tower's final LayerNorm unless `raw`.

    The summary is the class token (CLIP's before its projection); SigLIP has none, and the last layer's is what its head pools.
    Position embeddings are interpolated, so any multiple of `patch` is a size.
    """

    def __init__(
        self,
        model: Any,
        mean: tuple[float, ...] = IMAGENET[0],
        std: tuple[float, ...] = IMAGENET[1],
        size: int | None = SIZE,
        raw: bool = False,
    ):
        super().__init__()
        self.model, self.mean, self.std, self.size, self.raw = model, tuple(mean), tuple(std), size, raw
        config = model.config
        dino = config.model_type.startswith("dinov2")
        self.patch: int = config.patch_size
        self.leading = 0 if config.model_type.startswith("siglip") else 1 + getattr(config, "num_register_tokens", 0)
        self.options = {} if dino else {"interpolate_pos_encoding": True}

    def parts(self) -> tuple[nn.ModuleList, nn.Module]:
        """The blocks, first to last, and the final LayerNorm."""
        inner = getattr(self.model, "vision_model", self.model)  # transformers 4 has one more level
        if hasattr(inner, "layernorm"):
            return inner.encoder.layer, inner.layernorm
        return inner.encoder.layers, inner.post_layernorm

    def forward(self, images: Tensor) -> list[Layer]:
        """Normalised pixels (B, 3, h, w), both sides multiples of `patch` -> one Layer a block, maps (B, C, h / patch, w / patch)."""
        # Not the model's own hidden_states: for some families the last of them is already normalised, for others not.
        seen, (blocks, norm) = list[Tensor](), self.parts()

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            seen.append(out[0] if isinstance(out, tuple) else out)

        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            out = self.model(pixel_values=images, **self.options)
        finally:
            for hook in hooks:
                hook.remove()
        grid = tuple(n // self.patch for n in images.shape[-2:])
        layers = [self._layer(x if self.raw else norm(x), grid) for x in seen]
        if self.leading == 0:
            layers[-1] = Layer(layers[-1].map, out.pooler_output)
        return layers

    def _layer(self, tokens: Tensor, grid: tuple[int, ...]) -> Layer:
        """Of tokens (B, leading + patches, C)."""
        patches = tokens[:, self.leading :].transpose(1, 2).unflatten(2, grid)
        return Layer(patches, tokens[:, 0] if self.leading else None)


def tower_of(source: str = SOURCE, size: int | None = None, raw: bool = False) -> Tower:
    """The vision tower of a folder or hub id, in float32; mean and std are those of its preprocessor file, where it has one.

    size: the shorter side in pixels that pictures are brought to, SIZE (or the next multiple of the patch) by default. raw: tokens without
    the final LayerNorm. Raises UserError for a source that cannot be read, of another family, or without all weights.
    """
    import transformers

    what = "vision tower"
    kind, usual = KINDS[configuration(source, tuple(KINDS), what, SOURCE).model_type]
    model = pretrained(getattr(transformers, kind), source, what, SOURCE)
    mean, std = _normalisation(source, usual)
    patch: int = model.config.patch_size
    size = -(-SIZE // patch) * patch if size is None else size
    if size < patch or size % patch:
        near = max(patch, size // patch * patch)
        raise UserError(
            f"A size of {size} is no multiple of the {patch} pixels that '{source}' has in a patch. Take {near} or {near + patch}."
        )
    return Tower(model, mean, std, size, raw)


def _normalisation(source: str, usual: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    settings = pixels.processor_settings(source)
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(settings.get("image_mean") or usual[0]), tuple(settings.get("image_std") or usual[1])


def layer_of(found: Any) -> Layer:
    """An entry of a tower as a Layer. Raises UserError where it is neither a map (B, C, p, q) nor a pair of one and a summary (B, C)."""
    layer = Layer(found) if isinstance(found, Tensor) else Layer(*found)
    map_fits = isinstance(layer.map, Tensor) and layer.map.ndim == 4
    if not map_fits or (layer.summary is not None and layer.summary.ndim != 2):
        shapes = [tuple(x.shape) for x in layer if isinstance(x, torch.Tensor)]
        raise UserError(
            f"A layer of the vision tower has the shapes {shapes}; it must be a map (B, C, height, width), or a pair of such a map and a "
            "summary (B, C)."
        )
    return layer
