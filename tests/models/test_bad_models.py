"""Models that cannot be read: what the hub and the disk can answer, each in one clear line."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from tiny_families import BUILDERS, tiny_sd3

from tropism.core import Batch, UserError
from tropism.models.load import load_model
from tropism.rewards.load import load_reward
from tropism.rewards.sources import read_weights

ANSWERS = {"gated": (403, "GatedRepo"), "private": (401, "RepoNotFound"), "bare": (404, "EntryNotFound")}


class Hub(BaseHTTPRequestHandler):
    """A hub on the loopback that refuses: org/gated, org/private, and org/bare, which has no files."""

    def do_GET(self):
        name = next((part for part in self.path.split("/") if part in ANSWERS), "private")
        status, code = ANSWERS[name]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


READ = {"model": load_model, "reward": load_reward, "weights": lambda name: read_weights(name, "head.pth")}


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def asked(monkeypatch):
    """asked(names, home, offline, endpoint) -> {"KIND=NAME": what was said}, with the hub's settings as its variables would set them."""

    def ask(names, home, offline=False, endpoint=constants.ENDPOINT):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        own = {"HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": offline, "ENDPOINT": endpoint}
        for name, value in {**own, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(constants, name, value)
        said = {}
        for text in names:
            kind, _, name = text.partition("=")
            try:
                READ[kind](name)
            except UserError as error:
                said[text] = str(error)
        return said

    return ask


def test_hub_ids_that_refuse(hub, asked, tmp_path):
    """The catalogue's weights are fetched as models are, and told of in the same words."""
    models = [f"model=org/{name}" for name in ANSWERS]
    rewards = ["reward=clip:org/gated", "reward=clip:org/private", "weights=org/gated", "weights=org/private"]
    said = asked([*models, *rewards], tmp_path, endpoint=hub)
    assert "org/gated is gated. Accept its licence" in said["model=org/gated"]
    assert "the hub knows no 'org/private', or it is private" in said["model=org/private"]
    assert "model_index.json" in said["model=org/bare"]
    for name in rewards:
        told = "is gated. Accept its licence" if "gated" in name else "no such repository, or it is private"
        assert told in said[name]
        assert "hf auth login" in said[name]


def cached(home, name, pipeline):
    """A hub id in the cache of `home`, as a download leaves it; returns the folder with its files."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    return Path(shutil.copytree(pipeline, place / "snapshots" / ("0" * 40)))


def test_the_cache_without_a_network(asked, tmp_path):
    """A model that was fetched once is read; of one that was fetched in part, or cut off, the file that is wrong is named."""
    pipeline = tiny_pipeline(tmp_path / "model")
    for name in ("whole", "partial", "cut"):
        folder = cached(tmp_path / "home", f"org/{name}", pipeline)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        if name == "partial":
            weights.unlink()
        elif name == "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
    names = [f"model=org/{name}" for name in ("whole", "partial", "cut", "never")]
    said = asked(names, tmp_path / "home", offline=True)
    assert "model=org/whole" not in said
    partial = said["model=org/partial"]
    assert "unet" in partial or "diffusion_pytorch_model.safetensors" in partial
    assert "could not be read" in said["model=org/cut"]
    assert "model_index.json of 'org/never' could not be fetched" in said["model=org/never"]
    assert "not in the cache" in said["model=org/never"]


def changed(folder, part, **values):
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def mine(tmp_path):
    return tiny_sd3(tmp_path / "model")


@pytest.mark.parametrize("name", [["pipeline_mine", "Mine"], "HunyuanVideoPipeline"])
def test_pipelines_that_nothing_here_reads(mine, name):
    changed(mine, "model_index.json", _class_name=name)
    with pytest.raises(UserError, match="never done here" if isinstance(name, list) else "is a HunyuanVideoPipeline"):
        load_model(mine)


@pytest.mark.parametrize("where", ["model_index.json", "text_encoder/config.json"])
def test_code_of_their_own_is_never_run(mine, where):
    """A part of a class of its own, or a transformers config with an auto_map, is refused before any file of it is opened."""
    (mine / "evil.py").write_text("raise SystemExit('run')")
    own = {"transformer": ["evil", "Net"]} if where == "model_index.json" else {"auto_map": {"AutoModel": "evil.Net"}}
    changed(mine, where, **own)
    with pytest.raises(UserError, match="running code that comes with it"):
        load_model(mine)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_3", "vae", "transformer"])
def test_a_part_that_is_missing(mine, part):
    (mine / part).rename(mine / "elsewhere")
    with pytest.raises(UserError, match=f"has no {part} folder"):
        load_model(mine)


def test_a_tokenizer_without_its_vocabulary(mine):
    for file in (mine / "tokenizer_2").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="tokenizer_2 has no vocabulary"):
        load_model(mine)


def test_a_folder_labelled_as_another_pipeline(mine):
    changed(mine, "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(
        UserError, match=r"says it is a StableDiffusionPipeline, but has .*transformer, which .* and has no unet"
    ):
        load_model(mine)


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("null", "holds no settings")])
def test_a_part_whose_configuration_is_broken(mine, text, says):
    (mine / "transformer" / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        load_model(mine)


def test_a_file_that_is_missing(mine):
    next((mine / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="could not be read"):
        load_model(mine)


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        ("sd3", "FluxPipeline", "but has text_encoder_3, tokenizer_3, which that pipeline does not take"),
        ("sd1", "StableDiffusionXLPipeline", "has no text_encoder_2, tokenizer_2"),
        ("flux", "StableDiffusion3Pipeline", "does not take|has no"),
    ],
)
def test_labels_that_do_not_fit_the_parts(tmp_path, family, name, says):
    folder = BUILDERS[family](tmp_path / "model")
    changed(folder, "model_index.json", _class_name=name)
    with pytest.raises(UserError, match=says):
        load_model(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_that_is_null(mine, part):
    changed(mine, "model_index.json", **{part: [None, None]})
    with pytest.raises(UserError, match=f"has no {part}"):
        load_model(mine)


def test_an_index_that_names_nothing(mine):
    for text in ("[1]", "{}"):
        (mine / "model_index.json").write_text(text)
        with pytest.raises(UserError, match="names no pipeline class"):
            load_model(mine)


def test_settings_that_are_none(mine):
    changed(mine, "vae/config.json", scaling_factor=None)
    with pytest.raises(UserError, match="VAE has no scaling_factor"):
        load_model(mine)
    (mine / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no settings"):
        load_model(mine)


def test_weights_that_lack_a_tensor(mine):
    file = next((mine / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop("norm_out.linear.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"transformer lack 1 tensors \(norm_out\.linear\.weight\)"):
        load_model(mine)


def test_a_tokenizer_that_is_broken(mine):
    (mine / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="could not be read: KeyError"):
        load_model(mine).encode(Batch(["a cat"]))


def test_an_error_is_one_line_and_nothing_else(tmp_path):
    words = ["doctor", "--model", "org/name", "--reward", "jpeg"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-m", "tropism.cli", *words], env=env, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("tropism: model_index.json of 'org/name' could not be fetched")


def test_a_scheduler_of_another_kind(mine):
    changed(mine, "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    with pytest.raises(UserError, match=r"The scheduler is DDIMScheduler.*flow matching"):
        load_model(mine)
