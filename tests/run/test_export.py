"""Exports from a run folder, of every family; adapters of another base; the hub, against a stub on this machine."""

import json
import shutil

import diffusers
import pytest
import torch
import yaml
from hub_stub import running
from safetensors.torch import load_file, safe_open, save_file
from tiny_families import Folders

from tropism.core import UserError
from tropism.models import lora
from tropism.models.load import load_model
from tropism.models.lora import LoraSettings
from tropism.run import export as exporting
from tropism.run.export import Exported, export, push

FAMILIES = ["sd1", "sdxl", "sd3", "sd3_without_t5", "flux", "auraflow"]
TOKEN = "hf_secret0123456789"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("pipelines"))


def run_of(base, out, settings=LoraSettings(3, 7), size=0.3, **options):
    """A run folder as a finished run leaves it, its adapter stirred."""
    model = load_model(base, lora=settings, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p))
    lora.save(model, out / "lora")
    (out / "config.yaml").write_text(yaml.safe_dump({"model": str(base), "seed": 0}))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def each(request, folders, tmp_path_factory):
    """A run of every family, read only."""
    run = tmp_path_factory.mktemp("of") / "run"
    run_of(folders[request.param], run)
    return folders[request.param], run


@pytest.fixture
def run(folders, tmp_path):
    run_of(folders["sd1"], tmp_path / "run")
    return tmp_path / "run"


def test_the_adapter_itself(each, tmp_path):
    _, run = each
    done = export(run, out=tmp_path / "out" / "here")
    assert done.path == tmp_path / "out" / "here"
    assert done.difference < 1e-5
    assert (done.path / lora.FILE).read_bytes() == (run / "lora" / lora.FILE).read_bytes()
    assert [p.name for p in done.path.parent.iterdir()] == ["here"]


def test_a_kohya_file(each, tmp_path):
    base, run = each
    done = export(run, format="kohya", out=tmp_path / "models" / "loras")
    assert done == Exported(tmp_path / "models" / "loras" / "run.safetensors", None)
    index = json.loads((base / "model_index.json").read_text())
    kind, absent = index["_class_name"], [k for k, v in index.items() if isinstance(v, list) and v[1] is None]
    pipe = getattr(diffusers, kind).from_pretrained(base, **dict.fromkeys(absent))
    if kind != "FluxPipeline":  # whose single blocks diffusers splits at the real widths only
        pipe.load_lora_weights(done.path.parent, weight_name=done.path.name)
        network = getattr(pipe, "unet" if "StableDiffusion" in kind and "3" not in kind else "transformer")
        assert sum(".lora_A" in n for n, _ in network.named_parameters()) == sum(
            ".lora_A" in k for k in load_file(run / "lora" / lora.FILE)
        )
    with safe_open(done.path, "pt") as f:
        header = f.metadata()
    assert header["ss_network_dim"] == header["ss_network_alpha"] == {"FluxPipeline": "Dynamic"}.get(kind, "3")
    assert header["modelspec.title"] == header["ss_output_name"] == "run"
    versions = {"StableDiffusionXLPipeline": "sdxl_base_v1-0", "FluxPipeline": "flux1"}
    assert header.get("ss_base_model_version") == versions.get(kind)
    with pytest.raises(UserError, match=r"is there already.*Choose another --out"):
        export(run, format="kohya", out=done.path)
    assert [p.name for p in done.path.parent.iterdir()] == ["run.safetensors"]


def test_a_fused_pipeline(each, tmp_path):
    base, run = each
    done = export(run, format="fused", out=tmp_path / "fused")
    assert done.difference < 1e-4
    assert not list(done.path.rglob("*.bin"))
    parts = json.loads((base / "model_index.json").read_text())
    made = json.loads((done.path / "model_index.json").read_text())
    assert made.keys() - {"_name_or_path"} == parts.keys()
    before, after = (load_model(f, lora=None).network.state_dict() for f in (base, done.path))
    assert before.keys() == after.keys()
    layers = load_file(run / "lora" / lora.FILE)
    for name, weight in before.items():
        key = f"{'unet' if 'unet' in parts else 'transformer'}.{name.removesuffix('.weight')}.lora_{{}}.weight"
        change = 7 / 3 * product(*(layers[key.format(x)] for x in "AB")) if key.format("A") in layers else 0
        assert (after[name] - (weight.double() + change)).abs().max() < 1e-6


def product(down, up):
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])


def test_a_run_without_t5_is_fused_without_it(folders, tmp_path):
    run_of(folders["sd3"], tmp_path / "run", t5=False)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text() + "t5: false\n")
    fused = export(tmp_path / "run", format="fused", out=tmp_path / "fused").path
    assert not (fused / "text_encoder_3").exists() and (fused / "text_encoder_2").is_dir()
    assert load_model(fused).texts.encoders.text_encoder_3 is None


def test_strength(run, folders, tmp_path):
    """Half a strength is half the change of every weight, in the kohya file and in the fused pipeline."""
    for format in ("kohya", "fused"):
        for name, strength in (("whole", 1.0), ("half", 0.5), ("minus", -2.0)):
            export(run, format=format, out=tmp_path / format / name, strength=strength)
    whole, half, minus = (load_file(tmp_path / "kohya" / n / "run.safetensors") for n in ("whole", "half", "minus"))
    for key, value in whole.items():
        by = (0.5, -2.0) if "lora_up" in key else (1.0, 1.0)
        torch.testing.assert_close((half[key], minus[key]), (by[0] * value, by[1] * value))
    base = load_model(folders["sd1"], lora=None).network.state_dict()
    nets = [load_model(tmp_path / "fused" / n, lora=None).network.state_dict() for n in ("whole", "half", "minus")]
    for key, value in base.items():
        changes = [net[key] - value for net in nets]
        torch.testing.assert_close(changes[1:], [0.5 * changes[0], -2 * changes[0]], rtol=1e-5, atol=2e-6)
    with pytest.raises(UserError, match=r"strength is 0.5.*Leave --strength out"):
        export(run, out=tmp_path / "no", strength=0.5)
    with pytest.raises(UserError, match="strength is nan"):
        export(run, format="kohya", out=tmp_path / "no", strength=float("nan"))


def test_convolutions_and_half_precision(folders, tmp_path):
    run_of(folders["sdxl"], tmp_path / "run", LoraSettings(2, 5, lora.EVERY_LAYER), size=0.05)
    for format in exporting.FORMATS:
        done = export(tmp_path / "run", format=format, out=tmp_path / format, dtype="bfloat16")
        assert done.difference is None or done.difference < 0.1
    weights = load_file(tmp_path / "fused" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_an_adapter_without_a_run_names_its_base(run, folders, tmp_path):
    shutil.copytree(run / "lora", tmp_path / "alone")
    with pytest.raises(UserError, match=r"Nothing beside .*alone says what base.*--model"):
        export(tmp_path / "alone", out=tmp_path / "out")
    for given in (tmp_path / "alone", tmp_path / "alone" / lora.FILE):
        done = export(given, out=tmp_path / f"of-{given.name}", model=str(folders["sd1"]))
        assert (done.path / lora.FILE).read_bytes() == (run / "lora" / lora.FILE).read_bytes()
    assert export(run / "lora", format="kohya", out=tmp_path).path.name == "run.safetensors"


def test_the_bundled_model(tmp_path):
    run_of("shapes", tmp_path / "run", size=0.02)
    assert export(tmp_path / "run", format="fused", out=tmp_path / "fused").difference < 1e-4
    assert export(tmp_path / "run", format="kohya", out=tmp_path / "a.safetensors").path.is_file()


@pytest.mark.parametrize(
    ("adapter", "base", "message"),
    [
        ("sd1", "sdxl", r"Stable Diffusion or SDXL, a U-Net \(text width 16\)"),
        ("sd1", "flux", r"FluxTransformer2DModel.*: 12 of its names.*down_blocks\.0.*a U-Net"),
        ("sd3", "sd1", "UNet2DConditionModel.*transformer_blocks.*Stable Diffusion 3 or Flux"),
        ("flux", "sd3", "single_transformer_blocks.*an adapter of Flux"),
        ("auraflow", "flux", "an adapter of AuraFlow"),
        ("sd2", "sd1", None),
    ],
)
def test_another_family_or_base(folders, tmp_path, adapter, base, message):
    run_of(folders[adapter], tmp_path / "run", LoraSettings(2, targets=("attn2.to_k", "attn.to_q", "to_v")))
    if message is None:  # other heads, but equal names and widths: nothing tells them apart
        assert export(tmp_path / "run", out=tmp_path / "out", model=str(folders[base])).path.exists()
        return
    for format in exporting.FORMATS:
        with pytest.raises(UserError, match=message) as caught:
            export(tmp_path / "run", format=format, out=tmp_path / "out", model=str(folders[base]))
        assert "--model" in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_another_width(run, folders, tmp_path):
    layers = load_file(run / "lora" / lora.FILE)
    wide = {k: torch.cat([v, v], 1) if "attn2.to_k.lora_A" in k else v for k, v in layers.items()}
    save_file(wide, run / "lora" / lora.FILE)
    with pytest.raises(UserError, match=r"attn2\.to_k \(32 wide, not 16\).*text width 32"):
        export(run, format="kohya", out=tmp_path / "out")
    save_file({k.replace("unet.", "text_encoder."): v for k, v in layers.items()}, run / "lora" / lora.FILE)
    with pytest.raises(UserError, match="an adapter of a text encoder"):
        export(run, format="kohya", out=tmp_path / "out")
    export_file = {f"lora_unet_{k}": v for k, v in layers.items()}
    save_file(export_file, run / "lora" / lora.FILE)
    with pytest.raises(UserError, match="kohya's layout, which is not read here"):
        export(run, format="kohya", out=tmp_path / "out")


def test_other_bad_input(run, folders, tmp_path):
    with pytest.raises(UserError, match=r"no format 'koya'.*Did you mean 'kohya'"):
        export(run, format="koya", out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for format in ("diffusers", "fused"):
        with pytest.raises(UserError, match="never written over"):
            export(run, format=format, out=tmp_path / "full")
        with pytest.raises(UserError, match="never written over"):
            export(run, format=format, out=tmp_path / "full" / "note")
    assert (tmp_path / "full" / "note").read_text() == "mine"
    with pytest.raises(UserError, match="cannot be written"):
        export(run, format="kohya", out=tmp_path / "full" / "note" / "deeper")
    for model, message in (("nothing-here", "There is no base model 'nothing-here'"), ("a.py:Own", "own class")):
        with pytest.raises(UserError, match=message):
            export(run, out=tmp_path / "out", model=model)
    (run / "lora" / lora.FILE).rename(run / "lora" / "pytorch_lora_weights.bin")
    with pytest.raises(UserError, match="a pickle, which is never read"):
        export(run, out=tmp_path / "out")
    (tmp_path / "whole" / "weights").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, tmp_path / "whole" / "weights" / "trained.safetensors")
    with pytest.raises(UserError, match=r"trained every weight \(--full\)"):
        export(tmp_path / "whole", out=tmp_path / "out")


def test_a_fusion_that_draws_something_else_is_not_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "fuse_lora", lambda self, lora_scale: None)
    with pytest.raises(UserError, match=r"does not draw what base and adapter draw.*Nothing was kept"):
        export(run, format="fused", out=tmp_path / "fused")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running() as hub:
        yield hub


CARD = "---\nlibrary_name: diffusers\nbase_model: org/base\ntags:\n- lora\n---\n\n# An adapter\n"


@pytest.fixture
def finished(tmp_path):
    """A run folder with everything a run leaves, and a few things it must not send."""
    run, generator = tmp_path / "finished", torch.Generator().manual_seed(0)
    for folder in ("lora", "checkpoints/step-000010", "samples", "logs"):
        (run / folder).mkdir(parents=True)
    (run / "README.md").write_text(CARD, encoding="utf-8")
    (run / "config.yaml").write_text("model: org/base\n")
    save_file({"unet.a.lora_A.weight": torch.randn(4, 8, generator=generator)}, run / "lora" / lora.FILE)
    for name in ("before_after.png", "reward.png", "before.png", "env.json", "metrics.jsonl", "report.html", ".env"):
        (run / name).write_bytes(f"bytes of {name} \x00\xff".encode("latin-1"))
    for name in ("checkpoints/step-000010/state.safetensors", "samples/before.safetensors", "lora/note.txt", "logs/x"):
        (run / name).write_bytes(b"not for you")
    return run


def test_push_sends_these_files_and_no_others(hub, finished):
    url = push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    assert url == f"{hub.url}/org/name"
    names = {"README.md", "config.yaml", "before_after.png", "reward.png", f"lora/{lora.FILE}"}
    assert hub.repositories == {"org/name": {n: (finished / n).read_bytes() for n in names}}
    assert hub.private == {"org/name": True}
    steps = [r.path.split("/")[-1 if "repos" in r.path or "yaml" in r.path else -2] for r in hub.requests]
    assert steps == ["create", "validate-yaml", "preupload", "commit"]


def test_the_token_is_nowhere_but_in_the_authorisation(hub, finished):
    push(finished, "org/name", token=f" {TOKEN}\n", endpoint=hub.url)
    for request in hub.requests:
        assert request.headers.pop("authorization") == f"Bearer {TOKEN}"
        assert TOKEN not in request.path
        assert TOKEN not in str(request.headers)
        assert TOKEN.encode() not in request.body


def test_push_again_and_in_public(hub, finished):
    push(finished, "org/name", token=TOKEN, endpoint=hub.url, private=False)
    (finished / "README.md").write_text(CARD + "More.\n")
    push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    assert hub.repositories["org/name"]["README.md"].endswith(b"More.\n")
    assert hub.private == {"org/name": False}


def test_the_token_of_the_environment(hub, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(finished, "org/name", endpoint=hub.url)
    assert hub.requests[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_nothing_is_sent_unless_asked(hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    for format in exporting.FORMATS:
        export(run, format=format, out=tmp_path / format)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("step", "status", "message"),
    [
        ("create", 401, r"not valid.*hf auth login \(401\)"),
        ("create", 403, r"may not write there.*\(403\)"),
        ("create", 500, r"a fault of its own \(500\). Send it again later"),
        ("validate", 400, r"it says: Invalid metadata in README.md.*Bearer \*\*\*.*\(400\)"),
        ("commit", 400, r"it says: .*Bearer \*\*\*.*\(400\)"),
        ("preupload", 403, r"may not write there.*\(403\)"),
        ("commit", 401, r"not valid.*\(401\)"),
        ("commit", 403, r"may not write there.*\(403\)"),
        ("commit", 404, r"no such place.*\(404\)"),
        ("commit", 429, r"too many requests.*\(429\)"),
        ("commit", 500, r"a fault of its own \(500\)"),
    ],
)
def test_what_the_hub_refuses(hub, finished, step, status, message):
    hub.refuse = {step: status}
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message) as caught:
        push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    said = str(caught.value)
    assert TOKEN not in said and "\n" not in said
    assert f"safe in {finished}" in said
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    assert not hub.repositories.get("org/name")


def test_no_network_and_no_token(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot be reached.*safe in") as caught:
        push(finished, "org/name", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    for token in (None, "", f"{TOKEN}\nwith a line", "hf_ünusable"):
        with pytest.raises(UserError, match=r"no usable token.*hf auth login") as caught:
            push(finished, "org/name", token=token, endpoint="http://127.0.0.1:9")
        assert TOKEN not in str(caught.value)


def test_what_cannot_be_sent(hub, finished):
    for name in ("name", "a/b/c", "../x", "org/na me", ""):
        with pytest.raises(UserError, match=r"no name for a repository.*ORG/NAME"):
            push(finished, name, token=TOKEN, endpoint=hub.url)
    for base in (str(finished), "shapes", "./models/x"):
        (finished / "README.md").write_text(CARD.replace("org/base", base))
        with pytest.raises(UserError, match=r"names the base model.*no id at the hub"):
            push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    (finished / "README.md").unlink()
    with pytest.raises(UserError, match=r"no model card \(README.md\)"):
        push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    shutil.rmtree(finished / "lora")
    with pytest.raises(UserError, match="no adapter"):
        push(finished, "org/name", token=TOKEN, endpoint=hub.url)
    assert hub.requests == []
