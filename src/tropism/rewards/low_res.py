"""Consistency with the low-resolution picture: what is restored must shrink back to what was given.

Source: ours, the usual data term of an inverse problem, in its L1 form.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tropism.core import Batch, UserError
from tropism.rewards.frozen import at_least_float32
from tropism.rewards.sources import About


def shrunk(pictures: Tensor, like: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) -> (B, 3, h, w), the size of `like`, each pixel the mean of its k x k. Differentiable.

    Raises UserError unless H = k h and W = k w with one whole number k.
    """
    (height, width), (h, w) = pictures.shape[-2:], like.shape[-2:]
    k = height // h if h else 0
    if k < 1 or (k * h, k * w) != (height, width):
        raise UserError(
            f"Pictures of {width} x {height} pixels are no whole multiple of the {w} x {h} of low_res. Cut low_res to a size that the "
            "model keeps, or restore at a whole scale."
        )
    return F.avg_pool2d(pictures, k)


class LowResConsistency:
    """The reward `lr-consistency`: minus the mean absolute difference of the shrunk picture and batch.low_res, (B,) in [-1, 0].

    low_res: (B, 3, h, w) in [0, 1], made by area means (pictures that were made smaller in another way differ from their own reference,
    too). Noise of standard deviation s in it leaves .8 s. Differentiable. Raises UserError where it is missing or does not fit.
    """

    name, differentiable = "lr-consistency", True
    about = About((-1.0, 0.0), None, "none: there are no weights", "none")

    def __call__(self, samples: Tensor, batch: Batch) -> Tensor:
        low = batch.low_res
        if low is None:
            raise UserError(
                f"The reward {self.name} compares with the low-resolution picture and the batch has none. Give Batch(prompts, "
                "low_res=pictures), (B, 3, h, w) in [0, 1]; it is for models that enlarge pictures."
            )
        if low.ndim != 4 or low.shape[:2] != samples.shape[:2]:
            raise UserError(
                f"low_res is {tuple(low.shape)} for pictures {tuple(samples.shape)}; it must be ({len(samples)}, 3, h, w), one a picture."
            )
        samples = samples.to(at_least_float32(samples))
        return -(shrunk(samples, low) - low.to(samples)).abs().mean((1, 2, 3))
