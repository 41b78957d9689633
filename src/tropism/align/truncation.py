"""Which denoising steps carry a gradient: one function a policy, `(n, rng) -> n booleans` in running order.

n counts the steps that run; the last of them (index n - 1) ends at the picture. A policy draws once an update, from a generator
keyed by (seed, update) alone, so micro-batches and processes share the draw.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial

import numpy as np

from tropism.core import UserError

Policy = Callable[[int, np.random.Generator], list[bool]]


def last(n: int, rng: np.random.Generator, k: int = 1) -> list[bool]:
    """The last k steps: DRaFT-K; k = n is the full chain. Directly Fine-Tuning Diffusion Models, arXiv 2309.17400."""
    return [i >= n - k for i in range(n)]


def suffix_uniform(n: int, rng: np.random.Generator) -> list[bool]:
    """The last K steps, K uniform on 1..n. Aligning Text-to-Image Diffusion Models with Reward Backpropagation, arXiv 2310.03739."""
    return last(n, rng, int(rng.integers(1, n + 1)))


def bernoulli(n: int, rng: np.random.Generator) -> list[bool]:
    """Each step by itself, P(step i) = (i + 1) / n: AlignProp's released code without its chance of an empty set."""
    return [bool(rng.random() < (i + 1) / n) for i in range(n)]


def bernoulli_released(n: int, rng: np.random.Generator) -> list[bool]:
    """Each step by itself, P(step i) = (i + 1) / (n + 1), as AlignProp's released code draws it; may be empty."""
    return [bool(rng.random() < (i + 1) / (n + 1)) for i in range(n)]


def suffix_gaussian(n: int, rng: np.random.Generator) -> list[bool]:
    """The steps from index m on, m = int(N(0.84 n, 0.1 n)) redrawn until 1 <= m < n: the AlignProp authors' later default."""
    if n == 1:
        return [True]
    while True:
        m = int(rng.normal(0.84 * n, 0.1 * n))
        if 1 <= m < n:
            return last(n, rng, n - m)


POLICIES: dict[str, Policy] = {
    f.__name__.replace("_", "-"): f for f in (suffix_uniform, bernoulli, bernoulli_released, suffix_gaussian)
}


def policy(choice: str | int | Policy, n: int) -> Policy:
    """The policy a user names: a number K (the last K steps), "full", a name in POLICIES, or any function of that form.

    Raises UserError for K outside 1..n or an unknown name.
    """
    if callable(choice):
        return choice
    text = str(choice)
    if text == "full":
        return partial(last, k=n)
    if re.fullmatch(r"-?[0-9]+", text):
        if not 1 <= int(text) <= n:
            raise UserError(
                f"Truncation K = {text}, but {n} steps run, so no policy can reach further back than {n} or less "
                f"than 1. Try {min(n, max(1, int(text)))} or more --steps."
            )
        return partial(last, k=int(text))
    if text not in POLICIES:
        near = difflib.get_close_matches(text, POLICIES, 1)
        raise UserError(
            f"Unknown truncation '{text}'."
            + (f" Did you mean '{near[0]}'?" if near else "")
            + f" Choose a number of steps, 'full', or one of: {', '.join(POLICIES)}."
        )
    return POLICIES[text]


def check_policy(choice: str | int | Policy, n: int, draws: int = 200) -> None:
    """Raises UserError for a policy that is not known, has not n entries, or was never active in `draws` draws."""
    rng = np.random.default_rng(0)
    if not any(any(active_steps(choice, n, rng)) for _ in range(draws)):
        raise UserError(
            f"The truncation policy left no step active in {draws} draws, so no gradient could ever reach the weights. "
            "Return at least one True, or choose --truncation suffix-uniform."
        )


def active_steps(choice: str | int | Policy, n: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Draw the active set of one update. Raises UserError if a user's own policy returns anything but n booleans."""
    drawn = tuple(bool(a) for a in policy(choice, n)(n, rng))
    if len(drawn) != n:
        raise UserError(
            f"The truncation policy returned {len(drawn)} entries for {n} steps. Return one boolean a step."
        )
    return drawn
