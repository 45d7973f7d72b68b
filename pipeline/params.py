"""params.yaml, one validated section at a time. A stage sees only its own section; an unknown key is an error with its dotted name.

The top-level word `preset` (quick, standard, paper) chooses budgets: what a section holds is `quick`, and its `presets.WORD`, where it has
`presets`, lies over that. A section without `presets` is the same under every word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

S = TypeVar("S", bound=BaseModel)
PRESETS = ("quick", "standard", "paper")  # CPU in minutes, one GPU in about half an hour, the published budget


class Section(BaseModel):
    """Base of every params section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        """The model that the raw section has to satisfy: this one, or one that it names (a source's, an equation's)."""
        return cls


class ParamsError(ValueError):
    """params.yaml does not hold what a stage needs; the message lists every offender."""


def name_of(stage: Any, keys: list[str]) -> str:
    """Dotted name of the section that a stage module reads for these keys."""
    return ".".join([stage.__name__.rpartition(".")[2], *keys[: getattr(stage, "SECTION_KEYS", None)]])


def read(path: Path, dotted: str) -> Any:
    """The raw value at a dotted name such as `train.ns.scent`, with the chosen preset laid over it."""
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
    if not isinstance(node, dict) or "presets" not in node:
        return node
    word, presets = whole.get("preset", PRESETS[0]), node["presets"]
    base = {key: value for key, value in node.items() if key != "presets"}
    unknown = sorted({*presets, word} - {*PRESETS})
    if unknown:
        raise ParamsError(f"{path}: unknown preset {', '.join(unknown)}: expected one of {', '.join(PRESETS)}")
    if word == PRESETS[0]:
        return base
    if word not in presets:
        raise ParamsError(f"{path}: {dotted} has no preset {word!r}, only {', '.join([PRESETS[0], *presets])}: set `preset` to one of them")
    return overlaid(base, presets[word])


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
