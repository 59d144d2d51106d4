"""Texts about scenes: image captions, tags, region captions and region tags.

Captions are incomplete, like those that people write: a share `MENTION` of the objects is named, `COLOUR` of these with
their colour, `STUFF` of the backgrounds; `SYNONYM` of the words are a less usual name. A caption never names anything
that the image does not show.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ovseg_jax.data.scenes.layout import Layout, Thing
from ovseg_jax.data.scenes.world import World

MENTION = 0.9
COLOUR = 0.9
PATTERN = 0.85
STUFF = 0.85
SYNONYM = 0.15

_VERBS = ("lies", "sits", "rests", "is", "stays", "waits")
_OPENINGS = ("there is", "we see", "one can see", "you can see", "here is")
_WRAPS = ("a photo of", "a picture of", "a picture with", "an image of")
_PROMPTS = ("a photo of", "a picture of", "an image of", "")


class Speaker:
    """A random source of words and sentences about one layout."""

    def __init__(self, world: World, layout: Layout, rng: np.random.Generator):
        self.world = world
        self.layout = layout
        self.rng = rng

    def _pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.random() * len(options))]

    def _name(self, names: Sequence[str]) -> str:
        if len(names) > 1 and self.rng.random() < SYNONYM:
            return names[1 + int(self.rng.random() * (len(names) - 1))]
        return names[0]

    def noun_phrase(self, thing: Thing) -> str:
        """Returns a phrase such as "a red ball", sometimes without colour or pattern."""
        words = []
        if self.world.patterns and self.rng.random() < PATTERN:
            words.append(self.world.patterns[thing.pattern].name)
        if self.rng.random() < COLOUR:
            words.append(self.world.colours[thing.colour][0])
        words.append(self._name(self.world.nouns[thing.noun].names))
        article = "one" if self.rng.random() < 0.1 else ("an" if words[0][0] in "aeiou" else "a")
        return f"{article} {' '.join(words)}"

    def stuff_name(self, stuff: int) -> str:
        """Returns a background's name or, less often, a synonym."""
        return self._name(self.world.stuff[stuff])

    def relation(self, a: int, b: int) -> str:
        """Returns a preposition that is true of things `a` and `b`, layout indices; later things are in front."""
        first, second = self.layout.things[a], self.layout.things[b]
        dx, dy = first.x - second.x, first.y - second.y
        if np.hypot(dx, dy) < 0.8 * (first.radius + second.radius) and self.rng.random() < 0.3:
            return "over" if a > b else "behind"
        if abs(dy) > abs(dx):
            return self._pick(("above", "over") if dy < 0 else ("below", "under"))
        return self._pick(("beside", "near", "by"))

    def _ground(self, share: float) -> str:
        named = [self.stuff_name(k) for k in self.layout.stuff if self.rng.random() < share]
        return " and ".join(f"the {n}" for n in named)

    def caption(self) -> str:
        """Returns one sentence about the image."""
        rng, things = self.rng, self.layout.things
        named = [k for k in range(len(things)) if rng.random() < MENTION] or [int(rng.random() * len(things))]
        rng.shuffle(named)
        said = self.noun_phrase(things[named[0]])
        verb = self._pick(_VERBS) if rng.random() < 0.4 else ""
        if verb:
            said += f" {verb}"
        for before, k in itertools.pairwise(named):
            said += f" {self.relation(before, k)} {self.noun_phrase(things[k])}"
        ground = self._ground(STUFF)
        if ground:
            ground = f"{self._pick(('on', 'on', 'against', 'upon'))} {ground}"
        elif verb in ("is", "lies", "stays", "rests") and len(named) == 1:
            ground = "here"
        form = rng.random()
        if verb:
            return f"{said} {ground}".strip()
        if ground and ground != "here" and form < 0.25:
            return f"{ground} {self._pick(_OPENINGS)} {said}"
        if form < 0.55:
            return f"{self._pick(_OPENINGS)} {said} {ground}".strip()
        if form < 0.65:
            return f"{self._pick(_WRAPS)} {said} {ground}".strip()
        return f"{said} {ground}".strip()

    def tags(self) -> list[str]:
        """Returns words for the image, each once: nouns, adjectives and backgrounds."""
        words = [w for k in range(len(self.layout.things)) for w in self.thing_tags(self.layout.things[k])]
        return sorted(set(words + [self.world.stuff[k][0] for k in self.layout.stuff]))

    def thing_tags(self, thing: Thing) -> list[str]:
        """Returns the usual noun, the colour and the pattern of a thing."""
        words = [self.world.nouns[thing.noun].names[0], self.world.colours[thing.colour][0]]
        return words + ([self.world.patterns[thing.pattern].name] if self.world.patterns else [])

    def region_captions(self) -> list[list[str]]:
        """Returns one caption for each segment (backgrounds first, then things), in its surroundings."""
        regions = [[f"the {self.stuff_name(k)} in the background"] for k in self.layout.stuff]
        for k, thing in enumerate(self.layout.things):
            others = [o for o in range(len(self.layout.things)) if o != k]
            said = self.noun_phrase(thing)
            if others and self.rng.random() < 0.5:
                other = others[int(self.rng.random() * len(others))]
                said += f" {self.relation(k, other)} {self.noun_phrase(self.layout.things[other])}"
            regions.append([said])
        return regions

    def region_tags(self) -> list[list[str]]:
        """Returns the words of each segment."""
        return [[self.world.stuff[k][0]] for k in self.layout.stuff] + [
            self.thing_tags(t) for t in self.layout.things
        ]


class ObjectSpeaker(Speaker):
    """A random source of captions of an image of one class: its name, a prompt with it, or a sentence.

    Half of the names lose some of their adjectives. Otherwise colour and pattern would distinguish almost all images of
    a batch, and the nouns would hardly be learned.
    """

    def __init__(self, world: World, layout: Layout, names: Sequence[str], rng: np.random.Generator):
        """Creates a `Speaker` with the class's `names`, which are equally likely."""
        super().__init__(world, layout, rng)
        self.names = names

    def caption(self) -> str:
        """Returns a caption: "spotty red ball", "a photo of a spotty red ball on grass", or a sentence."""
        form = self.rng.random()
        if self.layout.things and form < 0.25:
            return super().caption()
        said = self._pick(self.names)
        if self.rng.random() < 0.5:
            *adjectives, noun = said.split()
            said = " ".join([word for word in adjectives if self.rng.random() < 0.5] + [noun])
        if form < 0.5:
            return said
        first, ground = "", ""
        if self.layout.things:
            first = "an" if said[0] in "aeiou" else "a"
            if self.rng.random() < 0.3:
                ground = f"on {self.stuff_name(self.layout.stuff[0])}"
        parts = (self._pick(_PROMPTS), self._pick((first, "the")), said, ground)
        return " ".join(part for part in parts if part)
