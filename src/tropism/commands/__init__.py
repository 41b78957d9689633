"""What the command line does, as Python functions with the same names and arguments."""

from tropism.commands.compare import compare
from tropism.commands.decode import GUIDES, GuidedRun, guide
from tropism.commands.dial import dial
from tropism.commands.distil import Distilled, distil
from tropism.commands.examine import doctor
from tropism.commands.race import plan_from, race
from tropism.commands.reproduce import Reproduced, reproduce
from tropism.commands.scene import SceneRun, scene
from tropism.commands.serve import serve
from tropism.commands.share import export, mix
from tropism.commands.train import METHODS, Run, align, demo, pretrain
from tropism.commands.upscale import upscale

__all__ = [
    "GUIDES",
    "METHODS",
    "Distilled",
    "GuidedRun",
    "Reproduced",
    "Run",
    "SceneRun",
    "align",
    "compare",
    "demo",
    "dial",
    "distil",
    "doctor",
    "export",
    "guide",
    "mix",
    "plan_from",
    "pretrain",
    "race",
    "reproduce",
    "scene",
    "serve",
    "upscale",
]
