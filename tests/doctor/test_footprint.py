"""FLOPs, saved bytes and peaks: by hand, beside real CPU runs (autograd's hooks, torch's allocator), and of whole updates."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tropism.align.rollout import Chain, sweep
from tropism.core import Batch, Draw, UserError
from tropism.doctor.footprint import Footprint, Update, count, fits, flash_attention, inputs_of, peak, room
from tropism.models import lora
from tropism.models.load import load_model

TOKENS = 20
PLAIN = {"checkpointing": False, "dtype": torch.float32}
RANDOM_STATE = 32
"""Bytes at most that a flash kernel keeps of its random generator; 16 or 24, by torch's version."""


UNET = {
    **{"sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8},
    **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 48},
    **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4},
}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72}
VAE = {
    **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
SD3 = {
    **{"sample_size": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "pos_embed_max_size": 24},
    **{"joint_attention_dim": 40, "caption_projection_dim": 32, "pooled_projection_dim": 24, "qk_norm": "rms_norm"},
    **{"dual_attention_layers": (0,)},
}
FLUX = {
    **{"in_channels": 64, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2},
    **{"joint_attention_dim": 40, "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
}
AURA = {
    **{"sample_size": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 8},
    **{"num_attention_heads": 4, "joint_attention_dim": 40, "caption_projection_dim": 32, "pos_embed_max_size": 256},
}
KINDS = {
    **{"unet": (diffusers.UNet2DConditionModel, UNET), "sdxl": (diffusers.UNet2DConditionModel, {**UNET, **SDXL})},
    **{"vae": (AutoencoderKL, VAE), "sd3": (diffusers.SD3Transformer2DModel, SD3)},
    **{"flux": (diffusers.FluxTransformer2DModel, FLUX), "aura": (diffusers.AuraFlowTransformer2DModel, AURA)},
}


def network(kind: str = "unet", checkpointing: bool = False):
    maker, config = KINDS[kind]
    net = maker(**config).requires_grad_(False).eval()
    if checkpointing:
        net.enable_gradient_checkpointing()
    return net


def method(net) -> str:
    return "decode" if isinstance(net, AutoencoderKL) else "forward"


def counted(net, side=16, rows=1, checkpointing=False, dtype=torch.float32) -> Footprint:
    inputs = inputs_of(net, side, side, tokens=TOKENS, rows=rows)
    return count(net, inputs, checkpointing=checkpointing, dtype=dtype, method=method(net))


def real(inputs):
    """Random CPU tensors of the same shapes, the latents requiring grad."""
    made = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: torch.rand(t.shape), inputs)
    next(iter(made.values())).requires_grad_()
    return made


def saved_on_cpu(net, inputs) -> int:
    """Unique bytes that a real forward pass keeps, weights excluded; through checkpoints, those at the boundaries."""
    weights, kept = {w.data_ptr() for w in (*net.parameters(), *net.buffers())}, {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = getattr(net, method(net))(**inputs)[0]
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def allocator_peak(run) -> int:
    """The most bytes torch's CPU allocator had handed out at once inside `run`, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


class Two(nn.Module):
    """Two linear layers with a SiLU between: (B, 8) -> (B, 16) -> (B, 4)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.second(F.silu(self.first(x)))


class Attention(nn.Module):
    """One head of attention over (B, S, 8), with the three projections."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_frozen_linear_layers_by_hand(dtype, size):
    found = count(Two(), {"x": torch.zeros(3, 8)}, checkpointing=False, dtype=dtype)
    assert found.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert found.parameter_bytes == size * found.parameters
    assert found.forward_flops == 2 * 3 * (8 * 16 + 16 * 4)
    assert found.backward_flops == found.forward_flops, "to the input only: no gradient of frozen weights"
    assert found.saved_bytes == size * 3 * 16, "SiLU's input; frozen linear layers keep nothing"
    assert found.trainable == found.block_bytes == 0
    # at the end of the forward: h, silu(h) is freed with its last use, y; the backward adds dy, dsilu, dh
    assert size * 3 * (16 + 16) <= found.peak_bytes <= size * 3 * (16 * 3 + 4 * 2 + 8)


class Blocks(nn.Module):
    """(B, 8) -> (B, 8) through three blocks 8 -> width -> 8 with a SiLU inside; the second one is a block in a block."""

    def __init__(self):
        super().__init__()
        mlp = lambda width: nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 8))
        self.wide, self.inside, self.last = mlp(20), mlp(16), mlp(16)

    def enable_gradient_checkpointing(self, function):
        self.block = function

    def forward(self, x):
        nested = lambda x: self.block(self.inside, F.silu(x))
        return self.block(self.last, self.block(nested, self.block(self.wide, x)))


def test_blocks_by_hand():
    found = count(Blocks(), {"x": torch.zeros(3, 8)}, checkpointing=True, dtype=torch.float32)
    assert found.saved_bytes == 4 * 3 * 3 * 8, "the inputs of three blocks"
    assert found.block_bytes == 4 * 3 * (8 + 16), "the inner block's input and what it keeps: above the wide block's 20"


def test_dropout_is_off():
    found = count(nn.Dropout(0.5).train(), {"input": torch.zeros(3, 8)}, **PLAIN)
    assert found.saved_bytes == 0


def test_attention_by_hand():
    rows, length, width = 2, 32, 8
    found = count(Attention(), {"x": torch.zeros(rows, length, width)}, checkpointing=False, dtype=torch.bfloat16)
    projections = 3 * 2 * rows * length * width * width
    products = 4 * rows * length * length * width
    assert found.forward_flops == projections + products
    assert found.backward_flops == projections + 2.5 * products
    q_k_v_out, log_sums = 4 * 2 * rows * length * width, 4 * rows * length
    assert 0 <= found.saved_bytes - (q_k_v_out + log_sums) <= RANDOM_STATE


def test_attention_is_linear_in_the_sequence():
    def saved(length):
        return count(
            Attention(), {"x": torch.zeros(1, length, 8)}, checkpointing=False, dtype=torch.bfloat16
        ).saved_bytes

    assert saved(8192) / saved(1024) == pytest.approx(8, rel=1e-3)


def test_real_attention_is_left_alone_and_restored():
    q, before = torch.rand(1, 1, 5, 4), F.scaled_dot_product_attention
    with flash_attention():
        assert F.scaled_dot_product_attention is not before
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), before(q, q, q))
    with pytest.raises(ZeroDivisionError), flash_attention():
        _ = 1 / 0
    assert F.scaled_dot_product_attention is before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_bytes_are_those_of_a_real_run(kind, checkpointing):
    net = network(kind, checkpointing)
    found = counted(net, rows=2, checkpointing=checkpointing).saved_bytes
    if checkpointing and kind == "flux":
        found -= 2 * 4 * (TOKENS + 8 * 8) * 16  # cos and sin of the places: held in a tuple, which no hook sees
    # after attention the VAE's layout is channels-last, which GroupNorm undoes on a GPU (and meta), but not on a CPU
    kept = saved_on_cpu(net, real(inputs_of(net, 16, 16, tokens=TOKENS, rows=2)))
    assert found == pytest.approx(kept, rel=0.06 if kind == "vae" else 5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_of_torchs_own_counter(kind):
    net = network(kind).to("meta")
    found, inputs = counted(net), inputs_of(net, 16, 16, tokens=TOKENS)
    next(iter(inputs.values())).requires_grad_()
    with flash_attention(), FlopCounterMode(display=False) as flops:
        out = getattr(net, method(net))(**inputs)[0]
        forward = flops.get_total_flops()
        out.backward(torch.empty_like(out))
    assert (found.forward_flops, found.backward_flops) == (forward, flops.get_total_flops() - forward)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["unet", "vae"])
def test_the_peak_is_what_torchs_allocator_hands_out(kind, checkpointing):
    net = network(kind, checkpointing)
    found = counted(net, 48, 2, checkpointing).peak_bytes
    assert found > (8e6 if checkpointing else 30e6)
    inputs = real(inputs_of(net, 48, 48, tokens=TOKENS, rows=2))
    latents = next(iter(inputs.values()))
    run = lambda: torch.autograd.grad(getattr(net, method(net))(**inputs)[0].sum(), latents)
    assert allocator_peak(run) == pytest.approx(found, rel=0.1)


def test_an_adapter_is_counted_in_its_own_dtype():
    net = network()
    base, half = counted(net), counted(net, dtype=torch.bfloat16)
    lora.attach(net, lora.LoraSettings(rank=2), torch.float32)
    found, mixed = counted(net), counted(net, dtype=torch.bfloat16)
    assert found.trainable == sum(p.numel() for p in lora.factors(net).values())
    assert found.saved_bytes > base.saved_bytes
    assert found.saved_bytes == pytest.approx(saved_on_cpu(net, real(inputs_of(net, 16, 16, tokens=TOKENS))), rel=5e-3)
    assert mixed.parameter_bytes - half.parameter_bytes == 4 * mixed.trainable
    assert mixed.saved_bytes - half.saved_bytes > (found.saved_bytes - base.saved_bytes) / 2, "float32 copies of inputs"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_trade_bytes_for_flops(kind):
    net = network(kind)
    plain, blocks = counted(net, 32), counted(net, 32, checkpointing=True)
    assert blocks.saved_bytes + blocks.block_bytes < plain.saved_bytes
    assert blocks.peak_bytes < plain.peak_bytes
    assert blocks.peak_bytes > max(blocks.saved_bytes, blocks.block_bytes)
    assert blocks.forward_flops == plain.forward_flops
    again = blocks.backward_flops - plain.backward_flops
    assert 0.4 * plain.forward_flops < again <= plain.forward_flops


def test_full_weights_train_and_are_saved_for():
    net = network()
    frozen, full = (
        count(net, inputs_of(net, 16, 16, tokens=TOKENS), checkpointing=False, dtype=torch.float32, full=trains)
        for trains in (False, True)
    )
    assert (frozen.trainable, full.trainable) == (0, full.parameters)
    assert full.saved_bytes > frozen.saved_bytes
    assert full.backward_flops > frozen.backward_flops


def test_costs_grow_with_the_rows():
    net = network()
    one, four = (counted(net, rows=n, checkpointing=True, dtype=torch.bfloat16) for n in (1, 4))
    assert four.forward_flops == 4 * one.forward_flops
    for name in ("saved_bytes", "block_bytes", "peak_bytes"):
        assert getattr(four, name) == pytest.approx(4 * getattr(one, name), rel=0.02)


def test_the_network_is_left_as_it_was():
    net = network().train().requires_grad_(True)
    before = {name: (p.dtype, p.requires_grad, p.clone()) for name, p in net.named_parameters()}
    counted(net, checkpointing=True, dtype=torch.bfloat16)
    assert net.training and not net.is_gradient_checkpointing
    for name, p in net.named_parameters():
        dtype, trains, value = before[name]
        assert (p.dtype, p.requires_grad) == (dtype, trains)
        assert torch.equal(p, value)


def test_nothing_is_computed_or_allocated():
    with torch.device("meta"):
        net = network()
    assert counted(net, side=512).peak_bytes > 2e9
    assert allocator_peak(lambda: counted(net, side=512)) < 1e6


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match="UNet2DModel are not known"):
        inputs_of(diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,) * 4), 8, 8, tokens=4)


def footprint(weights=0, trainable=0, most=0) -> Footprint:
    return Footprint(weights, trainable, weights, 0, 0, 0, 0, most)


def test_the_peak_of_an_update_by_hand():
    update = Update(footprint(1000, 10, 70), footprint(200, 0, 90), (4, 2, 2), (3, 16, 16), batch=6, active=3)
    held = 4 * 6 * ((3 + 5) * 16 + 2 * 768)
    assert peak(update, 2) == 1200 + 4 * 10 * 5 + held + 2 * max(2 * 70, 90)
    assert peak(update, 9) == peak(update, 6), "never more rows than the batch has"


def test_the_larger_of_step_and_decode_counts():
    base = {"latent": (4, 2, 2), "picture": (3, 16, 16), "batch": 4, "active": 1}
    big, small = footprint(most=100), footprint(most=30)
    assert peak(Update(small, big, **base), 1) - peak(Update(small, small, **base), 1) == 100 - 2 * 30
    assert peak(Update(big, small, **base, guided=False), 1) == peak(Update(small, big, **base, guided=False), 1)
    text = Update(small, small, **base, text_bytes=10**6)
    assert peak(text, 1) == 10**6, "the text encoders were there before"
    averaged = Update(footprint(0, 10), small, **base, ema=True, other_bytes=7)
    assert peak(averaged, 1) == peak(Update(footprint(0, 10), small, **base), 1) + 40 + 7


def test_the_peak_of_a_real_sweep():
    model, batch_size, steps, rows = load_model("shapes"), 4, 2, 2
    batch = Batch(["a red square"] * batch_size)
    draw = Draw(0, 0, batch.index)
    cond = model.encode(batch, draw)
    times = model.process.times(steps, cond.shape)
    x, _ = model.start(cond, draw, times)
    dark = lambda images, batch: -images.flatten(1).mean(1)
    chain = Chain(model, dark, batch, cond, draw, tuple(times.tolist()), 3.0, (True,) * steps)
    trained = list(model.trainable().values())
    most = allocator_peak(lambda: sweep(chain, x, lambda r: -r, trained, rows))

    step, decode = counted(model.network, model.shape[-1]), counted(model.vae, model.shape[-1])
    update = Update(step, decode, model.shape, (3, 64, 64), batch_size, steps)
    there_before = step.parameter_bytes + decode.parameter_bytes + 2 * 4 * step.trainable  # Adam has not begun
    assert most == pytest.approx(peak(update, rows) - there_before, rel=0.1)


def test_fits_is_the_largest_that_does():
    need = lambda m: 100 + 10 * m
    assert [fits(need, room, 8) for room in (0, 109, 110, 139, 179, 180, 10**6)] == [0, 0, 1, 3, 7, 8, 8]
    assert room(10) < 10 * 2**30 < room(12)
