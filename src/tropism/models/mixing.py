"""Mix finished adapters at inference: the weighted sum of their B A products, as one adapter.

Source: AlignProp, arXiv 2310.03739, mixes two rewards at inference. Its released code averages the factors A and B apart, so
that its products are not the average of the products; summing the products makes each weight's effect exactly linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tropism.core import UserError
from tropism.models.lora import LoraSettings, attach, factors, module_of, read

if TYPE_CHECKING:
    from tropism.models.latent import Latent


def _widened(parts: list[tuple[float, dict[str, Tensor], LoraSettings]], key: str, dtype: torch.dtype) -> Tensor:
    """One factor of the mixture: the A's stacked, and the B's side by side, each times weight * alpha / rank."""
    shape = next(layers[key].shape for _, layers, _ in parts if key in layers)
    is_a, rows = ".lora_A." in key, []
    for weight, layers, own in parts:
        size = (own.rank, *shape[1:]) if is_a else (shape[0], own.rank, *shape[2:])
        factor = layers[key].to(dtype) if key in layers else torch.zeros(size, dtype=dtype)
        rows.append(factor if is_a else weight * own.scale * factor)
    return torch.cat(rows, 0 if is_a else 1)


def _unfit(network: nn.Module, layers: Mapping[str, Tensor]) -> list[str]:
    """The keys that name no module of this network, or one of another width."""
    modules = dict(network.named_modules())

    def fits(key: str, factor: Tensor) -> bool:
        weight, side = getattr(modules.get(module_of(key)), "weight", None), 1 if ".lora_A." in key else 0
        return weight is not None and factor.ndim == weight.ndim and factor.shape[side] == weight.shape[side]

    return [key for key, factor in layers.items() if not fits(key, factor)]


def mix(model: Latent, weights: Mapping[str | Path, float]) -> None:
    """Replace the model's adapter by sum_i w_i (alpha_i / rank_i) B_i A_i over finished adapters {folder: weight}.

    The products are summed, as one adapter of the summed rank that `save` can write; factors are never averaged. Ranks,
    alphas and targets may differ. Raises UserError if an adapter does not fit this base, which then stays as it was.
    """
    if not weights:
        raise UserError("There is no adapter to mix. Name at least one folder and its weight.")
    parts = [(float(w), *read(folder)[:2]) for folder, w in weights.items()]
    for folder, (_, layers, _) in zip(weights, parts, strict=True):
        odd = _unfit(model.network, layers)
        if odd:
            raise UserError(
                f"The adapter in {folder} does not fit this model, at {', '.join(odd[:6])}. Mix adapters "
                "of the same base model."
            )
    ranks = sum(own.rank for _, _, own in parts)
    targets = dict.fromkeys(t for _, _, own in parts for t in own.targets)
    model.lora = LoraSettings(ranks, ranks, tuple(targets))
    attach(model.network, model.lora, torch.promote_types(model.dtype, torch.float32))
    held = {key for _, layers, _ in parts for key in layers}
    with torch.no_grad():
        for key, p in factors(model.network).items():
            p.copy_(_widened(parts, key, p.dtype) if key in held else torch.zeros_like(p))


@torch.no_grad()
def merge(network: nn.Module, folder: str | Path, strength: float = 1.0) -> None:
    """Add strength (alpha / rank) B A of a saved adapter to the weights of a plain network, in place; no library of adapters is used.

    Raises UserError if the adapter does not fit.
    """
    layers, own, _ = read(folder)
    odd = _unfit(network, layers)
    if odd:
        raise UserError(
            f"The adapter in {folder} does not fit this model, at {', '.join(odd[:6])}. Take the base it was trained on."
        )
    modules = dict(network.named_modules())
    for key in (k for k in layers if ".lora_A." in k):
        weight = cast(Tensor, modules[module_of(key)].weight)
        a, b = (
            layers[key].to(weight.device).double(),
            layers[key.replace(".lora_A.", ".lora_B.")].to(weight.device).double(),
        )
        product = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).reshape(
            weight.shape
        )  # of convolutions B is 1x1
        weight.copy_(weight.double() + strength * own.scale * product)
