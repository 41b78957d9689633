"""What a judge is asked: our own wording, with a version. Change a word and the version must change: cached replies hang on it.

Source: the definition of a hallucination in the abstract of Hallucination Score, arXiv 2507.14367; the wording, the levels and their
direction are ours, since the paper's prompt could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass

from tropism.core import UserError
from tropism.restore.judge_pictures import Picture
from tropism.restore.levels import HIGHEST, LEVELS, LOWEST

VERSION = "hs-v1"
MODES = {"ABC": "full", "BC": "gt_only", "AC": "lr_only"}
"""The labels of the pictures -> the mode of a question."""
KINDS = ("added", "removed", "replaced", "count", "text", "face", "material", "structure", "missing")
"""What a discrepancy may be; "missing" is an omission: detail that is only absent or smoothed away."""
OMISSION_CAP = 2
"""The highest level of a picture that only lacks detail, as the prompt's fifth part says of blur."""

_NAMES = {
    "A": "the low-resolution input, enlarged to the size of the others",
    "B": "the reference, which shows what was really there",
    "C": "the candidate: the restored picture that you judge",
}
_ROLE = """You check a restored picture for invented content. Compare it with what is known of the scene and look only for things \
that are not true to it. Sharpness, noise, a colour cast, mild blur and how good the picture looks do not matter."""
_COUNTS = """What counts as invented:
- an object, or a part of one, that was added, removed or exchanged for another;
- another number of things;
- text, digits or signs that read differently;
- a face that is another person's, or has another expression;
- texture that makes a surface another material;
- structure that is broken or bent: lines, edges, limbs, windows.
What does not: blur, noise, ringing, compression marks, small shifts of colour or brightness, a more or less crisp edge.
Blur alone is never invented content. Where C merely lacks detail and shows nothing else in its place, record it as an omission."""
_UNKNOWN = """There is no reference. What A leaves open, C may fill in any plausible way; record only what contradicts A, or \
gives a meaning to the scene that A does not support."""
_PROCEDURE = """Proceed in this order:
1. Note to yourself what {known} shows: objects, how many, text, faces, materials, structure.
2. Go over C region by region and compare each region with the same region of {known}.
3. Record each discrepancy as an item: its box as shares of the picture (left, top, right, bottom, each from 0 to 1), its kind, a \
short description, its severity (1 slight, 2 clear, 3 changes the meaning), and whether it is an omission.
4. Only then decide the level."""
_LEVELS = "\n".join(
    [
        "Levels (the score), 1 is best:",
        *(f"{level}: {text[0].lower()}{text[1:]}" for level, text in LEVELS.items()),
        "Omissions alone are at most level 2.",
    ]
)
_OUTPUT = """Answer with one JSON object and nothing else, its parts in this order:
{"items": [{"box": {"left": 0.1, "top": 0.2, "right": 0.3, "bottom": 0.4}, "kind": "KIND", "description": "TEXT", "severity": N, \
"omission": true or false}], "score": N, "confidence": N}
kind is one of: """
_OUTPUT_END = """. severity is 1, 2 or 3; score is a whole number from 1 to 5; confidence is from 0 to 1. Without any discrepancy, \
items is []."""

_ITEM = {
    "box": {
        "type": "object",
        "properties": {side: {"type": "number"} for side in ("left", "top", "right", "bottom")},
        "required": ["left", "top", "right", "bottom"],
        "additionalProperties": False,
    },
    "kind": {"type": "string", "enum": list(KINDS)},
    "description": {"type": "string"},
    "severity": {"type": "integer", "enum": [1, 2, 3]},
    "omission": {"type": "boolean"},
}
_PARTS = {
    "items": {
        "type": "array",
        "items": {"type": "object", "properties": _ITEM, "required": list(_ITEM), "additionalProperties": False},
    },
    "score": {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))},
    "confidence": {"type": "number"},
}
SCHEMA = {"type": "object", "properties": _PARTS, "required": list(_PARTS), "additionalProperties": False}
"""Of a reply, strict: every part is required, nothing may be added, and the findings come before the number that they lead to.

Ranges of numbers are left to the parser, because not every server's grammar knows them.
"""


@dataclass(frozen=True)
class Question:
    """Pictures in the order in which they are shown, each named by its own label."""

    pictures: tuple[Picture, ...]

    @property
    def mode(self) -> str:
        """full, gt_only or lr_only. Raises UserError where there is nothing to compare the candidate with."""
        labels = "".join(sorted(p.label for p in self.pictures))
        if labels not in MODES:
            raise UserError(
                "A judge needs something to compare the candidate with. Give the reference (gt=), the input (lr=), or both."
            )
        return MODES[labels]

    @property
    def swapped(self) -> Question:
        """The same pictures under the same labels with the last two in the other order: a fair judge says the same."""
        *first, one, two = self.pictures
        return Question((*first, two, one))

    def parts(self) -> list[str | Picture]:
        """The text, then each picture after a line that names it, then what to do."""
        seen = [part for p in self.pictures for part in (f"Picture {p.label} ({_NAMES[p.label].split(':')[0]}):", p)]
        return [self.instruction(), *seen, "Now compare, and answer with the JSON object."]

    def instruction(self) -> str:
        """Everything but the pictures: role, inputs, what counts, procedure, levels and form of the answer."""
        known = "A" if self.mode == "lr_only" else "B"
        listed = "\n".join(f"- {p.label}: {_NAMES[p.label]}" for p in self.pictures)
        count = {2: "two", 3: "three"}[len(self.pictures)]
        inputs = f"You are shown {count} pictures of one scene in one frame, each after a line that names it, in this order:\n{listed}"
        unknown = [_UNKNOWN] if known == "A" else []
        output = _OUTPUT + ", ".join(KINDS) + _OUTPUT_END
        return "\n\n".join([_ROLE, inputs, _COUNTS, *unknown, _PROCEDURE.format(known=known), _LEVELS, output])
