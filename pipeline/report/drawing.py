"""A figure as inline SVG: the same input gives the same bytes, text stays text, colours suit colour-blind eyes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.report.wording import unit_text
from pipeline.scores import Table

INK, SOFT, LINE = "#16202b", "#5b6875", "#d5dce3"
MODELS = ("#0b6bcb", "#d1480f", "#0a8f6a", "#9a3fb5", "#b8860b", "#00838f", "#c2185b", "#6d4c41")
_BASELINES = ("#8a6d3b", "#5f7f3a", "#a0527a", "#4f7a8c", "#8c8c8c", "#b07a1a", "#6b5b95", "#3d8577")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 1.5)))
_STYLE: Any = {
    "svg.hashsalt": "fieldcast",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def look(table: Table) -> dict[str, dict[str, Any]]:
    """Line style of every predictor, the same in all figures: models solid and bold, baselines broken and muted."""
    out = {}
    for i, name in enumerate(table.models):
        out[name] = {"color": MODELS[i % len(MODELS)], "marker": "o", "linewidth": 2.4, "zorder": 4}
    for i, name in enumerate(table.baselines):
        dash = _DASHES[i % len(_DASHES)]
        out[name] = {
            "color": _BASELINES[i % len(_BASELINES)],
            "marker": _MARKERS[1 + i % 9],
            "linestyle": dash,
            "linewidth": 1.3,
            "zorder": 3,
        }
    return out


@contextmanager
def drawing(name: str, size: tuple[float, float], alt: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw in; afterwards its SVG is the one item of the list. Ids get the figure's name, so that many fit in one page."""
    result: list[str] = []
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="findfont|Font family")
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, result
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    seen: dict[str, int] = {}

    def unique(match: re.Match[str]) -> str:  # equal images get equal ids from Matplotlib; whoever refers to one may have the first
        seen[match[1]] = seen.get(match[1], 0) + 1
        return f'id="{prefix}-{match[1]}' + (f'-{seen[match[1]]}"' if seen[match[1]] > 1 else '"')

    body = re.sub(r'\bid="([^"]+)"', unique, body)
    body = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", body)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    result.append(re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening(size, label), body, count=1))


def _opening(size: tuple[float, float], label: str) -> str:
    width = round(size[0] * 92)
    start = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return start + rf'viewBox="\1" role="img" aria-label="{label}" style="width:{width}px">'


def in_unit(unit: str) -> str:
    text = unit_text(unit)
    return f", {text}" if text else ""
