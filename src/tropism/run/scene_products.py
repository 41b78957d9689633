"""What a finished scene leaves in its folder: turntable, views, mesh, viewer, numbers and a page."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tropism.run import pictures, report, turntable
from tropism.run.sculpt import VIEWS, Visual, around
from tropism.run.viewer import write_viewer
from tropism.scene import measures
from tropism.scene.gaussians import GaussianField, write_ply
from tropism.scene.mesh import Mesh, mesh_of, write_glb
from tropism.scene.threshold import density_on, floaters, level_of

FINE_MESH = 96
"""Nodes along a side of the grid that the mesh is read off."""
FRAMES, SIZE, LARGER = 48, 96, 128
"""Of the turntable, its pixels, and those of the views on the sheet."""


@dataclass(frozen=True)
class Made:
    """A finished scene and what is told of it. rewards: names of what it was trained on. protocol: how the numbers were measured."""

    prompt: str
    method: str
    model: str
    seed: int
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    visual: Visual | None
    reference: bool
    rewards: Sequence[str]
    numbers: dict[str, float]
    protocol: str
    lines: list[dict[str, Any]]
    parts: int = 1
    """Objects that the scene should have."""


def protocol(size: tuple[int, int], world: bool) -> str:
    """How the numbers of a scene are measured. world: whether a judge of the solids world reads it too."""
    places = around(torch.device("cpu"))
    said = (
        f"Rewards: means and the worst of {VIEWS} views around it at {float(places.elevation[0]):g} degrees, {size[1]} x {size[0]} pixels, "
        f"on white, from a distance of {float(places.distance[0]):g} with a field of view of {float(places.fov[0]):g} degrees."
    )
    if world:
        elevations = " and ".join(f"{e:g}" for e in measures.ELEVATIONS)
        said += (
            f" judge/, truth/ and colour_spread: {measures.AZIMUTHS * len(measures.ELEVATIONS)} views, {measures.AZIMUTHS} around it at "
            f"each of {elevations} degrees, {measures.SIZE} x {measures.SIZE} pixels of 2 x 2 rays. judge/accuracy: the share of them in "
            "which shape and colour are read as the words have them; judge/face: 1 where a face is found from the front, judge/janus: 1 "
            "where there is a second one, 0 also without any; colour_spread: how far the views' colours are apart, 0 at best."
        )
    return f"{said} volume: of the mesh, in a cube of 8; floaters: the share of what is solid outside of the largest piece."


def write(out: Path, field: Any, done: Made) -> Mesh:
    """Write everything; each file is whole or what it was before. Returns the mesh. Raises UserError where there is no surface."""
    solid = field.baked() if isinstance(field, GaussianField) else field
    mesh = mesh_of(solid, FINE_MESH)
    state = {n: v.detach().cpu().contiguous() for n, v in field.state_dict().items()}
    save_file(state, out / "scene.part")
    (out / "scene.part").replace(out / "scene.safetensors")
    if isinstance(field, GaussianField):
        write_ply(field, out / "scene.ply")
    write_glb(mesh, out / "mesh.glb")
    turntable.write_turntable(turntable.turned(field, FRAMES, size=SIZE, samples=48), out)
    views = turntable.turned(field, turntable.SHEET, size=LARGER)
    turntable.write_sheet(views, out / "views.png")
    write_viewer(mesh, out / "viewer.html", sheet=turntable.sheet(views), title=done.prompt)
    if done.visual is not None:
        shown = io.BytesIO()
        pictures.picture(done.visual.picture, LARGER).save(shown, "PNG")
        turntable.write_whole(out / "visual_prompt.png", shown.getvalue())
    pictures.curves(done.lines, out / ".reward.png")
    if (out / ".reward.png").exists():
        (out / ".reward.png").replace(out / "reward.png")
    numbers = done.numbers | shape_of(solid, mesh, done.parts)
    known = {n: v if math.isfinite(v) else None for n, v in numbers.items()}
    told = {"protocol": done.protocol, "trained on": list(done.rewards), **known}
    turntable.write_whole(out / "metrics.json", (json.dumps(told, indent=1) + "\n").encode())
    turntable.write_whole(out / "report.html", page(out, done, numbers).encode("utf-8", "replace"))
    return mesh


def shape_of(field: Any, mesh: Mesh, parts: int = 1) -> dict[str, float]:
    """The mesh's volume in units of the cube, and the share of the density above the surface's level outside of the largest parts."""
    density = density_on(field, turntable.SHEET * 6)
    return {"volume": mesh.volume(), "floaters": floaters(density, level_of(field), parts)}


def page(out: Path, done: Made, numbers: Mapping[str, float]) -> str:
    """The report as text. It holds no script and loads nothing."""
    v, data = done.visual, lambda file: f"data:image/gif;base64,{base64.b64encode(file.read_bytes()).decode()}"
    shown = [] if v is None or done.reference else list(zip(v.candidates, v.rewards.tolist(), strict=True))
    return (
        report.environment_of()
        .get_template("scene.html.jinja")
        .render(
            **{n: getattr(done, n) for n in ("prompt", "method", "model", "seed", "command", "reference", "protocol")},
            turntable=data(out / "turntable.gif"),
            visual=None if v is None else report.small(v.picture),
            candidates=[(report.small(p), r, torch.equal(p, v.picture)) for p, r in shown] if v is not None else [],
            sheet=report.uri(out / "views.png"),
            more=[name for name in ("scene.ply", "turntable.mp4") if (out / name).exists()],
            curve=report.uri(out / "reward.png") if (out / "reward.png").exists() else None,
            numbers=numbers,
            circular=[n for n in done.rewards if any(n in key for key in numbers)],
            config=yaml.safe_dump(done.config, sort_keys=False, allow_unicode=True),
            environment=yaml.safe_dump(done.environment, sort_keys=False, allow_unicode=True),
        )
    )
