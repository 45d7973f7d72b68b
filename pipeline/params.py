"""params.yaml, one validated section at a time. A stage sees only its own section; an unknown key is an error with its dotted name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

S = TypeVar("S", bound=BaseModel)


class Section(BaseModel):
    """Base of every params section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        """The model that the raw section has to satisfy: this one, or one that it names (a source's, an equation's)."""
        return cls


class ParamsError(ValueError):
    """params.yaml does not hold what a stage needs; the message lists every offender."""


def read(path: Path, dotted: str) -> Any:
    """The raw value at a dotted name such as `train.ns.scent`."""
    node: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    seen: list[str] = []
    for key in dotted.split("."):
        if not isinstance(node, dict) or key not in node:
            known = ", ".join(map(str, node)) if isinstance(node, dict) else "no further keys"
            where = ".".join(seen) or "the top level"
            raise ParamsError(f"{path}: no section {dotted!r}: {where} holds {known}, not {key!r}")
        node = node[key]
        seen.append(key)
    return node


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
