"""params.yaml, one validated section at a time. A stage sees only its own section; an unknown key is an error with its dotted name.

The top-level word `preset` (quick, standard, paper) chooses budgets: what a section holds is `quick`, and its `presets.WORD` lies over
that. A section that lacks the word takes the next smaller budget it has, and its `budget` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

S = TypeVar("S", bound=BaseModel)
PRESETS = ("quick", "standard", "paper")  # CPU in minutes, one GPU in about half an hour, the published budget


class Budget(NamedTuple):
    """Which preset was asked for, and which a section had."""

    asked: str = PRESETS[0]
    used: str = PRESETS[0]

    def __str__(self) -> str:
        return self.used if self.used == self.asked else f"{self.used} (no `{self.asked}` preset)"


class Section(BaseModel):
    """Base of every params section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    _budget: Budget = PrivateAttr(default=Budget())

    @property
    def budget(self) -> Budget:
        """The preset that the section was read with; no key of params.yaml."""
        return self._budget

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        """The model that the raw section has to satisfy: this one, or one that it names (a source's, an equation's)."""
        return cls


class ParamsError(ValueError):
    """params.yaml does not hold what a stage needs; the message lists every offender."""


def name_of(stage: Any, keys: list[str]) -> str:
    """Dotted name of the section that a stage module reads for these keys."""
    return ".".join([stage.__name__.rpartition(".")[2], *keys[: getattr(stage, "SECTION_KEYS", None)]])


def load(path: Path, dotted: str, model: type[S]) -> S:
    """The validated section at a dotted name such as `train.ns.scent`, with the chosen preset laid over it."""
    raw, budget = read(path, dotted)
    section = validated(raw, model, dotted, path)
    if isinstance(section, Section):
        section._budget = budget
    return section


def read(path: Path, dotted: str) -> tuple[Any, Budget]:
    """The raw section at a dotted name, with the chosen preset, or the next smaller one it has, laid over it; and which that was."""
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    node: Any = whole
    seen: list[str] = []
    for key in dotted.split("."):
        if not isinstance(node, dict) or key not in node:
            known = ", ".join(map(str, node)) if isinstance(node, dict) else "no further keys"
            where = ".".join(seen) or "the top level"
            raise ParamsError(f"{path}: no section {dotted!r}: {where} holds {known}, not {key!r}")
        node = node[key]
        seen.append(key)
    asked, presets = whole.get("preset", PRESETS[0]), {}
    if isinstance(node, dict):
        presets, node = node.get("presets", {}), {key: value for key, value in node.items() if key != "presets"}
    unknown = [word for word in (asked, *presets) if word not in PRESETS]
    if unknown:
        raise ParamsError(f"{path}: unknown preset {', '.join(map(str, unknown))}: expected one of {', '.join(PRESETS)}")
    used = max((word for word in (PRESETS[0], *presets) if PRESETS.index(word) <= PRESETS.index(asked)), key=PRESETS.index)
    return overlaid(node, presets[used]) if used in presets else node, Budget(asked, used)


def overlaid(base: Any, change: Any) -> Any:
    """`change` laid over `base`: mappings key by key, everything else replaced."""
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    return {**base, **{key: overlaid(base.get(key), value) for key, value in change.items()}}


def validated(raw: Any, model: type[S], dotted: str, path: Path | str = "params.yaml") -> S:
    """Check a raw section against its model; all offenders in one message, each with its dotted name."""
    if issubclass(model, Section):
        model = cast(type[S], model.chosen(raw))
    try:
        return model.model_validate(raw if raw is not None else {})
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join([dotted, *map(str, item["loc"])])
            if item["type"] == "extra_forbidden":
                known = ", ".join(model.model_fields)
                lines.append(f"{name}: unknown key; known in {dotted}: {known}")
            else:
                lines.append(f"{name}: {item['msg']}, found {item.get('input')!r}")
        raise ParamsError(f"{path} is not valid:\n  " + "\n  ".join(lines)) from None
