"""The command line: each command calls one public function of the same name and arguments in `tropism.commands`.

A method's flags are its function's keyword arguments, read off its signature.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from tropism import cli_restore, cli_scene
from tropism.flags import HELP, HIDDEN, command_line, flags, number, optional, plain_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Align diffusion models to reward functions.",
)
align_app = typer.Typer(no_args_is_help=True, help="Change a model's weights so that its samples score higher.")
app.add_typer(align_app, name="align")
guide_app = typer.Typer(no_args_is_help=True, help="Draw samples that score higher, without changing a weight.")
app.add_typer(guide_app, name="guide")
app.add_typer(cli_restore.app, name="hallucination")


def _config(context: typer.Context, value: Path | None) -> Path | None:
    """Take a run's config.yaml as defaults; flags on the command line win."""
    if value is None:
        return None
    from tropism.core import UserError

    try:
        settings = yaml.safe_load(value.read_text("utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration {value} cannot be read: {error}. Give the config.yaml of a run.") from error
    if not isinstance(settings, dict):
        raise UserError(f"The configuration {value} holds no settings. Give the config.yaml of a run.")
    own = settings.pop("options", None) or {}
    if not isinstance(own, dict) or not all(isinstance(k, str) for k in {**settings, **own}):
        raise UserError(f"The configuration {value} has settings without names. Give the config.yaml of a run.")
    flat = {**settings, **own}
    known = {p.name for p in context.command.params}
    if unknown := sorted(set(flat) - known - {"method", "options"}):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f" Did you mean '{near[0]}'?" if near else " Take it out."
        raise UserError(
            f"The configuration {value} has settings that this command does not know: {', '.join(unknown)}.{hint}"
        )
    context.default_map = {k: v for k, v in flat.items() if v is not None}
    return value


def _method_command(command: Callable, method: str, function: Callable, bound: tuple[str, ...]) -> Callable:
    """`align METHOD` or `guide METHOD`: the command's own flags, then the method's."""
    common, own = flags(command, HIDDEN, HELP), flags(function, bound, HELP)

    def run(config: Path | None = None, **values: Any) -> None:
        given = {p.name: number(values.pop(p.name)) for p in own}
        command(method, options={n: v for n, v in given.items() if v is not None}, command=command_line(), **values)

    own_defaults = [p.replace(default=None, annotation=optional(p.annotation)) for p in own]
    config = inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config", is_eager=True, callback=_config, help="A config.yaml whose settings become defaults."
            ),
        ],
    )
    run.__signature__ = inspect.Signature([config, *common, *own_defaults])  # type: ignore[attr-defined]
    run.__doc__ = (function.__doc__ or method).splitlines()[0]
    return run


def _register(name: str) -> None:
    """The commands whose flags are read off their functions, which takes importing them."""
    app.command("doctor")(_doctor_command() if name == "doctor" else _doctor)
    if name == "upscale":
        from tropism import commands

        photos = Annotated[str, typer.Argument(help="A picture, or a folder of pictures.")]
        source = inspect.Parameter("source", inspect.Parameter.KEYWORD_ONLY, annotation=photos)
        app.command("upscale")(plain_command(commands.upscale, HELP, source))
    else:
        app.command("upscale", help="Enlarge photographs, and say what may be made up.")(_doctor)
    app.command("scene", help="Make a 3-D object from text.")(cli_scene.command() if name == "scene" else _doctor)
    app.command("dial", help="Turn an adapter up or down, or mix two.")(_dial_command() if name == "dial" else _doctor)
    if name == "hallucination":
        cli_restore.register()
    if name == "align":
        from tropism import commands
        from tropism.run.request import BOUND

        for method in commands.METHODS:
            align_app.command(method)(_method_command(commands.align, method, commands.METHODS[method], BOUND))
        align_app.command("distil")(plain_command(commands.distil, HELP))
    if name == "guide":
        from tropism import commands
        from tropism.commands.decode import BOUND as OF_GUIDE

        for method, function in commands.GUIDES.items():
            guide_app.command(method)(_method_command(commands.guide, method, function, OF_GUIDE))


def _dial_command() -> Callable:
    from tropism import commands

    named = Annotated[list[str], typer.Argument(help="A run folder of align, or two to mix.")]
    return plain_command(
        commands.dial, HELP, inspect.Parameter("runs", inspect.Parameter.KEYWORD_ONLY, annotation=named)
    )


def _doctor() -> None:
    """What is installed; will this model and reward learn, proved in seconds; what fits in memory."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help=HELP["out"])] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help=HELP["seed"])] = 0,
    resume: Annotated[bool, typer.Option("--resume", help=HELP["resume"])] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=HELP["overwrite"])] = False,
    threads: Annotated[int | None, typer.Option(help=HELP["threads"])] = None,
) -> None:
    """The main job on the bundled model: no network, a minute or two on a laptop."""
    from tropism import commands

    commands.demo(out, seed=seed, resume=resume, overwrite=overwrite, threads=threads, command=command_line())


def _doctor_command() -> Callable:
    from tropism import commands

    def run(**values: Any) -> None:
        found = commands.doctor(**values)
        raise typer.Exit(1 if any(f.level == "fault" for f in found) else 0)

    run.__signature__ = inspect.Signature(flags(commands.doctor, (), HELP))  # type: ignore[attr-defined]
    run.__doc__ = _doctor.__doc__
    return run


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder, or an adapter's.")],
    format: Annotated[
        str, typer.Option(help="diffusers, kohya (ComfyUI, A1111), or fused (a pipeline).")
    ] = "diffusers",
    out: Annotated[Path | None, typer.Option(help="A new folder; for kohya a .safetensors file.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model (default: the run's).")] = None,
    strength: Annotated[float, typer.Option(help="How much of the adapter (kohya, fused).")] = 1.0,
    push: Annotated[str | None, typer.Option(help="ORG/NAME: send adapter and model card to the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for everyone to see.")] = False,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "cpu",
    dtype: Annotated[str, typer.Option(help=HELP["dtype"])] = "float32",
) -> None:
    """Take a finished adapter elsewhere: diffusers, ComfyUI, fused into its base, or the hub."""
    from tropism import commands

    options = {"model": model, "strength": strength, "push": push, "public": public, "device": device, "dtype": dtype}
    typer.echo(commands.export(run, format=format, out=out, **options))


@app.command()
def mix(
    adapter: Annotated[list[str], typer.Option(help="FOLDER=WEIGHT of a finished run or adapter, repeatable.")],
    out: Annotated[Path, typer.Option(help="Where the mixed adapter goes.")],
    model: Annotated[str | None, typer.Option(help="The base model (default: the runs').")] = None,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "cpu",
    dtype: Annotated[str, typer.Option(help=HELP["dtype"])] = "float32",
) -> None:
    """Mix finished adapters of one base model by weight: their B A products are summed."""
    from tropism import commands

    typer.echo(commands.mix(adapter, out=out, model=model, device=device, dtype=dtype))


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="A new folder for the page; with methods, one to go on with too.")],
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run folders of guide, align and align distil; a guided one first.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Methods to run at one budget: a YAML file (docs/compare.md).")
    ] = None,
    method: Annotated[list[str], typer.Option(help="A method to run, with the search of six; repeatable.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="With --method (default: shapes): " + HELP["model"])] = None,
    reward: Annotated[list[str], typer.Option(help="With --method: " + HELP["reward"])] = [],  # noqa: B006
    gold: Annotated[str | None, typer.Option(help="With --method: the measure that settles (default: reward).")] = None,
    watch: Annotated[list[str], typer.Option(help="With --method: " + HELP["watch"])] = [],  # noqa: B006
    prompts: Annotated[str | None, typer.Option(help="With --method: " + HELP["prompts"])] = None,
    budget: Annotated[list[str], typer.Option(help="With --method, of a run: " + HELP["budget"])] = [],  # noqa: B006
    seeds: Annotated[int | None, typer.Option(help="With --method: test seeds (default: 5).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=HELP["overwrite"])] = False,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "cpu",
    dtype: Annotated[str, typer.Option(help=HELP["dtype"])] = "float32",
    threads: Annotated[int | None, typer.Option(help=HELP["threads"])] = None,
) -> None:
    """Finished runs on one page, with what each cost; or methods, run at one budget with the same search and several seeds."""
    from tropism import commands

    how = {"device": device, "dtype": dtype, "threads": threads}
    if plan is None and not method:
        commands.compare(runs or [], out=out, overwrite=overwrite, command=command_line(), **how)
        return
    asked = commands.plan_from(plan, method, model, reward, gold, watch, prompts, budget, seeds)
    typer.echo(f"See {commands.race(asked, out=out, command=command_line(), **how)}")


@app.command()
def serve(
    reward: Annotated[list[str], typer.Option(help=HELP["reward"])],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any free one.")] = 8000,
    device: Annotated[str, typer.Option(help=HELP["device"])] = "cpu",
    threads: Annotated[int | None, typer.Option(help=HELP["threads"])] = None,
) -> None:
    """A reward behind HTTP, for --reward http://HOST:PORT. Set TROPISM_REWARD_TOKEN on both sides to ask for a token."""
    from tropism import commands

    commands.serve(reward, host=host, port=port, device=device, threads=threads)


@app.command()
def pretrain(
    world: Annotated[str, typer.Argument(help="shapes, glyphs, solids, dna or molecules.")] = "shapes",
    out: Annotated[Path, typer.Option(help="Where checkpoints and the finished networks go.")] = Path("runs/pretrain"),
    quick: Annotated[bool, typer.Option(help="A few updates of every stage, to see that it works.")] = False,
    threads: Annotated[int | None, typer.Option(help=HELP["threads"])] = None,
) -> None:
    """Train the bundled networks from nothing; run it again to go on where it stopped."""
    from tropism import commands

    commands.pretrain(world, out=out, quick=quick, threads=threads)


@app.command()
def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A committed recipe, or a .yaml file of one; none: list them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new folder for the runs, the table and the curves.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,2 (default: all that have a reference).")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; the references were made with 1.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in --out.")] = False,
    write: Annotated[
        Path | None, typer.Option(help="Instead of comparing, write the recipe with the new curves as its reference.")
    ] = None,
) -> None:
    """Repeat a committed result and compare it with its reference curves: PASS (exit code 0) or FAIL (1)."""
    from tropism import commands

    done = commands.reproduce(name, out=out, seeds=seeds, threads=threads, resume=resume, write=write)
    raise typer.Exit(0 if done is None or write or done.passed else 1)


def main() -> None:
    """Entry point: user errors become one clear message and exit code 2, interruptions 130 or 143."""
    from tropism.core import UserError
    from tropism.run.signals import Interrupted

    _register(next(iter(sys.argv[1:]), ""))
    try:
        app()
    except UserError as error:
        typer.echo(f"tropism: {error}", err=True)
        sys.exit(2)
    except Interrupted as stop:
        typer.echo(f"tropism: {stop}", err=True)
        sys.exit(stop.code)


if __name__ == "__main__":
    main()
