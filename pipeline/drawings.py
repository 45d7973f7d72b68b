"""Small inline SVG drawings for pages: coloured by the classes of templates/style.css, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH = 1040.0
COLUMNS, ROWS = 120, 60  # of a heat map, at most
SHARES = (0.25, 0.5, 0.75, 0.9, 0.97)  # borders of the six colour classes a0..a5
SHARE_LEGEND = [
    ("a5", "97 % and more"), ("a4", "90 to 97 %"), ("a3", "75 to 90 %"), ("a2", "50 to 75 %"), ("a1", "25 to 50 %"),
    ("a0", "below 25 %"), ("none", "nothing expected"),
]  # fmt: skip


def share_class(share: float, judged: bool = True) -> str:
    """Colour class of a share from 0 to 1: a0 (bad) to a5 (good), or p0 to p5 where more is not better; `none` where there is none."""
    return "none" if math.isnan(share) else f"{'a' if judged else 'p'}{int(np.searchsorted(SHARES, share, side='right'))}"


def heat_map(
    share: np.ndarray, rows: Sequence[str], ticks: Sequence[tuple[float, str]], row_height: float = 15.0, judged: Sequence[bool] = ()
) -> Markup:
    """Rows by columns of shares in 0..1, NaN where nothing was expected; ticks are (column, label). Equal neighbours are one rectangle.

    `judged`: for each row whether a low share is bad; by default it is.
    """
    label = min(8.0 * max(map(len, rows), default=0) + 10, 190.0)
    cell = (WIDTH - label) / max(share.shape[1], 1)
    height = row_height * len(rows) + 24
    parts = [f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="heat map">']
    for number, name in enumerate(rows):
        top = number * row_height
        if row_height >= 11:
            parts.append(
                f'<text class="name" x="{label - 8:g}" y="{top + row_height - 4:g}" text-anchor="end">{escape(_short(name))}</text>'
            )
        classes = [share_class(value, not judged or judged[number]) for value in share[number]]
        first = 0
        for column in range(1, len(classes) + 1):
            if column == len(classes) or classes[column] != classes[first]:
                x, width = label + first * cell, (column - first) * cell
                parts.append(f'<rect class="{classes[first]}" x="{x:.1f}" y="{top:g}" width="{width:.1f}" height="{row_height - 1.5:g}"/>')
                first = column
    for at, text in ticks:
        x = label + at * cell
        parts.append(f'<path class="axis" d="M{x:.1f} {height - 24:g}v5"/><text x="{x:.1f}" y="{height - 6:g}">{escape(text)}</text>')
    return Markup("".join([*parts, "</svg>"]))


def sensor_map(
    longitude: np.ndarray, latitude: np.ndarray, share: np.ndarray, ringed: np.ndarray, names: Sequence[str], labelled: Sequence[bool]
) -> Markup:
    """Sensors as dots coloured by a share, some with a ring; equirectangular, with a scale bar and the extent in degrees."""
    height, pad = 520.0, 46.0
    squeeze = math.cos(math.radians(float(np.mean(latitude))))
    x, y = longitude * squeeze, -latitude
    span = max(np.ptp(x) / (WIDTH - 2 * pad), np.ptp(y) / (height - 2 * pad), 1e-6)
    px = WIDTH / 2 + (x - (x.min() + x.max()) / 2) / span
    py = height / 2 + (y - (y.min() + y.max()) / 2) / span
    radius = 7.0 if len(names) <= 40 else 4.5
    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="map of sensors">'
        f'<rect class="frame" x=".5" y=".5" width="{WIDTH - 1:g}" height="{height - 1:g}" rx="6"/>'
    ]
    for i in np.argsort(-share, kind="stable"):
        told = "" if math.isnan(share[i]) else f", {share[i]:.1%}"
        parts.append(
            f'<circle class="{share_class(share[i])}" cx="{px[i]:.1f}" cy="{py[i]:.1f}" r="{radius:g}">'
            f"<title>{escape(names[i])}{told}</title></circle>"
        )
        if ringed[i]:
            parts.append(f'<circle class="ring" cx="{px[i]:.1f}" cy="{py[i]:.1f}" r="{radius + 3:g}"/>')
    parts += _labels([(px[i], py[i], _short(names[i])) for i in range(len(names)) if labelled[i]], list(zip(px, py, strict=True)))
    kilometre = 1 / (111.2 * span)
    length = _round_length(120 / kilometre)
    extent = f"{_degrees(latitude, 'N', 'S')}, {_degrees(longitude, 'E', 'W')}"
    parts.append(
        f'<path class="axis" style="stroke:var(--soft)" d="M{pad:g} {height - 18:g}v-5m0 5h{length * kilometre:.1f}v-5"/>'
        f'<text x="{pad + length * kilometre + 8:.1f}" y="{height - 15:g}">{length:g} km</text>'
        f'<text x="{WIDTH - 12:g}" y="{height - 15:g}" text-anchor="end">{extent}</text>'
    )
    return Markup("".join([*parts, "</svg>"]))


def _labels(wanted: Sequence[tuple[float, float, str]], dots: Sequence[tuple[float, float]]) -> list[str]:
    """Each name beside its dot where it covers no other name and as few dots as possible: right, left, above or below."""
    placed: list[tuple[float, float, float]] = []  # left, right, baseline
    drawn = []
    for x, y, name in wanted:
        width = 6.2 * len(name)
        choices = [(x + 12, y + 4), (x - 12 - width, y + 4), (x - width / 2, y - 12), (x - width / 2, y + 20)]

        def crowd(choice: tuple[float, float], width: float = width) -> float:
            left, base = choice
            names = sum(left < b and left + width > a and abs(base - c) < 12 for a, b, c in placed)
            covered = sum(left - 6 < a < left + width + 6 and -14 < b - base < 6 for a, b in dots)
            outside = left < 4 or left + width > WIDTH - 4
            return 10 * names + covered + 100 * outside

        left, base = best = min(choices, key=crowd)
        placed.append((left, left + width, base))
        at, anchor = [(x + 12, "start"), (x - 12, "end"), (x, "middle"), (x, "middle")][choices.index(best)]
        drawn.append(f'<text class="name haloed" x="{at:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    return drawn


def curve(low: np.ndarray, middle: np.ndarray, high: np.ndarray, ticks: Sequence[tuple[float, str]], unit: str) -> Markup:
    """A band and its middle over frames; NaN breaks the line."""
    height, left, base = 180.0, 96.0, 156.0
    known = np.isfinite(middle)
    if not known.any():
        return Markup("")
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    scale = (base - 10) / ((top - bottom) or 1.0)

    def at(column: float, value: float) -> str:
        return f"{left + column * (WIDTH - left - 10) / max(len(middle) - 1, 1):.1f} {base - (value - bottom) * scale:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="range over time">']
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]]).astype(int)))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        columns = range(start, end)
        band = [at(c, high[c]) for c in columns] + [at(c, low[c]) for c in reversed(columns)]
        parts.append(
            f'<path class="band" d="M{"L".join(band)}Z"/><path class="series" d="M{"L".join(at(c, middle[c]) for c in columns)}"/>'
        )
    parts.append(f'<path class="axis" d="M{left:g} 10V{base:g}H{WIDTH - 10:g}"/>')
    texts = [(left - 6, base - (value - bottom) * scale + 4, "end", f"{value:.4g} {unit}".strip()) for value in _rounded(bottom, top)]
    texts += [(float(at(column, bottom).split()[0]), base + 16, "start", text) for column, text in ticks]
    parts += [f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' for x, y, anchor, text in texts]
    return Markup("".join([*parts, "</svg>"]))


def time_ticks(labels: Sequence[str], wanted: int = 8) -> list[tuple[float, str]]:
    """About `wanted` evenly spread (column, label) pairs."""
    step = max(1, math.ceil(len(labels) / wanted))
    return [(float(i), labels[i]) for i in range(0, len(labels), step)]


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Without digits that are far below the difference."""
    digits = 3 - math.floor(math.log10(max(high - low, 1e-12)))
    return round(low, digits), round(high, digits)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _round_length(wished: float) -> float:
    power = 10.0 ** math.floor(math.log10(wished))
    return max(m * power for m in (1, 2, 5) if m * power <= wished)


def _degrees(values: np.ndarray, positive: str, negative: str) -> str:
    def one(value: float) -> str:
        return f"{abs(value):.2f}° {positive if value >= 0 else negative}"

    return f"{one(float(values.min()))} to {one(float(values.max()))}"
