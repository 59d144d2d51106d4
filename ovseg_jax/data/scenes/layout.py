"""Layouts of scenes: descriptions without pixels, from which images and captions are made.

Visibility is decided on a coarse grid of fixed size, so that a scene is the same at every resolution and captions need
no drawing.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from ovseg_jax.data.scenes import render as scenes_render
from ovseg_jax.data.scenes.world import World

COARSE = 32  # side of the grid on which visibility is decided
MAX_THINGS = 3
RADIUS = (0.42, 0.66)  # of half the image's side
CENTRE = 0.75  # centres lie within +-0.75: some objects are cut off by the border
TILT = 0.6  # radians either way
MIN_AREA = 0.036  # of the image, visible when placed
MIN_VISIBLE = 0.65  # share of an object's area that later objects must leave
MIN_STUFF = 0.06  # of the image, that objects must leave of each background


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object: indices into the world's tables, centre and radius in half image sides, tilt in radians."""

    noun: int
    colour: int
    pattern: int
    x: float
    y: float
    radius: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """One or two backgrounds and one to three things, back to front.

    `horizon` is (height, slope) of the line below which the second background lies, None with a single
    background.
    """

    stuff: tuple[int, ...]
    horizon: tuple[float, float] | None
    things: tuple[Thing, ...]


def lower_part(layout: Layout, size: int) -> Bool[np.ndarray, "s s"]:
    """Returns the mask of the second background on a square grid of `size`; all False with a single background."""
    x, y = scenes_render.grid(size)
    if layout.horizon is None:
        return np.zeros((size, size), bool)
    return y > layout.horizon[0] + layout.horizon[1] * x


def thing_window(
    world: World, thing: Thing, size: int
) -> tuple[tuple[slice, slice], Float[np.ndarray, "h w"], Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Returns the part of a square grid of `size` that a thing may cover: slices, own coordinates (u, v), mask."""
    outline = world.nouns[thing.noun].outline
    reach = thing.radius * scenes_render.extent(outline)
    lo = [max(0, int((c - reach + 1) * size / 2)) for c in (thing.y, thing.x)]
    hi = [min(size, int((c + reach + 1) * size / 2) + 1) for c in (thing.y, thing.x)]
    window = (slice(lo[0], hi[0]), slice(lo[1], hi[1]))
    x, y = scenes_render.grid(size)
    dx, dy = (
        (x[window] - np.float32(thing.x)) / np.float32(thing.radius),
        (y[window] - np.float32(thing.y)) / np.float32(thing.radius),
    )
    cos, sin = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    return window, u, v, scenes_render.inside(outline, u, v)


def place(
    kind: tuple[int, int, int], rng: np.random.Generator, centre: float, radius: tuple[float, float]
) -> Thing:
    """Draws a thing of a kind (noun, colour, pattern): position within +-centre, radius in a range, and tilt."""
    x, y, size, angle = rng.random(4).tolist()
    return Thing(
        *kind,
        x=(2 * x - 1) * centre,
        y=(2 * y - 1) * centre,
        radius=radius[0] + (radius[1] - radius[0]) * size,
        angle=(2 * angle - 1) * TILT,
    )


def draw_layout(world: World, rng: np.random.Generator, *, allow_held_out: bool) -> Layout:
    """Draws a layout; without `allow_held_out` no thing is of a held-out class.

    Nouns, colours and patterns are drawn uniformly, held-out classes being rejected. There is at least one thing.
    """
    cells = COARSE * COARSE
    first, second = rng.choice(len(world.stuff), 2, replace=False).tolist()
    layout = Layout((first,), None, ())
    if rng.random() < 0.5:
        layout = Layout((first, second), (rng.uniform(-0.35, 0.35), rng.uniform(-0.3, 0.3)), ())
    owner = lower_part(layout, COARSE).astype(np.int8)  # 0, 1: backgrounds; then things
    placed = len(layout.stuff)
    least = [MIN_STUFF * cells] * placed
    things: list[Thing] = []
    wanted = int(rng.integers(1, MAX_THINGS + 1))
    attempts = 0
    while len(things) < wanted and (attempts < 5 * wanted or not things):
        attempts += 1
        noun, colour = int(rng.random() * len(world.nouns)), int(rng.random() * len(world.colours))
        pattern = int(rng.random() * len(world.patterns)) if world.patterns else 0
        if not allow_held_out and world.is_held_out(noun, colour, pattern):
            continue
        thing = place((noun, colour, pattern), rng, CENTRE, RADIUS)
        window, _, _, mask = thing_window(world, thing, COARSE)
        area = int(mask.sum())
        if area < MIN_AREA * cells:
            continue
        after = owner.copy()
        after[window][mask] = len(least)
        left = np.bincount(after.ravel(), minlength=len(least))
        if any(left[k] < least[k] for k in range(len(least))):
            continue
        owner = after
        least.append(MIN_VISIBLE * area)
        things.append(thing)
    return dataclasses.replace(layout, things=tuple(things))
