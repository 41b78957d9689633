"""The picture sizes that a latent model can make."""

from __future__ import annotations

from tropism.core import UserError


def latent_size(
    asked: tuple[int | None, int | None], own: tuple[int, int], factor: int, patch: int, table: int
) -> tuple[int, int]:
    """Latent (height, width) for the pixels asked for; where nothing is asked, the model's own.

    own: latent pixels. factor: pixels a latent pixel's side. patch: latent pixels a token's side.
    table: latent pixels a side that the network has places for, 0 without limit.
    Raises UserError, with the nearest size, for one that the decoder or the network cannot make.
    """
    pixels = [wanted or side * factor for wanted, side in zip(asked, own, strict=True)]
    step, most = factor * patch, factor * table
    if table and max(pixels) > most:
        raise UserError(
            f"The picture size {pixels[0]}x{pixels[1]} is beyond this model's table of places; the limit is {most} pixels a "
            f"side. Try --height {min(pixels[0], most)} --width {min(pixels[1], most)}."
        )
    if any(p % step or p < step for p in pixels):
        near = [max(step, round(p / step) * step) for p in pixels]
        raise UserError(
            f"The picture size {pixels[0]}x{pixels[1]} is not a multiple of {step}, which this model needs "
            f"(height x width). Try --height {near[0]} --width {near[1]}."
        )
    return pixels[0] // factor, pixels[1] // factor
