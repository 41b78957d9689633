import math
import sys
import types

import pytest
import torch
from tiny_detector import tiny_dino
from tiny_watchers import tiny_segformer, tiny_yolos
from torch import nn

from tropism.core import UserError
from tropism.restore.proxies import features, proxy
from tropism.rewards.feature_distance import LPIPS_LIKE, FeatureDistance
from tropism.rewards.towers import Tower
from tropism.worlds import glyphs

READER = """
from tropism.worlds import glyphs
from tropism.worlds.glyphs_reading import read

def digits(picture):
    return glyphs.captions(read(picture[None]))[0]
"""


@pytest.fixture(scope="module")
def scenes():
    """The references and, of every second one, another scene as the result."""
    x = glyphs.render(glyphs.scenes(range(4), seed=3))
    y = x.clone()
    y[::2] = x.roll(1, 0)[::2]
    return y, x


@pytest.fixture
def here(tmp_path):
    for name, make in (("dino", tiny_dino), ("segformer", tiny_segformer), ("yolos", tiny_yolos)):
        make().save_pretrained(tmp_path / name)
    for name in ("segformer", "yolos"):  # published ones see 512 pixels
        (tmp_path / name / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    (tmp_path / "mine.py").write_text(READER)
    return tmp_path


def test_every_proxy_is_at_its_best_on_the_reference_itself(here, scenes):
    """Check 7 of the specification, for measures: PSNR infinite, distances 0, agreement whole; and all see another scene."""
    best = {
        "psnr": math.inf, "ssim": 1, f"feature-distance:{here}/dino?size=56": 0, f"lpips-like:{here}/dino?size=56": 0,
        f"segments:{here}/segformer": 1, f"text:{here}/mine.py:digits": 0, f"boxes:{here}/yolos": 0,
    }  # fmt: skip
    for name, value in best.items():
        found = proxy(name)
        assert found.name == name
        result = found(*scenes)
        assert result.shape == (4,) and not result.requires_grad
        assert result[1::2].tolist() == pytest.approx([value] * 2, abs=1e-6), name
        if not name.startswith("boxes"):  # random boxes do not move
            assert ((result[::2] < value) == found.higher_is_better).all() and (result[::2] != value).all(), name


def test_a_distance_made_in_python(scenes):
    distance = FeatureDistance(Tower(tiny_dino(), size=56), **LPIPS_LIKE, name="mine")
    found = features(distance)
    assert (found.name, found.higher_is_better) == ("mine", False)
    torch.testing.assert_close(found(*scenes), distance.distance(*scenes))


def test_names_that_do_not_exist(here):
    for name in ("pnsr", "ssim:a", "segments:", "text", "text:", "piq:brisque", "lpips:alex"):
        with pytest.raises(UserError, match=rf"There is no proxy '{name}'\. .*Known are psnr, ssim, feature-distance"):
            proxy(name)
    with pytest.raises(UserError, match=r"Did you mean psnr\?"):
        proxy("pnsr")
    with pytest.raises(UserError, match="holds no semantic segmenter: its model_type is 'yolos'"):
        proxy(f"segments:{here}/yolos")
    with pytest.raises(UserError, match="holds no object detector: its model_type is 'dinov2'"):
        proxy(f"boxes:{here}/dino")


def test_packages_that_need_torchvision(scenes, monkeypatch):
    """Stand-ins of their form; the real ones were compared once, by hand (LOG)."""
    for name in ("lpips", "piq"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            UserError, match=rf"needs the package {name}, which needs torchvision.*Tropism installs neither"
        ):
            proxy({"lpips": "lpips", "piq": "piq:fsim"}[name])

    class Alex(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert (net, verbose) == ("alex", False)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            assert -1 <= x.min() < -0.9 and not self.training
            return self.scale * (x - y).abs().mean((1, 2, 3), keepdim=True)

    def gmsd(x, y, data_range, reduction):
        assert (data_range, reduction) == (1.0, "none") and x.max() <= 1
        return (x - y).abs().mean((1, 2, 3))

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Alex))
    monkeypatch.setitem(sys.modules, "piq", types.SimpleNamespace(gmsd=gmsd))
    wanted = (scenes[0] - scenes[1]).abs().mean((1, 2, 3))
    torch.testing.assert_close(proxy("lpips")(*scenes), 2 * wanted)
    torch.testing.assert_close(proxy("piq:gmsd")(*scenes), wanted)
    assert not proxy("piq:gmsd").higher_is_better and not proxy("lpips").higher_is_better
