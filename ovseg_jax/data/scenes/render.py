"""Drawing of `scenes`: outlines, patterns and background textures, in NumPy.

All lengths are in units of 1/64 of the image's side, so that a scene looks the same at every resolution; positions run
from -1 to 1 over the image, y downwards. Only an object's bounding box is drawn: a 64-pixel image takes about 1 ms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

_ANGLES = 256  # entries of an outline's table


def _polygon(*points: tuple[float | int, float | int]) -> np.ndarray:
    """Computes the radius by angle of a polygon that is star-shaped about the origin (corners in order, y down)."""
    corners = np.array(points, np.float64)
    theta = np.arange(_ANGLES) * 2 * np.pi / _ANGLES - np.pi
    direction = np.stack([np.cos(theta), np.sin(theta)], -1)
    radius = np.zeros(_ANGLES)
    for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):
        edge = b - a
        # Ray t * direction meets the edge a + s * edge.
        det = direction[:, 1] * edge[0] - direction[:, 0] * edge[1]
        det = np.where(np.abs(det) < 1e-9, 1e-9, det)
        t = (a[1] * edge[0] - a[0] * edge[1]) / det
        s = (direction[:, 0] * a[1] - direction[:, 1] * a[0]) / det
        radius = np.where((s >= -1e-6) & (s <= 1 + 1e-6) & (t > 0), np.maximum(radius, t), radius)
    return radius.astype(np.float32)


def _regular(corners: int, radius: float, inner: float | None = None, turn: float = -90.0) -> np.ndarray:
    """Computes a regular polygon, or a star with `inner` as the radius between its points."""
    n = corners if inner is None else 2 * corners
    theta = np.radians(turn) + np.arange(n) * 2 * np.pi / n
    r = np.where(np.arange(n) % 2 == 0, radius, radius if inner is None else inner)
    return _polygon(*zip(r * np.cos(theta), r * np.sin(theta), strict=True))


def _curve(f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return f(np.arange(_ANGLES) * 2 * np.pi / _ANGLES - np.pi).astype(np.float32)


@functools.cache
def _outlines() -> dict[str, tuple[np.ndarray, float]]:
    """Returns outline name -> (radius by angle, radius of the hole in it)."""
    r = {
        "disc": _curve(lambda t: 0.95 + 0 * t),
        "ellipse": _curve(lambda t: 1 / np.hypot(np.cos(t) / 1.05, np.sin(t) / 0.78)),
        "rectangle": _polygon((1.05, 0.7), (-1.05, 0.7), (-1.05, -0.7), (1.05, -0.7)),
        "square": _regular(4, 1.19, turn=45.0),
        "diamond": _polygon((0, 1.2), (-0.95, 0), (0.0, -1.1), (0.95, 0.0)),
        "hexagon": _regular(6, 1.02),
        "dome": _polygon(
            *[(1.08 * np.cos(t), 0.55 - 1.3 * np.sin(t)) for t in np.linspace(0, np.pi, 24)],
            (-0.42, 0.55),
            (-0.32, 0.95),
            (0.32, 0.95),
            (0.42, 0.55),
        ),
        "octagon": _regular(8, 1.04, 0.9),
        "star": _regular(5, 1.2, 0.62),
        "heart": _polygon(
            (0, 1.1),
            (-1.0, -0.1),
            (-0.95, -0.7),
            (-0.5, -0.9),
            (0, -0.55),
            (0.5, -0.9),
            (0.95, -0.7),
            (1.0, -0.1),
        ),
        "triangle": _regular(3, 1.25),
        "ring": _curve(lambda t: 1.05 + 0 * t),
        "flower": _curve(lambda t: 0.85 + 0.25 * np.cos(5 * t)),
        "lens": _polygon(
            *[
                (1.25 * np.cos(t), 0.62 * np.sin(t) * (1 - 0.35 * abs(np.cos(t))))
                for t in np.linspace(0, 2 * np.pi, 48)[:-1]
            ]
        ),
        "house": _polygon((0.8, 0.9), (-0.8, 0.9), (-0.8, -0.2), (0, -1.1), (0.8, -0.2)),
        "crescent": _curve(lambda t: np.where(np.abs(t) < 0.9, 0.25 + 0.75 * (np.abs(t) / 0.9) ** 2, 1.0)),
        "gear": _curve(lambda t: np.where(np.cos(8 * t) > 0, 1.08, 0.82)),
        "trapezoid": _polygon((0.6, 0.95), (-0.6, 0.95), (-0.95, -0.9), (0.95, -0.9)),
        "bowtie": _polygon((1.15, 0.8), (0, 0.3), (-1.15, 0.8), (-1.15, -0.8), (0, -0.3), (1.15, -0.8)),
        "crown": _polygon(
            (0.9, 0.8), (-0.9, 0.8), (-1.1, -0.8), (-0.5, -0.05), (0, -1.1), (0.5, -0.05), (1.1, -0.8)
        ),
        "pear": _curve(lambda t: 0.85 - 0.22 * np.sin(-t) + 0.28 * np.maximum(np.sin(-t), 0) ** 6),
        "shield": _polygon((0, 1.15), (-0.75, 0.5), (-0.9, -0.9), (0.9, -0.9), (0.75, 0.5)),
        "arrow": _polygon(
            (1.25, 0), (0.2, 0.95), (0.2, 0.4), (-1.1, 0.4), (-1.1, -0.4), (0.2, -0.4), (0.2, -0.95)
        ),
        "bone": _curve(lambda t: 0.45 + 0.75 * np.cos(t) ** 2 - 0.25 * np.cos(t) ** 12),
    }
    return {name: (table, 0.45 if name == "ring" else 0.0) for name, table in r.items()}


def inside(outline: str, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Tells which points (u, v) in an object's own frame, where its radius is about 1, lie within the outline."""
    table, hole = _outlines()[outline]
    rho = np.hypot(u, v)
    angle = ((np.arctan2(v, u) + np.pi) * (_ANGLES / (2 * np.pi))).astype(np.int32) % _ANGLES
    mask = rho < table[angle]
    return mask & (rho > hole) if hole else mask


def extent(outline: str) -> float:
    """Returns the largest radius of an outline."""
    return float(_outlines()[outline][0].max())


def pattern(
    name: str, x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"], rng: np.random.Generator
) -> Float[np.ndarray, "h w"]:
    """Computes the figure of a pattern, from 0 (the thing's colour) to 1 (the tone).

    x and y are positions relative to the object's centre. Periods vary by up to 20% and phases are random, so that no
    two objects of a noun are equal.
    """
    q = rng.uniform(0.85, 1.2)
    a, b = rng.random(2)
    if name == "plain":
        figure = np.zeros(x.shape, bool)
    elif name == "glossy":  # a highlight up and left, whose soft rim is part of it
        return np.clip(1.25 - np.hypot(x + 4.5, y + 4.5) / (4.5 * q), 0, 1) * 0.9
    elif name == "stripes":
        figure = (x + a * 6 * q) % (6 * q) < 2.7 * q
    elif name == "spots":
        p = 7.5 * q
        row = np.floor(y / p)
        figure = np.hypot((x + (row % 2) * p / 2) % p - p / 2, y % p - p / 2) < 2.4 * q
    elif name == "checks":
        p = 4.6 * q
        figure = (np.floor(x / p) + np.floor(y / p)) % 2 < 0.5
    elif name == "lattice":
        p, s, t = 6.2 * q, (x + y) * 0.7071, (x - y) * 0.7071
        figure = (s % p < 1.6) | (t % p < 1.6)
    elif name == "rings":
        p = 6.5 * q
        figure = np.hypot(x, y) % p < 0.45 * p
    elif name == "sectors":
        figure = (np.arctan2(y, x) * (4 / np.pi) + a) % 2 < 0.9
    elif name == "waves":
        p = 6.0 * q
        figure = (y + 1.8 * np.sin(x * 0.7 / q + 6 * b) + a * p) % p < 0.42 * p
    elif name == "grid":
        p = 6.0 * q
        figure = ((x + a * p) % p < 1.5) | ((y + b * p) % p < 1.5)
    elif name == "specks":
        p = 3.8 * q
        figure = (
            (np.sin(np.floor(x / p) * 12.99 + np.floor(y / p) * 78.23 + 9 * a) > 0.1)
            & (x % p < 2)
            & (y % p < 2)
        )
    elif name == "dapples":
        figure = np.sin(0.55 / q * x + 6 * a) + np.sin(0.6 / q * y + 6 * b) + np.sin(0.4 / q * (x + y)) > 0.5
    else:
        raise ValueError(f"unknown pattern {name!r}")
    return figure.astype(np.float32)


def tone(name: str, paint: Float[np.ndarray, " c"], rng: np.random.Generator) -> Float[np.ndarray, " c"]:
    """Draws the RGB colour of a pattern's figure on an object of colour `paint`.

    White, which would be invisible on a white object, is replaced by black there.
    """
    if name == "dark":
        return (paint * rng.uniform(0.35, 0.5)).astype(np.float32)
    light, dark = rng.uniform(225, 250), rng.uniform(15, 40)
    return np.full(3, light if name == "white" and paint.min() < 200 else dark, np.float32)


@functools.lru_cache(maxsize=8)
def grid(size: int) -> tuple[Float[np.ndarray, "s s"], Float[np.ndarray, "s s"]]:
    """Returns the positions (x, y) of the pixel centres of a square image, from -1 to 1."""
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def _smooth(rng: np.random.Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """Draws smooth noise in about -0.5..0.5, with `rows` by `columns` independent values."""
    noise = rng.random((max(2, rows), max(2, columns)), dtype=np.float32) - 0.5
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=8)
def _cobbles(size: int) -> np.ndarray:
    """Draws a sheet of cobblestones four images long, 0 in the joints to 1; images use random windows of it.

    Its cell borders (distance to the second nearest seed minus that to the nearest) would take too long for each image.
    """
    rng = np.random.default_rng(0)
    n, cell = 4 * size, 9.0 * size / 64
    cells = int(np.ceil(n / cell)) + 2
    seeds = (
        np.mgrid[:cells, :cells].transpose(1, 2, 0) - 0.5 + rng.uniform(-0.35, 0.35, (cells, cells, 2))
    ) * cell
    yy, xx = np.mgrid[:n, :n].astype(np.float32)
    row, column = (yy / cell + 0.5).astype(int), (xx / cell + 0.5).astype(int)
    near = []
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            s = seeds[np.clip(row + dy, 0, cells - 1), np.clip(column + dx, 0, cells - 1)]
            near.append(np.hypot(yy - s[..., 0], xx - s[..., 1]))
    two = np.partition(np.stack(near), 1, axis=0)[:2]
    tone = rng.uniform(0.8, 1.0, (cells, cells))[row, column]
    return (np.clip((two[1] - two[0]) / (2.6 * size / 64), 0.15, 1) * tone).astype(np.float32)


def background(name: str, size: int, rng: np.random.Generator) -> Float[np.ndarray, "s s 3"]:
    """Draws a background texture, RGB in 0..255 before the light.

    No two backgrounds have both the same base colour and the same structure.
    """
    x, y = grid(size)
    u, v = (x + 1) * 32, (y + 1) * 32
    grain = rng.random((size, size), dtype=np.float32) - 0.5
    a, b, c = rng.random(3)
    if name == "grass":  # green, upright blades
        base, m = (70, 135, 50), 0.8 * _smooth(rng, size, 9, 34) + 0.25 * grain
    elif name == "sand":  # light tan, fine grain
        base, m = (214, 184, 130), 0.28 * grain + 0.12 * _smooth(rng, size, 4, 4)
    elif name == "water":  # blue, level ripples that bend
        ripple = np.sin(v * (0.5 + 0.25 * a) + 1.6 * np.sin(u * 0.22 + 6 * b) + 6 * c)
        base, m = (50, 110, 170), 0.2 * ripple + 0.1 * _smooth(rng, size, 6, 3)
    elif name == "brick":  # red-brown, staggered courses with light joints
        h = 6 + 2.5 * a
        row, across = np.floor((v + b * h) / h), u + c * h
        joint = ((v + b * h) % h < 1.4) | ((across + row % 2 * h) % (2 * h) < 1.4)
        base, m = (165, 85, 65), 0.42 * joint + 0.1 * grain
    elif name == "snow":  # bluish white, soft drifts; darker than the white of patterns, to set them off
        base, m = (202, 212, 228), 0.25 * _smooth(rng, size, 3, 4) + 0.05 * grain
    elif name == "wood":  # dark brown, upright planks with black seams and a grain along them
        w = 9 + 4 * a
        seam = (u + b * w) % w < 1.3
        plank = np.sin(np.floor((u + b * w) / w) * 2.4 + 6 * c)
        base, m = (120, 78, 42), 0.13 * plank - 0.6 * seam + 0.45 * _smooth(rng, size, 3, 32)
    elif name == "stone":  # grey, cobbles with dark joints
        i, j = int(b * 3 * size), int(c * 3 * size)
        base, m = (150, 150, 155), 0.9 * (_cobbles(size)[i : i + size, j : j + size] - 0.75) + 0.1 * grain
    elif name == "sky":  # light blue, large soft white clouds
        cloud = np.clip(2.6 * _smooth(rng, size, 4, 4) + 0.2 + 0.6 * _smooth(rng, size, 9, 6), 0, 1)[
            ..., None
        ]
        sky = (1 - cloud) * np.array((105, 165, 235), np.float32) + cloud * np.array(
            (222, 226, 234), np.float32
        )
        return sky.astype(np.float32)
    elif name == "gravel":  # dark grey, coarse grain
        base, m = (95, 92, 90), 1.1 * _smooth(rng, size, 32, 32)
    elif name == "mud":  # dark olive, broad soft blots
        base, m = (80, 66, 38), 0.7 * _smooth(rng, size, 7, 7)
    elif name == "straw":  # yellow, slanting fibres both ways
        weave = np.sin((u + v) * 0.9 + 3 * a) * np.sin((u - v) * 0.9 + 3 * b)
        base, m = (205, 175, 60), 0.22 * weave + 0.2 * grain
    elif name == "marble":  # off-white, dark veins
        vein = np.abs(_smooth(rng, size, 5, 5) + 0.4 * _smooth(rng, size, 12, 12))
        base, m = (225, 220, 215), -0.5 * np.clip(1 - vein / 0.06, 0, 1)
    else:
        raise ValueError(f"unknown background {name!r}")
    return (1 + m).astype(np.float32)[..., None] * np.array(base, np.float32)
