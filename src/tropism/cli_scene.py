"""The command line of 3-D objects: `tropism scene`. Its flags are read off `tropism.commands.scene`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from tropism.flags import plain_command

HELP = {
    "out": "A new folder.",
    "model": "solids-exact or solids (bundled: the exact denoiser and a network), a Stable Diffusion folder or hub id, or file.py:Class.",
    "adapter": "The model's image adapter (IP-Adapter): a folder, or org/name:path/to/file; without one it reads no picture.",
    "reference": "A picture that gives the looks, in place of one that the model draws; the text gives the shape.",
    "reward": "NAME[=WEIGHT] of every view and the text, repeatable; none: no reward (default on solids: solids-text).",
    "consistency": "A reward that compares views with the picture, such as features:SOURCE; none (default on solids: solids-visual).",
    "watch": "A reward to measure only, repeatable (default on solids: solids-judge).",
    "negative": "What it must not look like.",
    "distillation": "sds, csd, isd, vsd or perp-neg.",
    "candidates": "Pictures drawn, of which the reward takes the best; 0: no visual prompt.",
    "strength": "How much the picture counts in front (default 0.5, with solids 2); behind, a quarter of it.",
    "updates": "Of the coarse stage.",
    "fine_updates": "Of the fine stage.",
    "resolution": "Voxels along a side in the coarse stage.",
    "fine_resolution": "Nodes along a side in the fine stage.",
    "fine": "The fine stage: surface (a signed distance), gaussian (also writes scene.ply), voxel or none.",
    "gaussians": "How many, with --fine gaussian.",
    "lr": "Adam's learning rate in the coarse stage.",
    "fine_lr": "Adam's learning rate in the fine stage.",
    "schedule": "Learning rate over a stage: constant, linear or cosine (down to 0).",
    "views": "Pictures an update.",
    "samples": "Points along a ray.",
    "pixels": "Side of a render (default: the model's own).",
    "guidance": "Of the distillation (default: the model's own, with solids 7.5); the picture is drawn at the model's own.",
    "steps": "Denoising steps of drawing the picture (default: the model's own).",
    "weight": "w(t): sds, uniform or fantasia3d.",
    "anneal": "How the times narrow: constant, linear or square-root.",
    "rho": "The reward's share of the distillation's gradient.",
    "rho_visual": "Consistency's share of the distillation's gradient.",
    "noises": "Above 1: the reward needs no gradient; it weighs so many noises of every view, and --rho and --hinge have no say.",
    "temperature": "Of that weighing, in the reward's units.",
    "hinge": "A view worth that much is content.",
    "start": "Share of the run before rewards count.",
    "smoothness": "Weight of total variation.",
    "opacity": "Weight of sparsity.",
    "decided": "Weight against half-transparency.",
    "eikonal": "Weight that keeps a surface's distance a distance.",
    "seed": "Seed of every random draw.",
    "checkpoint_every": "Updates between checkpoints.",
    "resume": "Go on with the scene in --out.",
    "overwrite": "Replace the scene in --out.",
    "device": "cpu or cuda.",
    "dtype": "Of the frozen networks: float32, bfloat16.",
    "threads": "CPU threads.",
}


def command() -> Callable:
    from tropism import commands

    said = Annotated[str, typer.Argument(help="What the object shall be, such as 'a red cube'.")]
    prompt = inspect.Parameter("prompt", inspect.Parameter.KEYWORD_ONLY, annotation=said)
    return plain_command(commands.scene, HELP, prompt, own=True)
