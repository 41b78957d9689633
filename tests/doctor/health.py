"""Set-ups in which nothing is wrong: models, rewards, guidance and methods as people join them. The doctor must be silent."""

from __future__ import annotations

import torch
from faults import colour

from tropism.core import Batch
from tropism.rewards.load import load_rewards

BATCH = Batch(["red cat", "a cat on mars", "red"], negative_prompts=["", "bad", ""])
PLAIN = Batch(BATCH.prompts)
SHAPES = Batch(["three red circles on sand", "two blue squares on sand"])
ROUTED = Batch(SHAPES.prompts, meta=[{"reward": "shapes-count"}, {"reward": ["jpeg", "shapes-count"]}])

HEALTHY = {
    "sd1": ("sd1", {}, colour, 7.5),
    "sd2": ("sd2", {}, colour, 7.5),
    "sdxl": ("sdxl", {}, colour, 5.0),
    "sd3": ("sd3", {}, colour, 3.5),
    "sd3 without t5": ("sd3_without_t5", {}, colour, 3.5),
    "flux": ("flux", {}, colour, 3.5),
    "schnell": ("schnell", {}, colour, 1.0),
    "auraflow": ("auraflow", {}, colour, 3.5),
    "guidance off": ("sd1", {}, colour, 1.0),
    "jpeg": ("sd1", {}, "jpeg", 7.5),
    "stochastic": ("sd1", {"eta": 1.0}, colour, 7.5),
    "stochastic flow": ("sd3", {"eta": 0.7}, colour, 3.5),
    "bfloat16": ("sd1", {"dtype": torch.bfloat16}, colour, 7.5),
    "float64": ("sd2", {"dtype": torch.float64}, colour, 7.5),
    "checkpointing": ("sdxl", {"checkpointing": True}, colour, 5.0),
    "full": ("sd3", {"lora": None, "full": True}, colour, 3.5),
    "shapes, count": ("shapes", {}, "shapes-count", 2.0),
    "shapes, alignment": ("shapes", {}, "shapes-alignment", 2.0),
    "shapes, mixture": ("shapes", {}, ["shapes-count", "jpeg=0.3"], 2.0),
}
"""name: (pipeline, options, reward, guidance), followed by its gradient."""


def as_list(images, batch):
    """A black box: Python numbers, no graph."""
    return [round(x, 4) for x in images.mean((1, 2, 3)).tolist()]


def by_prompt(images, batch):
    """Red for those that ask for it, blue for the others."""
    red = images.new_tensor([float("red" in p) for p in batch.prompts])
    means = images.mean((2, 3))
    return red * means[:, 0] + (1 - red) * means[:, 2]


BRIGHT = {"eta": 1.0}
MORE = {
    "own model": ("own", {}, colour, 3.0, True, PLAIN),
    "own model, unguided": ("own", {}, by_prompt, 1.0, True, PLAIN),
    "own model, black box": ("own", {}, as_list, 3.0, False, PLAIN),
    "shapes, jpeg": ("shapes", {}, "jpeg", 2.0, True, SHAPES),
    "shapes, aesthetic": ("shapes", {}, "shapes-aesthetic", 2.0, True, SHAPES),
    "shapes, incompressibility": ("shapes", {}, "incompressibility", 1.0, True, SHAPES),
    "shapes, product": ("shapes", {}, "product(shapes-count,shapes-aesthetic)", 2.0, True, SHAPES),
    "shapes, minimum": ("shapes", {}, "minimum(shapes-alignment,shapes-aesthetic)", 2.0, True, SHAPES),
    "shapes, hinge": ("shapes", {}, "hinge(jpeg,-1)", 2.0, True, SHAPES),
    "shapes, target": ("shapes", {}, "target(jpeg,-1.5)", 2.0, True, SHAPES),
    "shapes, routed": ("shapes", {}, ["shapes-count", "jpeg=0.3"], 2.0, True, ROUTED),
    "shapes, ddpo of bytes": ("shapes", BRIGHT, "jpeg-bytes", 2.0, False, SHAPES),
    "shapes, ddpo of a list": ("shapes", BRIGHT, as_list, 2.0, False, SHAPES),
    "shapes, high guidance": ("shapes", {}, "shapes-count", 7.5, True, SHAPES),
    "shapes, full": ("shapes", {"lora": None, "full": True}, "shapes-count", 2.0, True, SHAPES),
    "sd3, by prompt": ("sd3", {}, by_prompt, 3.5, True, BATCH),
    "flux, jpeg": ("flux", {}, "jpeg", 3.5, True, PLAIN),
    "sdxl, ddpo": ("sdxl", BRIGHT, as_list, 5.0, False, BATCH),
    "sd3, flow-grpo": ("sd3", {"eta": 0.7}, as_list, 3.5, False, BATCH),
    "chroma": ("chroma", {}, colour, 3.5, True, BATCH),
}
"""name: (pipeline or "own", options, reward, guidance, whether the reward's gradient is used, prompts)."""


def reward_of(reward):
    """A callable as it is, names loaded."""
    return reward if callable(reward) else load_rewards([reward] if isinstance(reward, str) else reward)


def batch_of(source):
    return SHAPES if source == "shapes" else BATCH
