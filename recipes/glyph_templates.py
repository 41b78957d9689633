"""Draws the ten digits of the `glyphs` world: DejaVu Sans, 13 px, four times too large and reduced by boxes, at three stroke weights.

    python recipes/glyph_templates.py        writes src/tropism/weights/glyphs/templates.safetensors, 16 kB; a second

The file is bundled because another Pillow or FreeType draws other pixels, and with them another certificate. It holds sums of the 4 x 4
boxes, 0 to 4080, (weight, digit, 16, 16) as int16: exact. Expected of it: digits of different classes are at least .02439 apart in mean
squared error over their shifts (tests/worlds/test_glyphs.py). Thin and bold strokes are the regular one with a quarter of a pixel (one
pixel of the large drawing) taken off or put on all around.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFont, features
from safetensors.torch import save_file
from scipy import ndimage

SLOT, LARGER, PIXELS = 16, 4, 13
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
BUNDLED = Path(__file__).parent.parent / "src" / "tropism" / "weights" / "glyphs" / "templates.safetensors"


def large(digit: int, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """(64, 64) in 0..255, white on black, the ink's box in the middle."""
    side = SLOT * LARGER
    picture = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox((0, 0), str(digit), font=font)
    at = ((side - round(right - left)) // 2 - left, (side - round(bottom - top)) // 2 - top)
    draw.text(at, str(digit), font=font, fill=255)
    return np.asarray(picture)


def reduced(picture: np.ndarray) -> np.ndarray:
    """(16, 16), the sum of every 4 x 4 box."""
    return picture.astype(np.int16).reshape(SLOT, LARGER, SLOT, LARGER).sum((1, 3), dtype=np.int16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUNDLED)
    out = parser.parse_args().out
    font, cross = ImageFont.truetype(str(FONT), PIXELS * LARGER), ndimage.generate_binary_structure(2, 1)
    regular = [large(digit, font) for digit in range(10)]
    thin = [ndimage.grey_erosion(p, footprint=cross) for p in regular]
    bold = [ndimage.grey_dilation(p, footprint=cross) for p in regular]
    found = torch.from_numpy(np.stack([[reduced(p) for p in each] for each in (thin, regular, bold)]))
    made = f"DejaVu Sans of matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}, FreeType {features.version('freetype2')}"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"sums": found.contiguous()}, out, metadata={"made_with": made})
    print(out, tuple(found.shape), made)


if __name__ == "__main__":
    main()
