import math
import os

import numpy as np
import pytest
import torch

from tropism.core import Stream, UserError, noise
from tropism.scene import gaussians
from tropism.scene.field import nodes
from tropism.scene.gaussians import C0, GaussianField, centres, from_field, from_points, read_ply, write_ply


def some(count, seed=0, dtype=torch.float64):
    x = noise(seed, Stream.EVAL, 7, range(count), 0, 0, (14,))[:, 0].to(dtype)
    return GaussianField(x[:, :3] * 0.4, x[:, 3:6] * 0.4 - 2.2, x[:, 6:10], x[:, 10], x[:, 11:14])


def one(scale=0.2, opacity=0.6, mean=(0.1, -0.2, 0.3), dtype=torch.float64):
    field = from_points(
        torch.tensor([mean], dtype=dtype), torch.tensor([[0.9, 0.5, 0.1]], dtype=dtype), opacity=opacity
    )
    with torch.no_grad():
        field.log_scales.fill_(math.log(scale))
    return field


def ball(points):
    """Red where x is above 0, else blue; twice as dense above as below; nothing outside of .5."""
    inside = (points.norm(dim=1) < 0.5).to(points)
    density = inside * torch.where(points[:, 2] > 0, 20.0, 10.0)
    right = (points[:, :1] > 0).to(points)
    return density, torch.cat([right, torch.zeros_like(right), 1 - right], 1) * inside[:, None]


# ---------------------------------------------------------------------------------------------------- the field


def test_axes_are_rotations_and_a_quarter_turn_about_z_takes_x_to_y():
    axes = some(20).axes()
    torch.testing.assert_close(axes @ axes.mT, torch.eye(3).double().expand(20, 3, 3), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(axes), torch.ones(20).double())
    field = one()
    with torch.no_grad():
        field.rotations.copy_(torch.tensor([[3.0, 0, 0, 3.0]]))
    expected = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]).double()
    torch.testing.assert_close(field.axes()[0], expected, rtol=0, atol=1e-12)


def test_a_ray_through_a_gaussian_loses_what_its_opacity_says():
    field = one(scale=0.1, opacity=0.6)
    along = torch.linspace(-1, 1, 2001).double()
    line = field.means.detach() + along[:, None] * torch.tensor([[0.6, 0.0, 0.8]])
    density, colour = field(line)
    assert 1 - (-torch.trapezoid(density, along)).exp().item() == pytest.approx(0.6, abs=1e-6)
    torch.testing.assert_close(colour[1000], torch.tensor([0.9, 0.5, 0.1]).double())


def test_the_field_is_a_sum_over_gaussians_in_any_pieces(monkeypatch):
    field, points = some(5), noise(1, Stream.EVAL, 7, range(9), 0, 0, (3,))[:, 0].double() * 0.2
    with torch.no_grad():
        field.log_scales.add_(1.0)
    density, colour = field(points)
    expected, light = torch.zeros(9).double(), torch.zeros(9, 3).double()
    for i in range(5):
        s, away = field.scales()[i], points - field.means[i]
        inverse = (field.axes()[i] @ torch.diag(s**2) @ field.axes()[i].T).inverse()
        q = torch.einsum("pi,ij,pj->p", away, inverse, away)
        each = -(1 - field.opacities()[i]).log() / (math.sqrt(2 * math.pi) * s.prod() ** (1 / 3)) * (-q / 2).exp()
        expected, light = expected + each, light + each[:, None] * field.colours()[i]
    torch.testing.assert_close(density, expected, rtol=1e-9, atol=1e-12)
    assert expected.min() > 1e-6
    torch.testing.assert_close(colour, light / expected[:, None], rtol=1e-6, atol=1e-9)
    monkeypatch.setattr(gaussians, "PAIRS", 10)
    torch.testing.assert_close(field(points)[0], density)
    assert field(points[:0])[0].shape == (0,)


def test_a_baked_field_is_the_field_at_the_nodes_of_its_grid():
    """Also where a box reaches out of the cube, and for a Gaussian that is not in it at all."""
    field = some(6)
    with torch.no_grad():
        field.means[0], field.means[1] = torch.tensor([0.98, 0.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    at = nodes(24).double()
    (density, colour), (baked, told) = field(at), field.baked(24)(at)
    assert density.max() > 1 and (density - baked).abs().max() < 6 * 3.4e-4 * field._peaks().max()
    inside = density > 0.1 * density.max()
    torch.testing.assert_close(told[inside], colour[inside], rtol=0, atol=0.01)


def test_colours_are_clamped_and_come_back_inside():
    field = one()
    with torch.no_grad():
        field.dc.copy_(torch.tensor([[3.0, 0.0, -3.0]]))
    assert field.colours().tolist() == [[1.0, 0.5, 0.0]]
    (field.colours() * torch.tensor([1.0, 1.0, -1.0])).sum().backward()  # descending leads back inside
    assert field.dc.grad.tolist() == [[C0, C0, -C0]]
    field.dc.grad = None
    (field.colours() * torch.tensor([-1.0, 1.0, 1.0])).sum().backward()
    assert field.dc.grad.tolist() == [[0.0, C0, 0.0]]


@pytest.mark.parametrize("wrong", ["log_scales", "rotations", "opacity_logits", "dc"])
def test_shapes_that_do_not_fit_are_named(wrong):
    given = {n: getattr(some(3), n).detach() for n in gaussians.SHAPES}
    with pytest.raises(UserError, match=wrong):
        GaussianField(**{**given, wrong: given[wrong][:2]})
    with pytest.raises(UserError, match="at least 1"):
        GaussianField(**{n: v[:0] for n, v in given.items()})


# ---------------------------------------------------------------------------------------------------- starts


def test_gaussians_are_as_wide_as_their_neighbours_are_far():
    line = torch.tensor([[0.0, 0, 0], [0.3, 0, 0], [0.0, 0.4, 0], [0.0, 0, 0.5], [0.9, 0.9, 0.9]])
    field = from_points(line, torch.full((5, 3), 0.25), opacity=0.3)
    assert field.scales()[0].tolist() == pytest.approx([math.sqrt((0.09 + 0.16 + 0.25) / 3)] * 3)
    assert field.opacities().tolist() == pytest.approx([0.3] * 5)
    assert field.colours().flatten().tolist() == pytest.approx([0.25] * 15)
    same = from_points(torch.zeros(4, 3), torch.zeros(4, 3))
    assert bool(same.log_scales.isfinite().all())
    assert from_points(torch.zeros(1, 3), torch.zeros(1, 3)).scales()[0, 0].item() == pytest.approx(0.1)


def test_from_field_draws_points_of_its_density_with_its_colours():
    field = from_field(ball, 600, seed=3)
    density, colour = ball(field.means.detach())
    assert bool((density > 0).all())
    torch.testing.assert_close(field.colours().detach(), colour)
    above = (field.means[:, 2] > 0).float().mean().item()
    assert above == pytest.approx(2 / 3, abs=0.04)  # three standard deviations are .058 without strata
    assert field.means.detach().mean(0)[:2].abs().max() < 0.04
    within = ((field.means.detach() + 1) * 24) % 1  # anywhere in a cell, which is 1 / 24 wide
    assert within.std() == pytest.approx(12**-0.5, abs=0.02)


def test_the_same_seed_starts_the_same_scene():
    a, b, c = (from_field(ball, 40, seed=s) for s in (5, 5, 6))
    assert torch.equal(a.means, b.means) and torch.equal(a.log_scales, b.log_scales)
    assert not torch.equal(a.means, c.means)


def test_starts_that_cannot_be_are_refused():
    nothing = lambda p: (p[:, 0] * 0, p)
    broken = lambda p: (p[:, 0] * torch.nan, p)
    for field in (nothing, broken):
        with pytest.raises(UserError, match="density is 0"):
            from_field(field, 5, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        from_field(ball, 0, seed=0)
    with pytest.raises(UserError, match="opacity"):
        from_points(torch.zeros(2, 3), torch.zeros(2, 3), opacity=1.0)
    with pytest.raises(UserError, match="colours"):
        from_points(torch.zeros(2, 3), torch.zeros(3, 3))


def test_centres_run_over_the_cube_z_fastest():
    cells = centres(4)
    assert cells.shape == (64, 3) and cells.mean().item() == pytest.approx(0, abs=1e-7)
    assert cells[1].tolist() == [-0.75, -0.75, -0.25] and cells[-1].tolist() == [0.75] * 3


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_brings_back_every_bit(tmp_path):
    field = some(7, dtype=torch.float32)
    with torch.no_grad():
        field.dc[0, 0], field.means[0, 0] = 1e-42, -0.0  # a denormal and a signed zero
    write_ply(field, tmp_path / "scene.ply")
    back = read_ply(tmp_path / "scene.ply")
    for name in gaussians.SHAPES:
        mine, theirs = getattr(field, name), getattr(back, name)
        assert torch.equal(mine.view(torch.int32), theirs.view(torch.int32)), name
    assert [p.name for p in tmp_path.iterdir()] == ["scene.ply"]


def test_a_file_is_laid_out_as_viewers_expect(tmp_path):
    field = one(dtype=torch.float32, scale=0.2, opacity=0.6)
    write_ply(field, tmp_path / "scene.ply")
    head, _, body = (tmp_path / "scene.ply").read_bytes().partition(b"end_header\n")
    names = [
        "x",
        "y",
        "z",
        "f_dc_0",
        "f_dc_1",
        "f_dc_2",
        "opacity",
        "scale_0",
        "scale_1",
        "scale_2",
        "rot_0",
        "rot_1",
        "rot_2",
        "rot_3",
    ]
    assert head.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 1",
        *(f"property float {n}" for n in names),
    ]
    values = dict(zip(names, np.frombuffer(body, "<f4").tolist(), strict=True))
    assert [values[n] for n in "xyz"] == pytest.approx([0.1, -0.2, 0.3])
    assert values["f_dc_0"] == pytest.approx(0.4 / 0.28209479) and values["opacity"] == pytest.approx(
        math.log(1.5), abs=1e-6
    )
    assert values["scale_1"] == pytest.approx(math.log(0.2)) and values["rot_0"] == 1.0


def test_another_tools_file_is_read_by_names(tmp_path):
    """Normals, more harmonics and a double, as other writers have them, in another order."""
    field = some(3, dtype=torch.float32)
    names = ["opacity", "nx", "x", "y", "z", *(f"f_dc_{i}" for i in range(3)), *(f"f_rest_{i}" for i in range(9))]
    names += [*(f"rot_{i}" for i in range(4)), *(f"scale_{i}" for i in range(3))]
    row = np.dtype([(n, "<f8" if n == "nx" else "<f4") for n in names])
    table = np.zeros(3, row)
    for i, n in enumerate("xyz"):
        table[n] = field.means[:, i].detach()
        table[f"f_dc_{i}"], table[f"scale_{i}"] = field.dc[:, i].detach(), field.log_scales[:, i].detach()
    for i in range(4):
        table[f"rot_{i}"] = field.rotations[:, i].detach()
    table["opacity"] = field.opacity_logits.detach()
    lines = [f"property {'double' if n == 'nx' else 'float'} {n}" for n in names]
    head = [
        "ply",
        "format binary_little_endian 1.0",
        "comment made elsewhere",
        "element vertex 3",
        *lines,
        "end_header",
        "",
    ]
    (tmp_path / "other.ply").write_bytes("\n".join(head).encode() + table.tobytes())
    back = read_ply(tmp_path / "other.ply")
    assert all(torch.equal(getattr(field, n), getattr(back, n)) for n in gaussians.SHAPES)


DAMAGE = {
    "cut short": lambda data: data[:-3],
    "too long": lambda data: data + b"\0",
    "no end of header": lambda data: data[:60],
    "empty": lambda data: b"",
    "text": lambda data: data.replace(b"binary_little_endian", b"ascii"),
    "big endian": lambda data: data.replace(b"little", b"big"),
    "no opacity": lambda data: data.replace(b"property float opacity\n", b""),
    "a list": lambda data: data.replace(
        b"property float opacity\n", b"property float opacity\nproperty list uchar int f\n"
    ),
    "twice": lambda data: data.replace(b"property float x\n", b"property float x\nproperty float x\n"),
    "faces": lambda data: data.replace(b"end_header", b"element face 0\nend_header"),
    "a count that is none": lambda data: data.replace(b"vertex 4", b"vertex -4"),
    "no count": lambda data: data.replace(b"vertex 4", b"vertex"),
    "no Gaussian": lambda data: data.replace(b"vertex 4", b"vertex 0"),
    "more than there are": lambda data: data.replace(b"vertex 4", b"vertex 99999999999999"),
    "not a number": lambda data: data[:-4] + b"\0\0\xc0\x7f",
    "not finite": lambda data: data[:-4] + b"\0\0\x80\x7f",
    "an unfinished line": lambda data: data.replace(b"property float x\n", b"property\nproperty float x\n"),
}


def test_who_reads_a_file_while_it_is_written_anew_reads_the_old_one(tmp_path):
    file = tmp_path / "scene.ply"
    write_ply(some(2), file)
    before = file.read_bytes()
    with file.open("rb") as reader:
        write_ply(some(5), file)
        assert reader.read() == before
    assert len(read_ply(file)) == 5


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_refused(tmp_path, how):
    write_ply(some(4), tmp_path / "good.ply")
    data = (tmp_path / "good.ply").read_bytes()
    assert DAMAGE[how](data) != data
    (tmp_path / "bad.ply").write_bytes(DAMAGE[how](data))
    with pytest.raises(UserError, match=r"bad\.ply"):
        read_ply(tmp_path / "bad.ply")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="could not be read"):
        read_ply(tmp_path / "none.ply")
    with pytest.raises(UserError, match="could not be written"):
        write_ply(some(2), tmp_path / "none" / "scene.ply")


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "scene.ply"
    write_ply(some(2), file)
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_ply(some(5), file)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["scene.ply"]
