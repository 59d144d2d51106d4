"""Pictures of features: prompts by alignment and uniformity, and a sphere of images and classes (papers/000, 4.5)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from PIL import Image

from ovseg_jax.kernels.unit import host_unit
from ovseg_jax.viz.curves import render
from ovseg_jax.viz.segments import FAINT, INK, palette


class PromptPoint(NamedTuple):
    """A prompt's name, its two losses (papers/000, eq. 6 and 7; lower is better) and its accuracy in percent."""

    name: str
    uniformity: float
    alignment: float
    accuracy: float


def prompts_picture(
    points: Sequence[PromptPoint], title: str = "", path: epath.PathLike | None = None
) -> Image.Image:
    """Draws Fig. 5: a point for each prompt, by uniformity (x) and alignment (y), coloured by accuracy.

    Args:
      points: at least one.
      title: a line at the top.
      path: the PNG file to write; None writes none.
    """
    figure, axes = _figure(6.4, 4.8)
    x, y, accuracy = np.array([point[1:] for point in points], float).T
    low, high = accuracy.min(), accuracy.max()
    # A minimum colour range, so that prompts of nearly equal accuracy look alike.
    room = max(0.5, (high - low) / 10)
    dots = axes.scatter(
        x,
        y,
        c=accuracy,
        cmap="YlGnBu_r",
        vmin=low - room,
        vmax=high + room,
        s=150,
        edgecolor="0.25",
        lw=0.8,
        zorder=3,
    )
    axes.margins(0.25, 0.2)
    written: list[tuple[bool, float]] = []
    # A line of text is 13 points high, and the spread of y about 200.
    height = 0.065 * max(float(np.ptp(y)), 1e-6)
    for point in sorted(points, key=lambda point: -point.alignment):
        # Names are written towards the middle, to stay inside of the picture, and below others that would cover them.
        right = point.uniformity <= (x.min() + x.max()) / 2
        lines = sum(side == right and abs(other - point.alignment) < height for side, other in written)
        written.append((right, point.alignment))
        axes.annotate(
            f"{point.name}  {point.accuracy:.1f}",
            (point.uniformity, point.alignment),
            xytext=(11 if right else -11, -13 * lines),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=9,
            color=_colour(INK),
            bbox=dict(boxstyle="round,pad=0.25", fc="white", ec="none", alpha=0.8),
            zorder=4,
        )
    axes.set_xlabel("uniformity of class features (lower is better)", fontsize=9)
    axes.set_ylabel("alignment of images and classes (lower is better)", fontsize=9)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(dots, ax=axes, pad=0.02)
    bar.set_label("accuracy (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return render(figure, path)


def sphere_picture(
    image: Float[np.ndarray, "n d"],
    label: Int[np.ndarray, "n"],
    classes: Mapping[str, Float[np.ndarray, "k d"]],
    names: Sequence[str],
    title: str = "",
    path: epath.PathLike | None = None,
) -> Image.Image:
    """Draws Fig. 6: image features as points on a sphere, class features as rays to its surface.

    Alignment is good if a class's ray points at its images; uniformity is good if the angles between rays are wide. The
    far side of the sphere is pale. Coordinates are those of `sphere_coordinates`.

    Args:
      image: features of images.
      label: the class of each image, 0 to K - 1; each class has at least one.
      classes: features of the K classes for each prompt; those of the first prompt are solid lines.
      names: names of the K classes, which should be few.
      title: a line at the top.
      path: the PNG file to write; None writes none.
    """
    points, rays = sphere_coordinates(image, label, classes)
    colours = palette(len(names)) / 255
    figure, axes = _figure(6.4, 6.0)
    _draw_globe(axes)
    # Drawn in the order of depth; otherwise the last class would cover the others.
    order = np.argsort(points[:, 2])
    words = []
    x, y, z = points[order].T
    axes.scatter(x, y, c=colours[label[order]], s=14, alpha=0.8 * _clear(z), lw=0, zorder=2)
    for number, (prompt, ends) in enumerate(rays.items()):
        first = number == 0
        line: dict[str, Any] = dict(ls="-", lw=2.2) if first else dict(ls="-.", lw=1.2)
        for k, (x, y, z) in enumerate(ends):
            colour, alpha = colours[k], float(_clear(z)) * (1.0 if first else 0.7)
            axes.plot([0, x], [0, y], color=colour, alpha=alpha, zorder=3, solid_capstyle="round", **line)
            end = dict(ms=9, mfc=colour, mec="white") if first else dict(ms=6, mfc="white", mec=colour)
            axes.plot(x, y, "o", alpha=alpha, zorder=4, **end)
            if first:
                words.append(_write_beside(axes, names[k], x, y))
        axes.plot([], [], color=_colour(FAINT), label=f"class features, {prompt}", **line)
    axes.plot([], [], "o", ms=4, color=_colour(FAINT), label="image features")
    figure.legend(loc="outside lower center", ncols=min(3, 1 + len(rays)), fontsize=9, frameon=False)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set(xlim=(-1.35, 1.35), ylim=(-1.14, 1.14), aspect="equal")
    axes.set_axis_off()
    _raise_covered(axes, words)
    return render(figure, path)


def sphere_coordinates(
    image: Float[np.ndarray, "n d"],
    label: Int[np.ndarray, "n"],
    classes: Mapping[str, Float[np.ndarray, "k d"]],
) -> tuple[Float[np.ndarray, "n 3"], dict[str, Float[np.ndarray, "k 3"]]]:
    """Projects features to unit vectors in the three directions in which the classes differ most.

    CLIP's images and texts lie in two narrow, distant cones and would all project to two spots. Therefore the mean over
    the classes is subtracted from the images and from each prompt's features. The directions are the principal ones of
    the classes' mean images and the first prompt's features together; z points to the viewer.
    """
    numbers = np.arange(len(next(iter(classes.values()))))
    means = np.stack([image[label == k].mean(0) for k in numbers]).astype(np.float64)
    seen = image - means.mean(0)
    said = {prompt: features - features.mean(0) for prompt, features in classes.items()}
    first = next(iter(said.values()))
    # The images, with a small weight, determine directions that few classes leave open.
    parts = (means - means.mean(0), 1.0), (first, 1.0), (seen, 1e-2)
    stack = np.concatenate([weight * part / max(np.linalg.norm(part), 1e-9) for part, weight in parts])
    axes = np.linalg.svd(stack, full_matrices=False)[2][:3]
    axes = np.pad(axes, ((0, 3 - len(axes)), (0, 0)))
    # The sign of each axis, which the SVD leaves open, is fixed by its largest component.
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1, 1)
    # Most rays point to the viewer.
    axes[2] *= 1 if np.sign(first @ axes[2]).sum() >= 0 else -1
    return host_unit(seen @ axes.T), {
        prompt: host_unit(features @ axes.T) for prompt, features in said.items()
    }


def _draw_globe(axes: Any) -> None:
    side = np.linspace(-1, 1, 400)
    x, y = np.meshgrid(side, side)
    inside = x**2 + y**2 <= 1
    light = 0.985 - 0.05 * np.clip((x + 0.35) ** 2 + (y - 0.35) ** 2, 0, 1.6)
    shade = np.stack([light, light, light + 0.01, inside], -1).clip(0, 1)
    axes.imshow(shade, extent=(-1, 1, -1, 1), origin="lower", zorder=0, interpolation="bilinear")
    turn = np.linspace(0, 2 * np.pi, 361)
    tilt = np.deg2rad(22)  # without a tilt the parallels would be straight lines
    for line in [*_parallels(turn), *_meridians(turn)]:
        a, b, c = line
        b, c = b * np.cos(tilt) - c * np.sin(tilt), b * np.sin(tilt) + c * np.cos(tilt)
        front = np.where(c >= 0, 1, np.nan)
        axes.plot(a * front, b * front, color="0.84", lw=0.6, zorder=1)
    axes.plot(np.cos(turn), np.sin(turn), color="0.72", lw=0.9, zorder=1)


def _parallels(turn: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    angles = np.deg2rad([-60, -30, 0, 30, 60])
    return [
        (np.cos(a) * np.cos(turn), np.full_like(turn, np.sin(a)), np.cos(a) * np.sin(turn)) for a in angles
    ]


def _meridians(turn: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    angles = np.deg2rad(np.arange(0, 180, 30))
    return [(np.cos(turn) * np.cos(a), np.sin(turn), np.cos(turn) * np.sin(a)) for a in angles]


def _clear(z: Any) -> Any:
    """Returns the opacity at depth z, from -1 at the back to 1: the far side is pale."""
    return np.interp(z, [-0.6, 0.0], [0.35, 1.0])


def _write_beside(axes: Any, text: str, x: float, y: float) -> Any:
    """Writes a text beyond the end of a ray, so that the ray does not cross it."""
    length = max(np.hypot(x, y), 1e-9)
    dx, dy = x / length, y / length
    sideways = "center" if abs(dx) < 0.3 else "left" if dx > 0 else "right"
    upright = "center" if abs(dy) < 0.3 else "bottom" if dy > 0 else "top"
    box = dict(boxstyle="round,pad=0.1", fc="white", ec="none", alpha=0.65)
    place = (x + 0.08 * dx, y + 0.08 * dy)
    return axes.text(
        *place, text, ha=sideways, va=upright, fontsize=9.5, color=_colour(INK), bbox=box, zorder=5
    )


def _raise_covered(axes: Any, words: Sequence[Any]) -> None:
    """Moves overlapping texts up, starting from the lowest."""
    axes.figure.draw_without_rendering()
    below: list[Any] = []
    for word in sorted(words, key=lambda word: word.get_window_extent().y0):
        start = box = word.get_window_extent()
        for other in sorted(below, key=lambda other: other.y0):
            if box.overlaps(other):
                box = box.translated(0, other.y1 - box.y0 + 4)
        below.append(box)
        if box is not start:
            x, y = axes.transData.transform(word.get_position())
            word.set_position(axes.transData.inverted().transform((x, y + box.y0 - start.y0)))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # matplotlib's object interface does not touch its global state.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=140, facecolor="white", layout=layout)
    return figure, figure.add_subplot()


def _colour(rgb: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(value / 255 for value in rgb)
