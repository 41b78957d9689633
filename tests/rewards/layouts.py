"""Weights in the layouts that authors published, small and random, and plain forward passes through them.

Nothing here uses transformers or Tropism: it is what the converted networks are compared with.
"""

import math

import torch
import torch.nn.functional as F


def drawn(shapes, seed=0):
    """One random tensor a name: matrices that keep the size of what passes, gains near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            gain = name.endswith("weight")
            out[name] = 0.1 * x + (1.0 if gain else 0.0)
        else:
            out[name] = x * (1.2 / math.sqrt(math.prod(shape[1:])))
    return out


def attend(q, k, v, heads, visible=None):
    """Softmax attention; q (B, L, W), k and v (B, M, W); visible (B or 1, L or 1, M) booleans."""
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k, v = split(q), split(k), split(v)
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if visible is not None:
        score = score.masked_fill(~visible[:, None], -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


def dense(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def patches(weight, bias, pixels):
    size = weight.shape[-1]
    tiles = pixels.unfold(2, size, size).unfold(3, size, size)  # (B, 3, h, w, size, size)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return tiles @ weight.flatten(1).T + bias


# ---------------------------------------------------------------------------------------------------- open_clip

VISION, TEXT, SHARED, LONGEST, PATCH, SIDE = 160, 128, 24, 40, 16, 112
LAYERS = 2


def open_clip_shapes(words):
    shapes = {
        "positional_embedding": (LONGEST, TEXT), "text_projection": (TEXT, SHARED), "logit_scale": (),
        "token_embedding.weight": (words, TEXT), "ln_final.weight": (TEXT,), "ln_final.bias": (TEXT,),
        "visual.class_embedding": (VISION,), "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, VISION),
        "visual.proj": (VISION, SHARED), "visual.conv1.weight": (VISION, 3, PATCH, PATCH),
        "visual.ln_pre.weight": (VISION,), "visual.ln_pre.bias": (VISION,),
        "visual.ln_post.weight": (VISION,), "visual.ln_post.bias": (VISION,),
    }  # fmt: skip
    for side, width in (("visual.", VISION), ("", TEXT)):
        for layer in range(LAYERS):
            at = f"{side}transformer.resblocks.{layer}"
            for name, out, inside in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 96, width),
                ("mlp.c_proj", width, 96),
            ):
                shapes |= {f"{at}.{name}.weight": (out, inside), f"{at}.{name}.bias": (out,)}
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
            shapes |= {f"{at}.attn.in_proj_weight": (3 * width, width), f"{at}.attn.in_proj_bias": (3 * width,)}
    return shapes


def open_clip_state(words):
    state = drawn({name: shape for name, shape in open_clip_shapes(words).items() if shape})
    return state | {"logit_scale": torch.tensor(math.log(100.0))}


def open_clip_blocks(state, side, x, heads, visible=None):
    for layer in range(LAYERS):
        at = f"{side}transformer.resblocks.{layer}"
        inside = norm(state, f"{at}.ln_1", x, 1e-5)
        qkv = inside @ state[f"{at}.attn.in_proj_weight"].T + state[f"{at}.attn.in_proj_bias"]
        x = x + dense(state, f"{at}.attn.out_proj", attend(*qkv.chunk(3, -1), heads, visible))
        inside = gelu(dense(state, f"{at}.mlp.c_fc", norm(state, f"{at}.ln_2", x, 1e-5)))
        x = x + dense(state, f"{at}.mlp.c_proj", inside)
    return x


def open_clip_image(state, pixels):
    x = patches(state["visual.conv1.weight"], 0, pixels)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + state["visual.positional_embedding"]
    x = open_clip_blocks(state, "visual.", norm(state, "visual.ln_pre", x, 1e-5), VISION // 80)
    return F.normalize(norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"], dim=-1)


def open_clip_text(state, ids):
    """ids (B, LONGEST) padded with 0 behind the end token, the highest id of all."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    causal = torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[None]
    x = norm(state, "ln_final", open_clip_blocks(state, "", x, TEXT // 64, causal), 1e-5)
    return F.normalize(x[torch.arange(len(x)), ids.argmax(1)] @ state["text_projection"], dim=-1)


# ---------------------------------------------------------------------------------------------------- ImageReward

EYES, READER, INNER = 128, 64, 96


def image_reward_shapes(words):
    v, t = "blip.visual_encoder", "blip.text_encoder"
    shapes = {
        f"{v}.cls_token": (1, 1, EYES), f"{v}.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, EYES),
        f"{v}.patch_embed.proj.weight": (EYES, 3, PATCH, PATCH), f"{v}.patch_embed.proj.bias": (EYES,),
        f"{v}.norm.weight": (EYES,), f"{v}.norm.bias": (EYES,),
        f"{t}.embeddings.word_embeddings.weight": (words, READER),
        f"{t}.embeddings.position_embeddings.weight": (60, READER),
        f"{t}.embeddings.LayerNorm.weight": (READER,), f"{t}.embeddings.LayerNorm.bias": (READER,),
    }  # fmt: skip
    matrices, gains = {}, {}
    for layer in range(LAYERS):
        at = f"{v}.blocks.{layer}"
        matrices |= {f"{at}.attn.qkv": (3 * EYES, EYES), f"{at}.attn.proj": (EYES, EYES)}
        matrices |= {f"{at}.mlp.fc1": (INNER, EYES), f"{at}.mlp.fc2": (EYES, INNER)}
        gains |= {f"{at}.norm1": EYES, f"{at}.norm2": EYES}
        at = f"{t}.encoder.layer.{layer}"
        for kind, width in (("attention", READER), ("crossattention", EYES)):
            matrices |= {f"{at}.{kind}.self.query": (READER, READER), f"{at}.{kind}.self.key": (READER, width)}
            matrices |= {f"{at}.{kind}.self.value": (READER, width), f"{at}.{kind}.output.dense": (READER, READER)}
            gains[f"{at}.{kind}.output.LayerNorm"] = READER
        matrices |= {f"{at}.intermediate.dense": (INNER, READER), f"{at}.output.dense": (READER, INNER)}
        gains[f"{at}.output.LayerNorm"] = READER
    widths = [READER, 40, 24, 16, 8, 1]
    for number, inside, out in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        matrices[f"mlp.layers.{number}"] = (out, inside)
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, width in gains.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def image_reward_state(words):
    extra = {"blip.text_encoder.embeddings.position_ids": torch.arange(60)[None]}  # in the published file, of no use
    return drawn(image_reward_shapes(words)) | extra


def image_reward(state, pixels, ids, mask):
    """Standardised scores (B,) of pixels (B, 3, s, s) and tokens (B, L) with their mask."""
    seen = image_reward_eyes({n.removeprefix("blip.visual_encoder."): x for n, x in state.items()}, pixels)
    text = {n.removeprefix("blip.text_encoder."): x for n, x in state.items()}
    x = text["embeddings.word_embeddings.weight"][ids] + text["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(text, "embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        x = reading(text, f"{at}.attention", x, x, mask.bool()[:, None])
        x = reading(text, f"{at}.crossattention", x, seen, None)
        inside = dense(text, f"{at}.output.dense", gelu(dense(text, f"{at}.intermediate.dense", x)))
        x = norm(text, f"{at}.output.LayerNorm", x + inside, 1e-12)
    x = x[:, 0]
    for number in (0, 2, 4, 6, 7):
        x = dense(state, f"mlp.layers.{number}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def reading(state, at, x, other, visible):
    query = dense(state, f"{at}.self.query", x)
    key, value = (dense(state, f"{at}.self.{name}", other) for name in ("key", "value"))
    out = dense(state, f"{at}.output.dense", attend(query, key, value, READER // 64, visible))
    return norm(state, f"{at}.output.LayerNorm", x + out, 1e-12)


def image_reward_eyes(state, pixels):
    x = patches(state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], pixels)
    x = torch.cat([state["cls_token"].expand(len(x), 1, -1), x], 1) + state["pos_embed"]
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        qkv = dense(state, f"{at}.attn.qkv", norm(state, f"{at}.norm1", x, 1e-6))
        x = x + dense(state, f"{at}.attn.proj", attend(*qkv.chunk(3, -1), EYES // 64))
        inside = gelu(dense(state, f"{at}.mlp.fc1", norm(state, f"{at}.norm2", x, 1e-6)))
        x = x + dense(state, f"{at}.mlp.fc2", inside)
    return norm(state, "norm", x, 1e-6)
