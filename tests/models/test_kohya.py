"""The kohya file read by an independent small reader and by diffusers: every weight changes by exactly (alpha / rank) B A."""

import re
import warnings

import diffusers
import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import save_file
from test_model_conformance import stirred
from tiny_families import BUILDERS, model_of

from tropism.core import UserError
from tropism.models import kohya as module
from tropism.models import lora
from tropism.models.flux import Flux
from tropism.models.kohya import kohya
from tropism.models.latent import Latent
from tropism.models.lora import LoraSettings
from tropism.models.stable_diffusion import StableDiffusion

WITHOUT_LAYOUT = ("chroma",)
FAMILIES = [name for name in BUILDERS if name not in ("sd3_without_t5", *WITHOUT_LAYOUT)]
LIMIT = 1e-6
PARTIAL = {
    "few": ("to_q",),
    "attention": LoraSettings().targets,
    "odd": ("to_v", "add_k_proj", "proj_mlp", "conv1", "proj_out", "ff.out_projection", "ff.net.2"),
}


def every(network):
    """All modules that a LoRA can sit on, or sits on."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, m in network.named_modules() if isinstance(m, kinds) and ".lora_" not in name]
    return tuple(name.removesuffix(".base_layer") for name in names)


def made(folders, name, targets=None):
    """A stirred model of rank 3 and alpha 7; targets None: every layer."""
    targets = targets or every(model_of(folders, name, lora=None).network)
    return stirred(model_of(folders, name, lora=LoraSettings(3, 7, targets), checkpointing=False))


def exported(model, folder):
    """(What kohya makes of the saved adapter, the change of every adapted weight by the definition, in float64.)"""
    lora.save(model, folder)
    layers, settings, _ = lora.read(folder)
    pairs = {lora.module_of(k): (v, layers[k.replace("_A.", "_B.")]) for k, v in layers.items() if "lora_A" in k}
    deltas = {n: 7 / 3 * product(a, b) for n, (a, b) in pairs.items()}
    return kohya(layers, settings, type(model)), deltas


def product(down, up):
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])


# ---------------------------------------------------------------------------------------------------- an independent reader


def merged(file):
    """{name in the file: alpha / rank * up @ down}; without an alpha that ratio is 1."""
    found = {}
    for key, down in file.items():
        end = re.search(r"\.(lora_down|lora_A)\.weight$", key)
        if end:
            name = key[: end.start()]
            up = file[f"{name}.{ {'lora_down': 'lora_up', 'lora_A': 'lora_B'}[end[1]] }.weight"]
            found[name] = file.get(f"{name}.alpha", torch.tensor(len(down))).double() / len(down) * product(down, up)
    assert sum(".alpha" in k for k in file) + 2 * len(found) == len(file), "tensors nobody reads"
    return found


def places(network, family):
    """{module: (its name in the file, the first of its rows there)} for every module of the network."""
    names = every(network)
    if family.startswith("sd3") or family == "auraflow":
        return {n: (f"transformer.{n}", 0) for n in names}
    if family not in ("flux", "schnell"):
        sgm = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
        return {n: (f"lora_unet_{sgm.get(n, n).replace('.', '_')}", 0) for n in names}
    return {n: in_flux(n, network.inner_dim) for n in names}


def in_flux(name, width):
    """Where Black Forest Labs' own network keeps a module of diffusers' one."""
    at = re.search(r"\d+", name)
    if name.startswith("single"):
        inner = {"to_q": ("linear1", 0), "to_k": ("linear1", 1), "to_v": ("linear1", 2), "proj_mlp": ("linear1", 3)}
        inner |= {"proj_out": ("linear2", 0), "linear": ("modulation_lin", 0)}
        end, row = inner[name.rpartition(".")[2]]
        return f"lora_unet_single_blocks_{at[0]}_{end}", row * width
    if name.startswith("transformer_blocks"):
        stream = "txt" if "context" in name or "add" in name else "img"
        for pattern, end, row in [
            (r"to_q|add_q", "attn_qkv", 0),
            (r"to_k|add_k", "attn_qkv", 1),
            (r"to_v|add_v", "attn_qkv", 2),
            (r"to_out|to_add_out", "attn_proj", 0),
            (r"net\.0", "mlp_0", 0),
            (r"net\.2", "mlp_2", 0),
            (r"norm1", "mod_lin", 0),
        ]:
            if re.search(pattern, name):
                return f"lora_unet_double_blocks_{at[0]}_{stream}_{end}", row * width
    parts = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer_linear"}
    parts["norm_out.linear"] = "final_layer_adaLN_modulation_1"
    for ours, its in {"timestep": "time", "text": "vector", "guidance": "guidance"}.items():
        for i, end in ((1, "in"), (2, "out")):
            parts[f"time_text_embed.{ours}_embedder.linear_{i}"] = f"{its}_in_{end}_layer"
    return f"lora_unet_{parts[name]}", 0


def difference(model, family, file, deltas):
    """The largest difference of a merged weight; every module is in the file, and nothing else is."""
    found, worst = merged(file), 0.0
    where = places(model.network, family)
    assert set(found) == {where[n][0] for n in deltas}
    for name, (key, row) in where.items():
        if key not in found:
            assert name not in deltas
            continue
        own = model.network.get_submodule(name)
        shape = getattr(own, "base_layer", own).weight.shape
        change = found[key][row : row + shape[0]]
        if name == "norm_out.linear" and isinstance(model, Flux):
            change = change.roll(len(change) // 2, 0)
        worst = max(worst, (change - deltas.get(name, torch.zeros(shape))).abs().max().item())
    return worst


@pytest.mark.parametrize("targets", [None, *PARTIAL])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_weights_are_the_adapters(folders, tmp_path, family, targets):
    model = made(folders, family, PARTIAL.get(targets))
    file, deltas = exported(model, tmp_path)
    assert len(deltas) > 1 and all(d.abs().max() > 0.05 for d in deltas.values())
    assert difference(model, family, file, deltas) < LIMIT
    for key, value in file.items():
        if key.endswith(".alpha"):
            assert value == len(file[key.replace("alpha", "lora_down.weight")])


def test_fused_rows_have_the_right_sizes(folders, tmp_path):
    file, _ = exported(made(folders, "flux", ("to_q",)), tmp_path)
    width = 32
    assert file["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (3 * width, 3)
    assert file["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * width, 3)
    file, _ = exported(made(folders, "flux"), tmp_path)
    assert file["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * width, 4 * 3)
    assert file["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (4 * 3, width)
    assert file["lora_unet_single_blocks_0_linear1.alpha"] == 12


# ---------------------------------------------------------------------------------------------------- diffusers as the reader

# what this version of diffusers leaves out or cannot split: a single block's linear1 has the widths of the real Flux there
UNREAD = re.compile(
    r"single_transformer_blocks\.\d+\.(attn|proj_mlp)|(x|context)_embedder|time_text|^norm_out|^proj_out"
)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_it(folders, tmp_path, family):
    plain = model_of(folders, family, lora=None)
    targets = [n for n in every(plain.network) if not (isinstance(plain, Flux) and UNREAD.search(n))]
    model = made(folders, family, tuple(targets))
    file, deltas = exported(model, tmp_path / "lora")
    (tmp_path / "kohya").mkdir()
    save_file(file, tmp_path / "kohya" / "adapter.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = getattr(diffusers, model.pipelines[0]).from_pretrained(model.source, text_encoder=None)
        pipe.load_lora_weights(tmp_path / "kohya", weight_name="adapter.safetensors")
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    after, before = (dict(n.named_parameters()) for n in (getattr(pipe, model.part), plain.network))
    after = {k.replace(".base_layer", ""): v for k, v in after.items()}
    assert after.keys() == before.keys()
    changed = {f"{n}.weight": d for n, d in deltas.items()}
    for name, weight in before.items():
        expected = weight.double() + changed.get(name, 0.0)
        assert (after[name] - expected).abs().max() < LIMIT, name


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v", "proj_mlp"), ("to_k",), ("to_v", "proj_mlp")])
def test_diffusers_splits_a_single_block_of_the_real_width(parts):
    """diffusers takes linear1 to be 3072 x 3 + 12288 rows, whatever the network."""
    generator, width = torch.Generator().manual_seed(0), 3072
    block = "single_transformer_blocks.37"
    names = {p: f"{block}.{p}" if p == "proj_mlp" else f"{block}.attn.{p}" for p in parts}
    layers = {}
    for part, name in names.items():
        rows = 4 * width if part == "proj_mlp" else width
        layers[f"{name}.lora_A.weight"] = torch.randn(3, width, generator=generator)
        layers[f"{name}.lora_B.weight"] = torch.randn(rows, 3, generator=generator)
    read = theirs._convert_kohya_flux_lora_to_diffusers(kohya(layers, LoraSettings(3, 7), Flux))
    for part in ("to_q", "to_k", "to_v", "proj_mlp"):
        name = f"{block}.{part}" if part == "proj_mlp" else f"{block}.attn.{part}"
        a, b = (read[f"transformer.{name}.lora_{x}.weight"].double() for x in "AB")
        own = [layers[f"{name}.lora_{x}.weight"].double() for x in "AB"] if part in parts else (a, 0 * b)
        assert (b @ a - 7 / 3 * own[1] @ own[0]).abs().max() < LIMIT * 10, part  # entries reach 30
        assert part in parts or not b.any()


# ---------------------------------------------------------------------------------------------------- what is refused


def pair(name, rows=8):
    return {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(rows, 2)}


@pytest.mark.parametrize(
    ("layers", "family", "message"),
    [
        (pair("down_blocks.0.attentions.0.mystery"), StableDiffusion, "no modules.*U-Net has: .*mystery"),
        (pair("transformer_blocks.0.attn.to_q"), StableDiffusion, "1 names.*transformer_blocks.0.attn.to_q"),
        (pair("down_blocks.0.resnets.0.conv1"), Flux, "no modules.*Flux has: down_blocks.0.resnets.0.conv1"),
        (pair("transformer_blocks.0.attn.mystery"), module.StableDiffusion3, "ComfyUI reads.*mystery"),
        (pair("joint_transformer_blocks.0.mystery"), module.AuraFlow, "ComfyUI reads.*mystery"),
        (pair("single_transformer_blocks.0.attn.to_q", 5), Flux, "5 rows where FLUX.1 has 8"),
        ({"conv_in.lora_A.weight": torch.ones(2, 8)}, StableDiffusion, "pairs of.*conv_in.lora_B.weight"),
        (pair("conv_in") | {"conv_in.lora_B.bias": torch.ones(8)}, StableDiffusion, "pairs of.*lora_B.bias"),
        (pair("conv_in"), Latent, "no kohya layout for Latent.*Flux.*--format diffusers"),
    ],
)
def test_what_has_no_name_there_is_refused(layers, family, message):
    with pytest.raises(UserError, match=message):
        kohya(layers, LoraSettings(2), family)


def test_narrow_factors_are_widened_before_the_fold():
    layers = {k: v.to(torch.bfloat16) for k, v in pair("conv_in").items()}
    file = kohya(layers, LoraSettings(2, 7), StableDiffusion)
    assert {v.dtype for v in file.values()} == {torch.float32}
    assert (file["lora_unet_conv_in.lora_up.weight"] == 3.5).all()
