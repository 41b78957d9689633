"""Meshes of fields whose surfaces are known: closed, outwards, where they must be, in their colours; and their files."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from scene.fields import ball, both

from tropism.core import Stream, UserError, noise
from tropism.scene.field import SurfaceField, VoxelField
from tropism.scene.mesh import Mesh, _surface, chamfer, mesh_of, on_surface, write_glb
from tropism.scene.threshold import density_on, floaters, largest_part, level_of, outlooks
from tropism.space.volume import render

pytest.importorskip("skimage")
trimesh = pytest.importorskip("trimesh")
BALL = 4 / 3 * math.pi * 0.5**3


def solid(mesh):
    return trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)


# ---------------------------------------------------------------------------------------------------- the level


def test_a_step_has_its_level_in_the_middle():
    assert level_of(ball(density=60.0), size=24) == pytest.approx(30)


@pytest.mark.parametrize("soft", [0.02, 0.08])
def test_the_solid_has_the_outline_of_the_volume(soft):
    """A ray is half opaque where its mist is ln 2 thick; the level is the density at the nearest point of such a ray to the origin."""
    field = ball(0.5, 30.0, soft=soft)
    level, camera = level_of(field), outlooks()[[0]]
    volume = render(field, camera, 64, samples=96).opacity > 0.5
    cut = lambda p: (1e4 * (field(p)[0] > level), field(p)[1])
    outline = render(cut, camera, 64, samples=96).opacity > 0.5
    assert (volume & outline).sum() / (volume | outline).sum() > 0.97
    fixed = lambda p: (1e4 * (field(p)[0] > 15.0), field(p)[1])
    worse = render(fixed, camera, 64, samples=96).opacity > 0.5
    assert (volume & worse).sum() < (volume & outline).sum(), "half of the highest density is another solid"


def test_a_level_is_the_best_of_all():
    """Against a search by rendering the solids of other levels, over all six views."""
    field = both(ball(0.4, 25.0, (0.2, 0, 0), soft=0.05), ball(0.3, 6.0, (-0.4, 0.2, 0.3), soft=0.05))

    def overlap(level):
        cut = lambda p: (1e5 * (field(p)[0] > level), field(p)[1])
        volume, solid = (render(f, outlooks(), 24, samples=32).opacity > 0.5 for f in (field, cut))
        return ((volume & solid).sum() / (volume | solid).sum()).item()

    best = overlap(level_of(field, size=24, samples=32))
    assert best > 0.9 and all(best >= overlap(level) - 1e-6 for level in np.geomspace(0.05, 20, 12))


def test_an_empty_scene_is_explained():
    for field, much in ((ball(density=0.1), "9%|10%"), (lambda p: (p[:, 0] * 0, p), "0%")):
        with pytest.raises(UserError, match=rf"empty: no view of it is more than ({much}) opaque.*collapsed.*seed"):
            mesh_of(field, 8)
    with pytest.raises(UserError, match="not finite"):
        mesh_of(lambda p: (p[:, 0] / 0, p), 8)
    with pytest.raises(UserError, match="not finite"):
        level_of(lambda p: (p[:, 0] * math.nan, p), size=8)


def test_what_is_thinner_than_the_grid_is_explained():
    with pytest.raises(UserError, match=r"no surface on the grid of 4\^3.*raise the resolution"):
        mesh_of(ball(0.2), 4)
    hollow = SurfaceField(8)
    hollow.grid.data[0] = 1.0
    with pytest.raises(UserError, match="no surface"):
        mesh_of(hollow, 8)


# ---------------------------------------------------------------------------------------------------- the surface


def checked_ball(mesh):
    found = solid(mesh)
    assert mesh.volume() == pytest.approx(BALL, rel=0.03) and found.volume == pytest.approx(mesh.volume(), rel=1e-4)
    assert found.is_watertight and found.is_winding_consistent and found.euler_number == 2
    assert mesh.vertices.norm(dim=1).max() < 0.54 and mesh.vertices.norm(dim=1).min() > 0.46
    outwards = (mesh.normals() * mesh.vertices).sum(1) / mesh.vertices.norm(dim=1)
    assert outwards.min() > 0.6


def test_a_ball_is_a_ball():
    checked_ball(mesh_of(ball(), 64))


def test_a_surface_field_is_meshed_where_its_distance_is_0():
    mesh = mesh_of(SurfaceField(32), 32)
    checked_ball(mesh)
    assert (mesh.vertices.norm(dim=1) - 0.5).abs().max() < 1e-3, "between nodes a distance is nearly straight"


def test_a_ball_beside_the_origin_is_not_mirrored():
    mesh = mesh_of(ball(0.3, centre=(0.4, -0.2, 0.5)), 40)
    assert mesh.vertices.mean(0).tolist() == pytest.approx([0.4, -0.2, 0.5], abs=0.02)


def test_what_fills_the_cube_is_closed_at_its_sides():
    full = lambda p: (200.0 + 0 * p[:, 0], (p + 1) / 2)
    mesh = mesh_of(full, 12)
    assert mesh.volume() == pytest.approx(8, rel=1e-3) and mesh.vertices.abs().max() < 1.001
    found = solid(mesh)
    assert found.is_watertight and found.euler_number == 2 and found.volume > 0


@pytest.mark.parametrize("tied", [False, True])
def test_the_worst_grids_give_closed_meshes(tied):
    """White noise has every ambiguous cube there is, and rounded to whole numbers also ties and nodes on the level."""
    for side, seed in [(8, seed) for seed in range(12)] + [(24, 99)]:
        values = noise(seed, Stream.EVAL, 0, 0, 0, 0, (side,) * 3)[0, 0].numpy()
        vertices, faces = _surface(values.round() if tied else values, 0.0)
        for merged in (False, True):  # readers of files merge equal corners
            found = trimesh.Trimesh(vertices.numpy(), faces.numpy(), process=merged)
            assert found.is_watertight and found.volume > 0


def test_colours_are_those_a_camera_sees():
    def striped(points):  # red above and blue below, black where there is nothing: a colour half outside would be dark
        density = 200.0 * (points.norm(dim=1) < 0.5)
        up = (points[:, 2:] > 0).to(points)
        return density, (density[:, None] > 0) * torch.cat([up, 0 * up, 1 - up], 1)

    mesh = mesh_of(striped, 48)
    top, bottom = mesh.colours[mesh.vertices[:, 2] > 0.1], mesh.colours[mesh.vertices[:, 2] < -0.1]
    assert (top - torch.tensor([1.0, 0, 0])).abs().max() < 0.02
    assert (bottom - torch.tensor([0, 0, 1.0])).abs().max() < 0.02


def test_floaters_are_counted_and_can_be_left_out():
    field = both(ball(0.5, 50.0, (-0.3, 0, 0)), ball(0.2, 50.0, (0.7, 0.5, 0.5)))
    density = density_on(field, 48)
    assert floaters(density, 25.0) == pytest.approx(0.008 / (0.125 + 0.008), rel=0.1)
    assert (
        floaters(density, 25.0, parts=2) == floaters(density, 25.0, parts=3) == 0
    )  # two objects were asked for, or more than there are
    assert floaters(density_on(ball(), 24), 100.0) == 0 and floaters(torch.zeros(4, 4, 4), 1.0) == 0
    two, one = mesh_of(field, 40, level=25.0), mesh_of(field, 40, level=25.0, largest=True)
    assert solid(two).euler_number == 4 and solid(one).euler_number == 2 and solid(one).is_watertight
    assert one.volume() == pytest.approx(BALL, rel=0.05) and one.vertices[:, 0].max() < 0.25
    thin = torch.zeros(3, 3, 3)
    thin[0, :, 0], thin[2, 2, 2] = 1.0, 5.0
    assert largest_part(thin > 0.5, thin)[2, 2, 2] and largest_part(thin > 0.5, thin).sum() == 1, "by mass, not by size"


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_opens_again_with_the_same_bounds_colours_and_front(tmp_path):
    mesh = mesh_of(ball(0.4, centre=(0.3, 0.1, -0.2)), 32)
    path = write_glb(mesh, tmp_path / "new" / "mesh.glb")
    found = trimesh.load(path, force="mesh")
    low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
    turned = lambda v: [v[1].item(), v[2].item(), v[0].item()]  # glTF: y up, the front on +z
    assert found.bounds.tolist() == [turned(low), turned(high)]
    assert found.is_watertight and found.euler_number == 2
    assert found.volume == pytest.approx(mesh.volume(), rel=1e-4)
    coloured = trimesh.load(path, force="mesh", skip_materials=True)  # with a material it keeps no colours of vertices
    linear = torch.tensor(np.asarray(coloured.visual.vertex_colors)[:, :3] / 255).float()
    shown = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    back = torch.tensor(np.asarray(coloured.vertices)).float()[:, [2, 0, 1]]
    assert (shown - (back + 1) / 2).abs().mean() < 0.03, "a vertex's colour tells its place"
    assert b"KHR_materials_unlit" in path.read_bytes() and list(path.parent.iterdir()) == [path]


def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    mesh = mesh_of(ball(), 12, level=100.0)
    path = write_glb(mesh, tmp_path / "mesh.glb")
    old = path.read_bytes()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_glb(mesh_of(ball(0.3), 12, level=100.0), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        write_glb(mesh, path)
    assert path.read_bytes() == old


def test_other_names_and_missing_packages_are_explained(tmp_path, monkeypatch):
    mesh = mesh_of(ball(), 12, level=100.0)
    with pytest.raises(UserError, match=r"ends in .glb, not mesh.obj"):
        write_glb(mesh, tmp_path / "mesh.obj")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(UserError, match=r'Meshes need trimesh.*pip install "tropism\[scene\]"'):
        write_glb(mesh, tmp_path / "mesh.glb")
    monkeypatch.setitem(sys.modules, "skimage.measure", None)
    with pytest.raises(UserError, match=r'scikit-image.*pip install "tropism\[scene\]"'):
        mesh_of(ball(), 12, level=100.0)


# ---------------------------------------------------------------------------------------------------- distances


def square(height, turned=False):
    corners = torch.tensor([[0.0, 0, height], [1, 0, height], [1, 1, height], [0, 1, height]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    return Mesh(corners, faces.flip(1) if turned else faces, torch.zeros(4, 3))


def test_the_distance_of_two_parallel_squares_is_known():
    assert chamfer(square(0.0), square(0.25)) == pytest.approx(0.25, rel=0.01)
    assert chamfer(square(0.0), square(0.25)) == chamfer(square(0.0), square(0.25))
    assert chamfer(square(0.0), square(0.0)) < 0.5 * math.sqrt(1 / 8192) * 1.5
    one_sided = Mesh(
        torch.cat([square(0.0).vertices, square(0.9).vertices]),
        torch.tensor([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]]),
        torch.zeros(8, 3),
    )
    assert chamfer(square(0.0), one_sided) == pytest.approx(0.9 / 2 / 2, rel=0.03), "both ways, in the mean"


def test_points_on_a_surface_are_uniform():
    uneven = Mesh(
        torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, -3, 0]]),
        torch.tensor([[0, 1, 2], [0, 3, 1]]),
        torch.zeros(4, 3),
    )
    found = on_surface(uneven, 4000)
    assert (found[:, 1] < 0).double().mean().item() == pytest.approx(0.75, abs=0.001)
    below = found[found[:, 1] < 0]
    assert below.mean(0).tolist() == pytest.approx([1 / 3, -1, 0], abs=0.03)
    assert bool((below[:, 0] - below[:, 1] / 3 <= 1 + 1e-9).all())


def test_a_trained_field_gives_a_mesh():
    found = solid(mesh_of(VoxelField(24), 40))
    assert found.is_watertight and found.euler_number == 2 and found.volume > 0
