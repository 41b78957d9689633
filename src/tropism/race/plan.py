"""What is compared: objectives, methods with the configurations that are tried for each, one budget, seeds to tune on and to test on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tropism.core import UserError
from tropism.run import ledger
from tropism.run.checks import known

LOWER_IS_BETTER = ("drift", "jpeg_kB")


@dataclass(frozen=True)
class Objective:
    """What is trained on and what it is judged by.

    reward: what follows --reward. gold: the column of an evaluation that settles which method is better, such as "parser/count" or
    "watch/NAME"; "reward" where there is nothing better. watch: rewards that are measured and not trained on. prices: of a unit of
    `run.ledger`'s counts in seconds, for a budget of "priced" ones. longer: {entry: factor}, as a plan's, of test runs on this objective.
    """

    name: str
    reward: tuple[str, ...]
    gold: str = "reward"
    watch: tuple[str, ...] = ()
    prices: Mapping[str, float] = field(default_factory=dict)
    longer: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A method under a name of its own. settings: of all its runs. search: the configurations that are tried, each over `settings`."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    search: tuple[Mapping[str, Any], ...] = ({},)


@dataclass(frozen=True)
class Plan:
    """A comparison. budget: {axis of `run.ledger`: limit} of a test run; tuning runs have `tuning_share` of it.

    settings: of all runs. prompts_each: held-out pictures a prompt. points: evaluations a test run. longer: {entry: factor} on the
    budget of its runs, for methods that are to be followed beyond it; they are compared at the budget all the same.
    level_of: the method by whose last level the costs of all are told. keep_best: a run stands, at every point, for the weights of its
    best evaluation so far by the held-out reward, as `align` hands them over; False: for its last ones.
    """

    model: str
    objectives: tuple[Objective, ...]
    entries: tuple[Entry, ...]
    budget: Mapping[str, float]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100,)
    tuning_share: float = 0.5
    points: int = 5
    prompts_each: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    longer: Mapping[str, float] = field(default_factory=dict)
    level_of: str = ""
    keep_best: bool = False

    def __post_init__(self):
        for name in (x.name for x in (*self.objectives, *self.entries)):
            if not re.fullmatch(r"\w[\w.+ -]*", name):
                raise UserError(
                    f"{name!r} cannot be the name of a folder. Name objectives and methods in letters and digits."
                )
        _check_seeds(self.seeds, self.tuning_seeds)
        if not (self.objectives and self.entries and self.seeds and self.budget):
            raise UserError(
                "A comparison needs at least one objective, one method, one seed and a budget. Add what is missing."
            )
        for objective in self.objectives:
            _check_objective(objective, self.budget)
        for name in (*self.longer, *(n for o in self.objectives for n in o.longer), *filter(None, [self.level_of])):
            known(name, [e.name for e in self.entries], "method of the plan")
        _check_longer((self.longer, *(o.longer for o in self.objectives)))
        if not 0 < self.tuning_share <= 1:
            raise UserError(f"tuning_share is {self.tuning_share}; it must lie in (0, 1]. Try 0.5.")

    @property
    def axis(self) -> str:
        """The axis that the budget is on; the first of several."""
        return next(iter(self.budget))

    def tuned(self, entry: Entry) -> bool:
        return len(entry.search) > 1


def read(file: Path | str) -> Plan:
    """The plan of a YAML file. Raises UserError for what cannot be read or is not known."""
    try:
        found = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"The plan {file} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"The plan {file} holds no settings. See docs/compare.md for one.")
    return plan_of(found)


def plan_of(found: Mapping[str, Any]) -> Plan:
    """The plan of a mapping as it stands in a file. Raises UserError for unknown names, and for what is missing."""
    _check(found, Plan, "a plan", ("model", "objectives", "methods", "budget"), renamed={"entries": "methods"})
    _check_kinds(found)
    own = {k: v for k, v in found.items() if k not in ("objectives", "methods")}
    for name in ("seeds", "tuning_seeds"):
        if name in own:
            own[name] = tuple(own[name])
    own["budget"] = ledger.budget_of([f"{axis}={limit}" for axis, limit in own["budget"].items()], priced=True)
    objectives = [_objective(name, o) for name, o in found["objectives"].items()]
    entries = [_entry(name, e or {}) for name, e in found["methods"].items()]
    return Plan(objectives=tuple(objectives), entries=tuple(entries), **own)


RATES = (3e-4, 1e-3, 3e-3)
SEARCH: dict[str, tuple[Mapping[str, Any], ...]] = {
    "alignprop": tuple({"lr": r, "truncation": k} for r in RATES for k in ("suffix-uniform", "2")),
    "draft": tuple({"lr": r, "k": k} for r in RATES for k in (1, 2)),
    "draft-lv": tuple({"lr": r, "noised": n} for r in RATES for n in (1, 2)),
    "refl": tuple({"lr": r, "earliest": e} for r in RATES for e in (0.5, 0.75)),
    "drtune": tuple({"lr": r, "train_steps": k} for r in RATES for k in (2, 3)),
    "ddpo": tuple({"lr": r, "clip_range": c} for r in RATES for c in (1e-4, 1e-2)),
}
"""Six configurations a method where a plan names none: three learning rates, two values of what is the method's own."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_kinds(found: Mapping[str, Any]) -> None:
    """Raises UserError for a value of a plan that is of another kind than its name asks for."""
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool)
    names = lambda v: isinstance(v, Mapping)
    kinds = {
        **dict.fromkeys(("objectives", "methods", "budget", "settings", "longer"), (names, "names with values")),
        **dict.fromkeys(("seeds", "tuning_seeds"), (_is_seeds, "a list of whole numbers from 0 up, such as [0, 1, 2]")),
        **dict.fromkeys(("points", "prompts_each"), (lambda v: whole(v) and v > 0, "a whole number from 1 up")),
        "tuning_share": (_is_number, "a number in (0, 1]"),
    }
    for name, (fits, what) in kinds.items():
        if name in found and not fits(found[name]):
            raise UserError(f"{name} of the plan is {found[name]!r}; it must be {what}.")


def _check_seeds(seeds: tuple[int, ...], tuning: tuple[int, ...]) -> None:
    """Raises UserError for a seed that is there twice, or both tuned on and tested on."""
    for name, of in (("seeds", seeds), ("tuning_seeds", tuning)):
        if len(set(of)) < len(of):
            raise UserError(f"{name} holds a seed twice, and the same run is no second evidence. Give each once.")
    if both := set(seeds) & set(tuning):
        raise UserError(
            f"The seeds {sorted(both)} are tuned on and tested on, so the test would be too good. Take other tuning_seeds."
        )


def _check_longer(factors: Iterable[Mapping[str, float]]) -> None:
    for of in factors:
        if wrong := [f"{n}: {v}" for n, v in of.items() if not (_is_number(v) and v > 0)]:
            raise UserError(f"longer says {wrong[0]}; it is a factor above 0. Try 2.")


def _is_seeds(value: Any) -> bool:
    return isinstance(value, list | tuple | range) and all(isinstance(v, int) and v >= 0 for v in value)


def _check_objective(objective: Objective, budget: Mapping[str, float]) -> None:
    """Raises UserError for a gold measure of which less is better, and for prices that are unknown or missing."""
    if objective.gold in LOWER_IS_BETTER:
        raise UserError(
            f"The gold measure of {objective.name!r} is {objective.gold}, of which less is better. Take one of which more is."
        )
    for axis in objective.prices:
        known(axis, list(ledger.COUNTED), "count with a price")
    if "priced" in budget and not objective.prices:
        raise UserError(f"The budget is in priced seconds, but the objective {objective.name!r} has no prices.")


def _objective(name: str, found: Mapping[str, Any]) -> Objective:
    _check(found, Objective, f"the objective {name!r}", ("reward",), without=("name",))
    listed = lambda value: tuple([value] if isinstance(value, str) else value)
    return Objective(
        name,
        listed(found["reward"]),
        found.get("gold", "reward"),
        listed(found.get("watch", ())),
        found.get("prices", {}),
        found.get("longer", {}),
    )


def _entry(name: str, found: Mapping[str, Any]) -> Entry:
    _check(found, Entry, f"the method {name!r}", (), without=("name",))
    method = found.get("method", name)
    known(method, SEARCH, "method")
    search = found.get("search") or SEARCH[method]
    if not (isinstance(search, list | tuple) and all(isinstance(c, Mapping) for c in search)):
        raise UserError(
            f"search of the method {name!r} must be a list of configurations, such as [{{lr: 1.0e-3}}, {{lr: 3.0e-3}}]."
        )
    search = tuple(search)
    return Entry(name, method, dict(found.get("settings", {})), search)


def _check(
    found: Any,
    kind: type,
    what: str,
    needed: tuple[str, ...],
    without: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> None:
    names = [(renamed or {}).get(n, n) for n in kind.__dataclass_fields__ if n not in without]  # type: ignore[attr-defined]
    if not isinstance(found, Mapping):
        raise UserError(f"{what.capitalize()} must be names with values, not {found!r}.")
    for name in found:
        known(name, names, f"setting of {what}")
    if missing := [n for n in needed if n not in found]:
        raise UserError(f"{what.capitalize()} lacks {', '.join(missing)}.")
