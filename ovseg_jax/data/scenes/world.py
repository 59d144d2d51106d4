"""The vocabulary of the embedded data set `scenes`: its things, colours, patterns and stuff.

A thing is a *noun* (an outline and, in the smaller worlds, a texture of its own) in a *colour*; the larger worlds
draw it in a *pattern* that a second adjective names. Worlds of different sizes are slices of the same tables:

| size   | nouns x colours x patterns | stuff | classes |
|--------|----------------------------|-------|---------|
| tiny   | 4 x 4                      | 4     | 20      |
| small  | 8 x 7                      | 8     | 64      |
| medium | 12 x 8 x 4                 | 10    | 394     |
| large  | 24 x 10 x 10               | 12    | 2412    |

The words are chosen so that a part-of-speech tagger recognises them ("spotty", not "dotted", which it takes for a verb
form), because training filters captions by part of speech.
"""

from __future__ import annotations

import dataclasses

from ovseg_jax.vocab.classes import ClassList

SIZES = ("tiny", "small", "medium", "large")


@dataclasses.dataclass(frozen=True)
class Noun:
    """A kind of thing: names (the usual one first), outline, and texture in worlds without pattern adjectives.

    A network learns a noun mostly from `pattern` and `tone` (the colour of the pattern's figure: "white", "black" or
    "dark", a darker shade of the thing's own colour); it learns outlines far more slowly.
    """

    names: tuple[str, ...]
    outline: str
    pattern: str
    tone: str


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A texture that an adjective names, with the tone of its figure."""

    name: str
    pattern: str
    tone: str


NOUNS = (
    Noun(("ball", "sphere"), "disc", "glossy", "white"),
    Noun(("ladybird", "ladybug"), "ellipse", "spots", "black"),
    Noun(("flag", "banner"), "rectangle", "stripes", "white"),
    Noun(("chessboard", "checkerboard"), "square", "checks", "black"),
    Noun(("kite",), "diamond", "lattice", "white"),
    Noun(("target", "bullseye"), "hexagon", "rings", "dark"),
    Noun(("mushroom", "toadstool"), "dome", "spots", "white"),
    Noun(("umbrella", "parasol"), "octagon", "sectors", "black"),
    Noun(("star",), "star", "specks", "white"),
    Noun(("heart",), "heart", "waves", "dark"),
    Noun(("tent",), "triangle", "stripes", "black"),
    Noun(("wheel",), "ring", "sectors", "white"),
    Noun(("flower",), "flower", "rings", "white"),
    Noun(("leaf",), "lens", "waves", "white"),
    Noun(("house",), "house", "grid", "black"),
    Noun(("moon",), "crescent", "specks", "black"),
    Noun(("gear", "cog"), "gear", "plain", "dark"),
    Noun(("cup",), "trapezoid", "grid", "white"),
    Noun(("tie",), "bowtie", "stripes", "dark"),
    Noun(("crown",), "crown", "dapples", "white"),
    Noun(("pear",), "pear", "dapples", "dark"),
    Noun(("shield",), "shield", "checks", "white"),
    Noun(("arrow",), "arrow", "lattice", "black"),
    Noun(("bone",), "bone", "plain", "white"),
)

# Name and sRGB. The first seven are at least 40 degrees of hue apart, since light (a gain of 0.65 to 1.35) and mixing
# with a pattern's black or white, as in a blur, keep the hue; red and a pink 30 degrees away were confused throughout a
# training. The last three (orange, brown, white) differ from the others by lightness.
COLOURS = (
    ("red", (220, 35, 40)),
    ("yellow", (240, 225, 45)),
    ("green", (40, 185, 60)),
    ("blue", (35, 80, 230)),
    ("purple", (125, 45, 210)),
    ("turquoise", (45, 215, 205)),
    ("pink", (250, 60, 200)),
    ("orange", (245, 130, 25)),
    ("brown", (115, 65, 30)),
    ("white", (240, 240, 240)),
)

PATTERNS = (
    Pattern("plain", "plain", "white"),
    Pattern("striped", "stripes", "white"),
    Pattern("spotty", "spots", "black"),
    Pattern("squared", "checks", "black"),
    Pattern("ringed", "rings", "dark"),
    Pattern("quilted", "lattice", "white"),
    Pattern("wavy", "waves", "dark"),
    Pattern("radial", "sectors", "black"),
    Pattern("gridded", "grid", "black"),
    Pattern("dappled", "dapples", "white"),
)

STUFF = (
    ("grass", "lawn"),
    ("sand",),
    ("water",),
    ("brick",),
    ("snow",),
    ("wood", "timber"),
    ("stone", "rock"),
    ("sky",),
    ("gravel",),
    ("mud",),
    ("straw",),
    ("marble",),
)

# nouns, colours, patterns (0: each noun has its own), stuff
_COUNTS = {"tiny": (4, 4, 0, 4), "small": (8, 7, 0, 8), "medium": (12, 8, 4, 10), "large": (24, 10, 10, 12)}


@dataclasses.dataclass(frozen=True)
class World:
    """One size of the vocabulary.

    The classes of things come first, ordered by colour, noun and pattern, then those of stuff.
    """

    nouns: tuple[Noun, ...]
    colours: tuple[tuple[str, tuple[int, int, int]], ...]
    patterns: tuple[Pattern, ...]
    stuff: tuple[tuple[str, ...], ...]

    @classmethod
    def of_size(cls, size: str) -> World:
        """Returns the world of `size`, one of `SIZES`; raises ValueError for another word."""
        if size not in _COUNTS:
            raise ValueError(f"scenes: size {size!r} is not one of {', '.join(SIZES)}")
        nouns, colours, patterns, stuff = _COUNTS[size]
        return cls(NOUNS[:nouns], COLOURS[:colours], PATTERNS[:patterns], STUFF[:stuff])

    @property
    def num_things(self) -> int:
        """The number of thing classes."""
        return len(self.colours) * len(self.nouns) * max(1, len(self.patterns))

    def thing_class(self, noun: int, colour: int, pattern: int = 0) -> int:
        """Returns the class index of a thing (`pattern` is 0 in worlds without pattern adjectives)."""
        return (colour * len(self.nouns) + noun) * max(1, len(self.patterns)) + pattern

    def thing_of(self, label: int) -> tuple[int, int, int]:
        """Returns the noun, colour and pattern of a thing class: the inverse of `thing_class`."""
        pair, pattern = divmod(label, max(1, len(self.patterns)))
        colour, noun = divmod(pair, len(self.nouns))
        return noun, colour, pattern

    def stuff_class(self, stuff: int) -> int:
        """Returns the class index of a background."""
        return self.num_things + stuff

    def is_held_out(self, noun: int, colour: int, pattern: int = 0) -> bool:
        """Tells whether a thing never occurs in the training split.

        A quarter of the colour-noun pairs is held out, spread so that every colour and every noun still occurs in most
        of its pairs; with pattern adjectives also an eighth of the pattern-noun pairs.
        """
        n = len(self.nouns)
        if any(noun == (colour + 3 * k) % n for k in range(n // 4)):
            return True
        return bool(self.patterns) and any(noun == (5 * pattern + 7 + 3 * k) % n for k in range(n // 8))

    def class_list(self) -> ClassList:
        """Returns the classes with names ("red ladybird", "red ladybug") and groups seen, held_out and stuff."""
        names: list[tuple[str, ...]] = []
        seen: list[int] = []
        held_out: list[int] = []
        for colour, (colour_name, _) in enumerate(self.colours):
            for noun, kind in enumerate(self.nouns):
                for pattern in range(max(1, len(self.patterns))):
                    adjectives = (self.patterns[pattern].name + " " if self.patterns else "") + colour_name
                    (held_out if self.is_held_out(noun, colour, pattern) else seen).append(len(names))
                    names.append(tuple(f"{adjectives} {name}" for name in kind.names))
        names += self.stuff
        things = self.num_things
        return ClassList(
            names=tuple(names),
            ids=tuple(range(len(names))),
            isthing=tuple(k < things for k in range(len(names))),
            groups={
                "seen": tuple(seen),
                "held_out": tuple(held_out),
                "stuff": tuple(range(things, len(names))),
            },
        )
