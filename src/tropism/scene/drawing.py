"""What cameras see of any scene: Gaussians are thrown at the picture, fields are added up along rays.

On CUDA devices gsplat draws Gaussians where it is installed, and nerfacc fields that are only looked at. Training keeps to
space.volume, whose samples are drawn by key and whose sums repeat to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropism.scene import accelerated
from tropism.scene.gaussians import GaussianField
from tropism.scene.splat import splat
from tropism.space import volume
from tropism.space.cameras import Cameras
from tropism.space.volume import Field, Rendered


def drawn(
    scene: Field, cameras: Cameras, size: int | tuple[int, int], *, samples: int = 48, jitter: Tensor | None = None
) -> Rendered:
    """Pictures of a scene, differentiable in it. size: pixels, of a side or (height, width).

    samples, jitter: along a ray, see space.volume.render; Gaussians need neither. Cameras lie on the scene's device.
    """
    if isinstance(scene, GaussianField):
        return splat(scene, cameras, size)
    if torch.is_grad_enabled() or not accelerated.takes("nerfacc", "auto", cameras.azimuth):
        return volume.render(scene, cameras, size, samples=samples, jitter=jitter)
    return accelerated.render(
        scene, cameras, size, samples=samples, occupied=accelerated.occupancy(scene, device=cameras.azimuth.device)
    )
