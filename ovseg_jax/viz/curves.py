"""Training curves: the losses, scores and rates of a run's `metrics.jsonl` over steps."""

from typing import Any, TypeGuard

import numpy as np
from etils import epath
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.reading import parse_json, read_lines
from ovseg_jax.viz.segments import palette

Series = dict[str, list[tuple[float, float]]]


def curves(metrics: epath.PathLike, path: epath.PathLike | None = None) -> Image.Image:
    """Draws training curves: panels of losses, of each evaluation's scores, and of other quantities.

    Args:
      metrics: a `metrics.jsonl`: one JSON object a line, with `step`; `<evaluation>/<metric>` are scores.
      path: the PNG file to write; None writes none.

    Raises:
      UserError: the file is missing or holds no metrics.
    """
    panels: dict[tuple[int, str], Series] = {}
    for key, points in _read(metrics).items():
        place, name = panel(key)
        if place is not None:
            panels.setdefault(place, {})[name] = points
    # matplotlib's object interface does not touch its global state.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across = min(3, len(panels))
    down = -(-len(panels) // across)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.6 * across, 3.2 * down), dpi=120, facecolor="white", layout=layout)
    for i, ((_, title), lines) in enumerate(sorted(panels.items())):
        _plot(figure.add_subplot(down, across, i + 1), title, lines)
    return render(figure, path)


def render(figure: Any, path: epath.PathLike | None) -> Image.Image:
    """Renders a matplotlib figure as an image, and writes it as a PNG if there is a path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if path is not None:
        with epath.Path(path).open("wb") as f:
            picture.save(f, "PNG")
    return picture


def _plot(axes: Any, title: str, lines: Series) -> None:
    for colour, (name, points) in zip(palette(len(lines)), sorted(lines.items()), strict=True):
        x, y = np.array(points, float).T
        marker = "o" if len(x) < 30 else None
        label = f"{name}  {y[-1]:.3g}" if len(lines) > 1 else None
        axes.plot(x, y, label=label, color=colour / 255, lw=1.5, marker=marker, ms=2.5)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if "second" in title:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        # Below the axes: inside, a legend covers lines where there are many.
        place: dict[str, Any] = dict(loc="upper center", bbox_to_anchor=(0.5, -0.19))
        axes.legend(fontsize=7, frameon=False, ncols=min(3, len(lines)), columnspacing=1.2, **place)


def _read(metrics: epath.PathLike) -> Series:
    file = epath.Path(metrics)
    if not file.exists():
        raise UserError(f"{metrics} does not exist: a training run writes it into its folder")
    series: Series = {}
    for _, line in read_lines(file):
        try:
            record = parse_json(line)
        except (ValueError, RecursionError):
            continue  # an incomplete last line, left by a killed run
        step = record.pop("step", None) if isinstance(record, dict) else None
        if not _is_number(step):
            continue
        for key, value in record.items():
            if _is_number(value):
                series.setdefault(key, []).append((float(step), float(value)))
    if not any(panel(key)[0] for key in series):
        raise UserError(f"{metrics} holds no metrics yet")
    return series


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and abs(value) < 1e300


def panel(key: str) -> tuple[tuple[int, str] | None, str]:
    """Returns the panel (rank, title) and the name there of a metric; the panel is None if it is not drawn."""
    evaluation, slash, metric = key.partition("/")
    if slash:
        if "chance" in metric or "_gt" in metric:
            return None, metric
        if metric.startswith(("alignment", "uniformity")):
            return (1, f"{evaluation}: alignment, uniformity"), metric
        return (1, f"{evaluation}: {'mIoU' if 'miou' in metric else 'recall, accuracy'} (%)"), metric
    if key == "seconds":
        return None, key
    if key.endswith("loss"):
        return (0, "loss"), "total" if key == "loss" else key.removesuffix("_loss")
    if key.endswith("temperature"):
        return (2, "temperature"), key.removesuffix("_temperature")
    return (2, key.replace("_", " ")), key
