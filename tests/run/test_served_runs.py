"""Training whose reward is a server on the loopback: it goes away and comes back, and the token that it asks for is told nobody."""

import json
import sys

import pytest
import reward_stub
from tiny import tiny_pipeline

from tropism import cli, commands
from tropism.core import UserError
from tropism.rewards import remote
from tropism.rewards.protocol import TOKEN

SECRETS = {
    TOKEN: "s3cret-reward-t0ken",
    "HF_TOKEN": "hf_s3cret",
    "WANDB_API_KEY": "s3cretwandb",
    "OTHER_PASSWORD": "s3cretelse",
}


@pytest.fixture
def server(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with reward_stub.running() as stub:
        stub.token = SECRETS[TOKEN]
        yield stub


@pytest.fixture
def align(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        remote.Remote.__init__, "__kwdefaults__", {**remote.Remote.__init__.__kwdefaults__, "pause": 0.01}
    )
    folder = tiny_pipeline(tmp_path / "model")

    def run(**settings):
        return commands.align(
            "ddpo",
            model=str(folder),
            reward=server.url,
            prompts=["a cat", "a dog"],
            out=tmp_path / "run",
            batch=2,
            eta=1.0,
            evaluate_prompts=1,
            evaluate_every=0,
            checkpoint_every=1,
            doctor=False,
            options={"steps": 2, "guidance": 1.0, "minibatches": 1},
            **settings,
        )

    return run


def test_a_server_that_goes_away_ends_the_run_whole(server, align, tmp_path, capfd):
    """What was trained is kept and the same command goes on; neither folder nor terminal holds a secret of the environment."""
    asked = []

    def respond(number, ids, scores):
        asked.append(number)
        return (
            reward_stub.honest(number, ids, scores) if len(asked) < 4 else (503, {"error": f"gone, {SECRETS[TOKEN]}"})
        )

    server.respond = respond
    with pytest.raises(UserError, match=r"reward server .* failed 4 times: status 503: gone, \*\*\*"):
        align(updates=4)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000001", "step-000002"]
    server.respond = reward_stub.honest
    align(updates=4, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2, 3, 4]
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file()]
    assert {"config.yaml", "env.json", "report.html", "README.md"} <= {f.name for f in files}
    server.health["hash"] = "another"
    with pytest.raises(UserError, match="begun with another reward"):
        align(updates=5, resume=True)
    printed = "".join(capfd.readouterr())
    for secret in SECRETS.values():
        assert not [f for f in files if secret.encode() in f.read_bytes()]
        assert secret not in printed


@pytest.mark.parametrize(
    "query", ["token=abc", "api_key=abc", "sig=abc", "auth=abc", "Password=abc", "access_code=abc&credential=abc"]
)
def test_secrets_in_an_address_stop_a_run_before_they_are_written(query, tmp_path, monkeypatch, capfd):
    address = f"http://127.0.0.1:9/judge?{query}".replace("abc", "s3cret")
    command = ["align", "ddpo", "--model", "shapes", "--reward", address, "--eta", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["tropism", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = "".join(capfd.readouterr())
    assert ended.value.code == 2
    assert "holds a secret" in said and TOKEN in said and "s3cret" not in said
    assert not (tmp_path / "run").exists()
