"""An adapter under the names that ComfyUI and kohya's sd-scripts read, one layout a family.

alpha / rank is folded into the up factors, and every `.alpha` is its module's rank: readers that heed it and readers that
do not agree. U-Nets keep diffusers' module names, written with underscores; Flux has kohya's fused names; SD 3 and AuraFlow
have diffusers' names and peft's factors without any alpha, as diffusers refuses such a file with one.
Source: ComfyUI, comfy/lora.py and comfy/utils.py; kohya-ss/sd-scripts, networks/convert_flux_lora.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tropism.core import UserError
from tropism.models.auraflow import AuraFlow
from tropism.models.flux import Flux
from tropism.models.latent import Latent
from tropism.models.lora import LoraSettings, module_of
from tropism.models.sd3 import StableDiffusion3
from tropism.models.sdxl import StableDiffusionXL
from tropism.models.stable_diffusion import StableDiffusion

Pair = tuple[Tensor, Tensor]
"""The down factor (rank, in, ...) and the up factor (out, rank, ...) of one module."""

_UNET = re.compile(
    r"conv_(in|out)|(time|add)_embedding\.linear_[12]|(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.("
    r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|(down|up)samplers\.0\.conv|attentions\.\d+\.("
    r"proj_in|proj_out|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))))"
)
_SD3 = re.compile(
    r"context_embedder|pos_embed\.proj|proj_out|norm_out\.linear|time_text_embed\.(timestep|text)_embedder\.linear_[12]|"
    r"transformer_blocks\.\d+\.(attn2?\.to_(q|k|v|out\.0)|attn\.(add_[qkv]_proj|to_add_out)|"
    r"ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
)
_AURAFLOW = re.compile(
    r"context_embedder|pos_embed\.proj|proj_out|norm_out\.linear|time_step_proj\.linear_[12]|"
    r"(joint|single)_transformer_blocks\.\d+\.(attn\.(to_(q|k|v|out\.0)|add_[qkv]_proj|to_add_out)|"
    r"ff(_context)?\.(linear_[12]|out_projection)|norm1(_context)?\.linear)"
)
_UNLIKE = {f"add_embedding_linear_{i}": f"label_emb_0_{2 * (i - 1)}" for i in (1, 2)}
"""SDXL modules that diffusers finds only under their first authors' names."""

# kohya's module: the modules of diffusers that it fuses, in the order of its rows; # is the block's number
_FLUX = {
    "double_blocks_#_img_attn_qkv": [f"transformer_blocks.#.attn.to_{x}" for x in "qkv"],
    "double_blocks_#_txt_attn_qkv": [f"transformer_blocks.#.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks_#_img_attn_proj": ["transformer_blocks.#.attn.to_out.0"],
    "double_blocks_#_txt_attn_proj": ["transformer_blocks.#.attn.to_add_out"],
    "double_blocks_#_img_mlp_0": ["transformer_blocks.#.ff.net.0.proj"],
    "double_blocks_#_img_mlp_2": ["transformer_blocks.#.ff.net.2"],
    "double_blocks_#_txt_mlp_0": ["transformer_blocks.#.ff_context.net.0.proj"],
    "double_blocks_#_txt_mlp_2": ["transformer_blocks.#.ff_context.net.2"],
    "double_blocks_#_img_mod_lin": ["transformer_blocks.#.norm1.linear"],
    "double_blocks_#_txt_mod_lin": ["transformer_blocks.#.norm1_context.linear"],
    "single_blocks_#_linear1": [
        *(f"single_transformer_blocks.#.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.#.proj_mlp",
    ],
    "single_blocks_#_linear2": ["single_transformer_blocks.#.proj_out"],
    "single_blocks_#_modulation_lin": ["single_transformer_blocks.#.norm.linear"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    **{
        f"{theirs}_in_{end}_layer": [f"time_text_embed.{ours}_embedder.linear_{i}"]
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, end in ((1, "in"), (2, "out"))
    },
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],
}
_FLUX_PLACES = {ours: (name, at) for name, parts in _FLUX.items() for at, ours in enumerate(parts)}
_MLP = 4
"""Flux: the MLP's width over the network's, in rows of linear1."""
_ENDS = ("lora_down.weight", "lora_up.weight", "alpha")


def kohya(layers: Mapping[str, Tensor], settings: LoraSettings, family: type[Latent]) -> dict[str, Tensor]:
    """The tensors of the file, at least float32, from the factors and settings that `lora.read` gives.

    Every reader's alpha / rank * up @ down (fused modules: the rows of q, k, v, MLP) is settings.scale * B A.
    Raises UserError for a family without a layout and for modules that the layout has no name for.
    """
    layout = next((found for kind, found in LAYOUTS.items() if issubclass(family, kind)), None)
    if layout is None:
        raise UserError(
            f"There is no kohya layout for {family.__name__}; there are for {', '.join(k.__name__ for k in LAYOUTS)}. "
            "Export it as --format diffusers."
        )
    return dict(sorted(layout(_pairs(layers, settings.scale)).items()))


def metadata(
    tensors: Mapping[str, Tensor], family: type[Latent], config: Mapping[str, Any], title: str
) -> dict[str, str]:
    """The header that kohya's scripts write and other programs show: rank, alpha and, where it is known, the base's version.

    config: of the denoiser. The names of versions and architectures are sd-scripts' own.
    """
    ranks = {len(v) for k, v in tensors.items() if k.endswith(("lora_down.weight", "lora_A.weight"))}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"
    version, architecture = _version(family, config)
    found = {
        "format": "pt",
        "ss_network_module": "networks.lora_flux" if issubclass(family, Flux) else "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_output_name": title,
        "ss_base_model_version": version,
        "ss_v2": "True" if version == "sd_v2" else "",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": architecture and f"{architecture}/lora",
    }
    return {k: v for k, v in found.items() if v}


def _version(family: type[Latent], config: Mapping[str, Any]) -> tuple[str, str]:
    """sd-scripts' version and architecture of a base, "" where it has none."""
    if issubclass(family, StableDiffusionXL):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if issubclass(family, Flux):
        return "flux1", "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"
    if issubclass(family, StableDiffusion3):
        return "", "stable-diffusion-3"
    second = "stable-diffusion-v2-" + ("768-v" if config.get("sample_size") == 96 else "512")
    of_text = {"768": ("sd_v1", "stable-diffusion-v1"), "1024": ("sd_v2", second)}
    return of_text.get(str(config.get("cross_attention_dim")), ("", ""))


def check_fits(layers: Mapping[str, Tensor], network: nn.Module, folder: str | Path, source: str) -> None:
    """Raises UserError if an adapter names modules or widths that a denoiser (without weights will do) does not have."""
    shapes = {n: m.weight.shape for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    odd = sorted({fault for k, v in layers.items() if (fault := _fault(k, v, shapes))})
    if odd or not layers:
        raise UserError(
            f"The adapter in {folder} is not one of {source} ({type(network).__name__}): {len(odd)} of its names or widths are "
            f"not there: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''}. It looks like {_looks_like(layers)}. "
            "Name the base it was trained on: --model."
        )


def _fault(key: str, factor: Tensor, shapes: Mapping[str, torch.Size]) -> str:
    """What of a factor the base does not have: the module, or its width; else ""."""
    module, side = module_of(key), 1 if ".lora_A." in key else 0
    if module not in shapes or factor.ndim < 2:
        return module
    theirs, ours = factor.shape[side], shapes[module][side]
    return "" if theirs == ours else f"{module} ({theirs} wide, not {ours})"


def _looks_like(layers: Mapping[str, Tensor]) -> str:
    """What an adapter is for, by its factors' names and widths; for error messages."""
    has = lambda *starts: any(k.startswith(starts) for k in layers)
    starts = {
        ("lora_unet_", "lora_te"): "a file in kohya's layout, which is not read here",
        ("text_encoder",): "an adapter of a text encoder",
        ("joint_transformer_blocks.",): "an adapter of AuraFlow, a transformer",
        ("single_transformer_blocks.",): "an adapter of Flux, a transformer",
        ("transformer_blocks.",): "an adapter of Stable Diffusion 3 or Flux, a transformer",
    }
    if named := next((name for start, name in starts.items() if has(*start)), ""):
        return named
    if not has("down_blocks.", "mid_block.", "up_blocks."):
        return "none of the known families"
    width = next((v.shape[1] for k, v in layers.items() if re.search(r"attn2\.to_[kv]\.lora_A", k)), 0)
    kinds = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
    return f"an adapter of {kinds.get(width, 'Stable Diffusion or SDXL')}, a U-Net" + f" (text width {width})" * (
        width > 0
    )


def _pairs(layers: Mapping[str, Tensor], scale: float) -> dict[str, Pair]:
    """Both factors of every module, alpha / rank folded into the second; rounded once."""
    modules = dict.fromkeys(map(module_of, layers))
    expected = {f"{module}.lora_{x}.weight" for module in modules for x in "AB"}
    _refuse(sorted(layers.keys() ^ expected), "not pairs of lora_A.weight and lora_B.weight")

    def factor(module: str, x: str, by: float) -> Tensor:
        found = layers[f"{module}.lora_{x}.weight"]
        return (found.double() * by).to(torch.promote_types(found.dtype, torch.float32)).contiguous()

    return {module: (factor(module, "A", 1.0), factor(module, "B", scale)) for module in modules}


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        raise UserError(
            f"{len(names)} names in this adapter are {what}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}. "
            "Export it as --format diffusers, or name the base model it was trained on."
        )


def _written(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """kohya's three tensors a module."""
    found = {}
    for name, (down, up) in pairs.items():
        alpha = torch.tensor(float(len(down)), dtype=down.dtype)
        found |= {f"lora_unet_{name}.{end}": x for end, x in zip(_ENDS, (down, up, alpha), strict=True)}
    return found


def _unet(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Diffusers' module names with underscores."""
    _refuse([m for m in pairs if not _UNET.fullmatch(m)], "no modules that a kohya file of a U-Net has")
    names = {module: module.replace(".", "_") for module in pairs}
    return _written({_UNLIKE.get(names[module], names[module]): pair for module, pair in pairs.items()})


def _diffusers(pairs: Mapping[str, Pair], known: re.Pattern) -> dict[str, Tensor]:
    """Diffusers' module names with peft's factors; where there is no alpha, readers take alpha = rank."""
    _refuse([m for m in pairs if not known.fullmatch(m)], "no modules that ComfyUI reads of this model")
    return {f"transformer.{m}.lora_{x}.weight": v for m, pair in pairs.items() for x, v in zip("AB", pair, strict=True)}


def _flux(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Kohya's names; q, k, v (and a single block's MLP) share one module."""
    groups: dict[str, dict[int, Pair]] = defaultdict(dict)
    odd = []
    for module, pair in pairs.items():
        number = re.search(r"(?<=_blocks\.)\d+", module)
        name, at = _FLUX_PLACES.get(re.sub(r"(?<=_blocks\.)\d+", "#", module), ("", 0))
        odd += [] if name else [module]
        groups[name.replace("#", number[0] if number else "")][at] = pair
    _refuse(odd, "no modules that a kohya file of Flux has")
    return _written({name: _joined(name, parts) for name, parts in groups.items()})


def _joined(name: str, parts: Mapping[int, Pair]) -> Pair:
    down, up = parts.get(0, next(iter(parts.values())))
    if name == "final_layer_adaLN_modulation_1":  # diffusers has scale before shift, Flux itself shift before scale
        return down, torch.cat(up.chunk(2)[::-1])
    if not name.endswith(("_qkv", "_linear1")):
        return down, up
    width = down.shape[1]
    return _fused(parts, [width] * 3 if name.endswith("_qkv") else [width] * 3 + [_MLP * width])


def _fused(parts: Mapping[int, Pair], sizes: Sequence[int]) -> Pair:
    """One module of several: downs stacked, ups block-diagonal, rows of zeros for a part that has no adapter."""
    down = torch.cat([parts[at][0] for at in sorted(parts)])
    up, column = down.new_zeros(sum(sizes), len(down)), 0
    for at in sorted(parts):
        block = parts[at][1]
        if len(block) != sizes[at]:
            raise UserError(
                f"Part {at} of q, k, v, MLP has {len(block)} rows where FLUX.1 has {sizes[at]}: this is no adapter for it. "
                "Name the base model it was trained on."
            )
        up[sum(sizes[:at]) :][: len(block), column : column + block.shape[1]] = block
        column += block.shape[1]
    return down, up


LAYOUTS: dict[type[Latent], Callable[[Mapping[str, Pair]], dict[str, Tensor]]] = {
    StableDiffusion: _unet,  # SDXL too
    Flux: _flux,
    StableDiffusion3: partial(_diffusers, known=_SD3),
    AuraFlow: partial(_diffusers, known=_AURAFLOW),
}
