"""The command that puts a reward behind HTTP."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from rich.console import Console

from tropism.core import name_of
from tropism.rewards.identity import identity_of
from tropism.rewards.load import load_rewards
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
    loaded = load_rewards(texts)
    with serving(loaded, identity=identity_of(texts, loaded), host=host, port=port, device=place) as server:
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


def _is_own(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
