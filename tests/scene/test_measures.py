"""What scenes are measured by: the truth against itself, and scenes spoilt in known ways."""

import math

import pytest
import torch

from tropism.scene import measures
from tropism.space.cameras import cameras
from tropism.worlds import solids, solids_features, solids_library
from tropism.worlds.solids import Scene, Solid, parse
from tropism.worlds.solids_features import HEADS
from tropism.worlds.solids_library import averaged

CUBE = parse("a large red cube")


class Reader:
    """A judge that is right: reads the nearest picture of a library seen by the same cameras."""

    def __init__(self, chosen):
        self.library = solids_library.seen_from(chosen, measures.rig())
        self.known = self.library.over(solids.BACKGROUND).flatten(1)

    def log_probs(self, pictures):
        nearest = torch.cdist(pictures.flatten(1), self.known).argmin(1).tolist()
        views = self.library.cameras.views()
        said = [self.library.scenes[int(self.library.which[i])].solids[0].said | {"view": views[i]} for i in nearest]
        said = [s | {"face": ("hidden", "seen")[int(self.library.seen[i])]} for s, i in zip(said, nearest, strict=True)]
        hot = (
            lambda head: torch.tensor([[float(s[head] == v) for v in values] for s in said])
            if (values := HEADS[head])
            else None
        )
        return {head: (0.999 * hot(head) + 1e-4).log() for head in HEADS}


@pytest.fixture(scope="module")
def reader():
    return Reader([CUBE, parse("a large blue cone")])


def two_faced(points):
    """The red cube with a second face behind."""
    density, colour = solids.field(CUBE)(points)
    behind = solids.layers(CUBE)(points * points.new_tensor([-1, 1, 1]))[1][:, 1:]
    return density, colour * (1 - behind)


def plain(points):
    """And without any."""
    density, colour = solids.field(CUBE)(points)
    return density, torch.tensor(solids.COLOURS["red"]).to(points).expand_as(colour)


def with_a_floater(points):
    """And a small ball in a corner, of half its density."""
    density, colour = solids.field(CUBE)(points)
    ball = ((points - 0.8).norm(dim=1) < 0.15).to(points)
    return density + 100 * ball, colour


def test_the_truth_measures_as_the_truth(reader):
    found = measures.measured(solids.field(CUBE), CUBE, truth=CUBE, judge=reader)
    perfect = (
        "iou",
        "volume",
        "ssim",
        "accuracy",
        "accuracy/worst",
        "accuracy/shape",
        "accuracy/colour",
        "accuracy/size",
        "face",
    )
    assert all(found[name] == pytest.approx(1) for name in perfect)
    assert (found["floaters"], found["janus"]) == (0, 0) and found["psnr"] == found["psnr/foreground"] == math.inf
    assert found["colour_spread"] < 0.06  # light from above: the top is brighter
    assert 1 < found["threshold"] < 5  # all of .02 to 200 would do: the middle
    assert found["log_prob/worst"] > -0.01 and found["chamfer"] < 0.03
    assert set(found) == {
        *perfect,
        "chamfer",
        "floaters",
        "janus",
        "psnr",
        "psnr/worst",
        "psnr/foreground",
        "colour_spread",
        "threshold",
        "log_prob",
        "log_prob/worst",
    }


@pytest.mark.parametrize("gain", [0.03, 0.3, 5.0])
def test_the_threshold_finds_the_surface_of_a_soft_field(gain):
    """Density that falls off linearly about a cube's surface, however high it is."""
    edge = lambda p: (0.46 - p.abs().amax(1)) / 0.02
    soft = lambda p: (200 * gain * (edge(p) + 0.5).clamp(0, 1), None)
    cells = measures.cells()
    assert torch.equal(soft(cells)[0] > measures.threshold(soft), cells.abs().amax(1) < 0.46)


def test_neither_haze_nor_a_hot_core_moves_the_surface():
    """The haze is too thin to be seen through its middle; the core would lift a threshold that is a share of the highest density."""
    parts = lambda p: (p.abs().amax(1) < 0.46, p.norm(dim=1) < 0.8, p.norm(dim=1) < 0.1)
    field = lambda p: (sum(d * part for d, part in zip((50.0, 0.3, 2000.0), parts(p), strict=True)), None)
    cells = measures.cells()
    assert torch.equal(field(cells)[0] > measures.threshold(field), parts(cells)[0])


def test_overlap_is_intersection_over_union():
    """A ball 1.2 times as wide has 1.728 times the volume; a cube moved by a cell loses a slice on either side."""
    full = lambda f: f(measures.cells())[0] > 1
    ball = parse("a large red sphere")
    found = measures.overlap(full(lambda p: (solids.field(ball)(p / 1.2)[0], None)), ball)
    assert found["volume"] == pytest.approx(1.2**3, rel=0.03)
    assert found["iou"] == pytest.approx(1 / found["volume"])
    moved = lambda p: (solids.field(CUBE)(p - p.new_tensor([2 / measures.GRID, 0, 0]))[0], None)
    side = round(full(solids.field(CUBE)).sum().item() ** (1 / 3))
    assert measures.overlap(full(moved), CUBE)["iou"] == pytest.approx((side - 1) / (side + 1))


def test_empty_and_foggy_scenes():
    nothing = lambda p: (torch.zeros(len(p)), torch.zeros(len(p), 3))
    found = measures.measured(nothing, CUBE, truth=CUBE)
    assert (found["iou"], found["volume"], found["threshold"]) == (0, 0, math.inf)
    assert math.isnan(found["floaters"]) and math.isnan(found["colour_spread"]) and found["psnr"] < 15
    haze = lambda p: (torch.full((len(p),), 0.01), torch.zeros(len(p), 3))
    assert measures.threshold(haze) == math.inf


def test_floaters_are_what_hangs_apart(reader):
    found = measures.measured(with_a_floater, CUBE, truth=CUBE, judge=reader)
    share = 0.5 * 4 / 3 * math.pi * 0.15**3 / (0.96**3 + 0.5 * 4 / 3 * math.pi * 0.15**3)
    assert found["floaters"] == pytest.approx(share, rel=0.15)
    density = with_a_floater(measures.cells())[0]
    assert measures.floaters(density, density > 1, parts=2) == 0
    two = Scene((Solid("sphere", "red", "large"), Solid("cube", "blue", "large")))
    found = measures.measured(solids.field(two), two, judge=reader)
    assert found["floaters"] == 0 and "accuracy" not in found and "iou" not in found


def test_other_colours_and_other_shapes_are_told_apart(reader):
    blue, red = parse("a large blue cone"), parse("a red solid")
    found = measures.measured(solids.field(blue), CUBE, truth=CUBE, judge=reader)
    assert (found["accuracy"], found["accuracy/shape"], found["accuracy/size"]) == (0, 0, 1)
    assert found["psnr"] < 20 and found["psnr/foreground"] < found["psnr"] and found["psnr/worst"] < found["psnr"]
    assert found["log_prob"] == pytest.approx(math.log(1e-4) * 2 + math.log(0.9991), abs=0.01)
    partial = measures.measured(solids.field(CUBE), red, judge=reader)
    assert partial["accuracy"] == partial["accuracy/colour"] == 1
    assert "accuracy/shape" not in partial and "iou" not in partial
    half = lambda p: (
        solids.field(CUBE)(p)[0],
        torch.where(p[:, :1] > 0, p.new_tensor([[0.9, 0.1, 0.1]]), p.new_tensor([[0.1, 0.2, 0.9]])),
    )
    of = lambda field: measures.colour_spread(measures.seen(field))
    assert of(half) > 0.3 > 5 * measures.colour_spread(measures.seen_truth(CUBE))


def test_a_surface_that_moved_is_that_far_away():
    """A ball of radius .4 and one of .5, about one centre: .1 apart everywhere, beside what a grid of hard edges costs."""
    ball = lambda radius: lambda p: (100.0 * (p.norm(dim=1) < radius), torch.zeros(len(p), 3))
    truth = parse("a large red sphere")
    radius = next(
        r / 100 for r in range(20, 90) if not solids.field(truth)(torch.tensor([[0.0, 0.0, r / 100]]))[0].any()
    )
    same, moved = (measures.surfaces(ball(radius + by), 50.0, truth) for by in (0.0, 0.1))
    assert same < 0.03 and moved == pytest.approx(0.1, abs=0.015)
    assert math.isnan(measures.surfaces(ball(0.0), 50.0, truth))


def test_a_front_view_is_as_near_to_the_prompt_as_it_looks():
    """By the features of the shipped judge: its own picture is nearer than another solid's, whatever the prompt's background."""
    judge, other = solids_features.classifier("judge"), parse("a large blue torus")
    place = cameras([0.0], 15.0)
    for background in ((1.0, 1.0, 1.0), (0.2, 0.5, 0.9)):
        light, opacity = averaged(solids.field(CUBE), place, 32)
        v = (light + (1 - opacity) * torch.tensor(background)[:, None, None])[0]
        assert torch.allclose(measures.border(v), torch.tensor(background), atol=1e-4)
        right, wrong = (measures.prompt_consistency(solids.field(s), v, judge) for s in (CUBE, other))
        assert right == pytest.approx(1, abs=1e-4) and wrong < right - 0.003


def test_psnr_where_the_truth_is():
    """Off by .1 on the left half, where the truth is, and by .5 on the right."""
    left = torch.zeros(16, 1, 32, 32)
    left[..., :16] = 1
    grey = torch.full((16, 3, 32, 32), 0.4)
    truth = measures.Seen(measures.rig(), grey * left, left, grey)
    mine = measures.Seen(measures.rig(), grey, left, grey + 0.5 - 0.4 * left)
    found = measures.likeness(mine, truth)
    assert found["psnr/foreground"] == pytest.approx(20, abs=1e-3)
    overall = -10 * math.log10(0.13)
    assert (found["psnr"], found["psnr/worst"]) == (pytest.approx(overall), pytest.approx(overall))


def test_colours_differ_where_more_than_the_face_does():
    """A black fifth of some views counts for nothing, another colour of half of them for its distance to the mean."""
    light = torch.full((16, 3, 32, 32), 0.4)
    light[::2, :, :6] = 0
    one = measures.Seen(measures.rig(), light, torch.full((16, 1, 32, 32), 0.8), light)
    assert measures.colour_spread(one) < 1e-6
    light[8:, 0] = 0.8
    assert measures.colour_spread(one) == pytest.approx(0.25, abs=1e-6)  # of .5 and 1: light over opacity


def test_one_face_is_no_janus_and_two_are(reader):
    mine = measures.seen(two_faced)
    found = measures.judged(mine, reader, CUBE)
    assert found["janus"] == 1 and found["accuracy"] == 1
    assert measures.judged(measures.seen_truth(CUBE), reader, CUBE)["janus"] == 0
    faceless = measures.judged(measures.seen(plain), reader, CUBE)
    assert (faceless["face"], faceless["janus"], found["face"]) == (0, 0, 1)
    lib = solids_library.seen_from(solids.scenes(size="large")[::6], measures.rig(), size=16)
    front = torch.tensor([v == "front" for v in measures.rig().views()])
    for seen in lib.seen.view(6, -1):
        assert not measures.janus(seen.float(), front, measures.rig().azimuth)


@pytest.mark.parametrize(
    ("faces", "fronts", "one", "two"),
    [
        ([0], [0], True, False),
        ([0, 45, 315], [0], True, False),
        ([315, 45], [], True, False),
        ([0, 135], [], True, True),
        ([45, 270], [], True, True),
        ([0, 180], [], True, True),
        ([], [], False, False),
        ([180], [], False, False),
        ([90, 135], [], False, False),
        ([], [135], False, True),
        ([0], [180], True, True),
        ([0], [90, 45], True, False),
        ([], [225], False, True),
        ([], [270], False, False),
    ],
)
def test_where_faces_may_be(faces, fronts, one, two):
    for turn in (0, 360, -360):
        azimuth = torch.arange(8) * 45.0
        face = torch.tensor([0.9 if a in faces else 0.4 for a in azimuth.tolist()])
        front = torch.tensor([a in fronts for a in azimuth.tolist()])
        assert measures.janus(face, front, azimuth + turn) == two
        assert measures.has_face(face, azimuth + turn) == one


def test_the_rig():
    rig = measures.rig()
    assert len(rig) == 16 and rig.elevation.tolist() == [0.0] * 8 + [30.0] * 8
    assert rig.azimuth[:8].tolist() == rig.azimuth[8:].tolist() == [45.0 * i for i in range(8)]
