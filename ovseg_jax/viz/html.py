"""Pictures and line charts for HTML pages that stand alone: data URIs and inline SVG."""

import base64
import html
import math
from collections.abc import Mapping, Sequence

from PIL import Image

from ovseg_jax.data.images import encode_image

SAFE = (0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0x0072B2, 0xD55E00, 0xCC79A7)
"""Colours that colour-blind people tell apart: Okabe and Ito, "Color Universal Design" (2008), without black."""
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")
"""The dashes of lines that share a colour; beyond the last they repeat."""

CHART_CSS = (
    "".join(
        f".c{i} {{ --c: color-mix(in srgb, #{colour:06x}, var(--toward) 18%); }}\n"
        for i, colour in enumerate(SAFE)
    )
    + """
:root { color-scheme: light dark; --toward: black; }
@media (prefers-color-scheme: dark) { :root { --toward: white; } }
.chart { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
.chart text { fill: currentColor; }
.chart .grid { stroke: currentColor; stroke-opacity: 0.15; }
.chart .line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.chart .dot { fill: var(--c); }
"""
)
"""The style of `chart`; a page may use the classes c0, c1, ... for their colour --c."""

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 360, 200, 48, 8, 10, 20


def data_uri(drawn: Image.Image, form: str) -> str:
    """Returns a data URI that holds a picture."""
    options = {"quality": 92} if form == "WEBP" else {}
    content = encode_image(drawn, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"


def style_of(index: int) -> tuple[str, str]:
    """Returns the class and the dashes of line `index` of a chart."""
    return f"c{index % len(SAFE)}", DASHES[index // len(SAFE) % len(DASHES)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`, which lie 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def chart(title: str, lines: Mapping[int, tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Draws lines over steps as inline SVG.

    Args:
      title: the description of the chart for screen readers.
      lines: the name and the points (step, value) of each line, by the index that chooses its style; none is empty.
    """
    points = [point for _, line in lines.values() for point in line]
    (x0, x1), (y0, y1) = (_range([point[axis] for point in points]) for axis in (0, 1))
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    x_of = lambda x: _LEFT + (x - x0) / (x1 - x0) * across
    y_of = lambda y: _TOP + (y1 - y) / (y1 - y0) * down
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
    ]
    for y in ticks(y0, y1):
        at = f"{y_of(y):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{y:.6g}</text>')
    for x in ticks(x0, x1):
        anchor = "end" if x_of(x) > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{x_of(x):.1f}" y="{_HEIGHT - 4}" text-anchor="{anchor}">{x:,.10g}</text>')
    for index, (name, line) in lines.items():
        kind, dashes = style_of(index)
        last = f"<title>{html.escape(name)}: {line[-1][1]:.4g} at step {line[-1][0]:,.0f}</title>"
        if len(line) == 1:
            parts.append(
                f'<circle class="dot {kind}" cx="{x_of(line[0][0]):.1f}" cy="{y_of(line[0][1]):.1f}" r="3.5">'
                f"{last}</circle>"
            )
            continue
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(
            f'<polyline class="line {kind}" stroke-dasharray="{dashes}" points="{path}">{last}</polyline>'
        )
    return "".join([*parts, "</svg>"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    room = abs(low) / 10 or 1.0  # of a value that stays the same
    return low - room, high + room
