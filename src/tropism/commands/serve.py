"""The command that puts a reward behind HTTP."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from tropism.core import name_of
from tropism.rewards.load import load_rewards, split
from tropism.rewards.protocol import TOKEN
from tropism.rewards.serving import Server, serving
from tropism.run.checks import set_up


def serve(
    reward: str | Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "cpu",
    threads: int | None = None,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Answer for a reward over HTTP until Ctrl-C. ready: called with the server once it listens.

    reward: "NAME[=WEIGHT]", or several, whose sum it is. port: 0 is any free one. With TROPISM_REWARD_TOKEN set, only requests with that
    bearer token are answered. Raises UserError for a reward that cannot be loaded and a port that is taken.
    """
    texts, place = [reward] if isinstance(reward, str) else list(reward), str(set_up(device, "float32", threads)[0])
    say = Console(soft_wrap=True, highlight=False, markup=False).print
    with serving(load_rewards(texts), identity=identity(texts), host=host, port=port, device=place) as server:
        if not _is_own(host) and server.token is None:
            say(
                f"Anyone who can reach {host} can use this reward: set {TOKEN} here and where the run is, and put TLS in front."
            )
        say(f"Reward {name_of(server.reward)} listens: --reward {server.url}. Ctrl-C ends it.")
        try:
            if ready:
                ready(server)
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("Stopped.")


def identity(texts: Sequence[str]) -> str:
    """What the rewards are made of, as far as their names tell: the names and weights, and the content of a user's own file."""
    found = []
    for text in texts:
        name, weight = split(text)
        file = Path(name.rpartition(":")[0].removeprefix("old:").removeprefix("old-uint8:")) if ".py:" in name else None
        found.append(
            f"{file.read_text('utf-8', 'replace') if file and file.is_file() else name} {name.rpartition(':')[2]}={weight:g}"
        )
    return "\n".join(found)


def _is_own(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
