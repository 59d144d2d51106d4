"""Small word lists by meaning: the words of a caption that an augmentation invalidates.

The lists cover common words in captions of photographs that are wrong after a hue shift, a blur or a flip. They are not
complete; a config adds words by the rule "words:...".
"""

_COLOUR = """
amber aqua auburn azure beige blonde blond blue bluish bronze brown brownish burgundy chestnut colored
colorful coloured colourful copper coral cream crimson cyan fuchsia ginger gold golden green greenish indigo
ivory khaki lavender lilac lime magenta maroon mauve multicolored multicoloured multicolor mustard navy ochre
olive orange pastel peach pink pinkish plum purple purplish red reddish rose ruby rust rusty salmon sapphire
scarlet tan taupe teal turquoise ultramarine vermilion violet yellow yellowish
"""

_SHADE = """
black blackish bright charcoal dark dim gray grayish grey greyish light monochrome pale silver silvery white
whitish
"""

_PATTERN = """
banded bordered camouflage check checked checker checkerboard checkered chequered chevron crosshatched dotted
flecked floral flowered flowery geometric gingham hatched herringbone houndstooth lattice latticed lined
marbled mottled paisley patchwork patterned pinstripe pinstriped plaid plain polka polka-dot polka-dotted
ringed scaled scaly speckled spotted spotty starred starry streaked striped stripy swirled tartan tie-dye
tiled wavy woven zebra-striped zigzag
"""

_SIZE = """
big enormous giant gigantic huge large little long massive medium miniature mini short small tall thick thin
tiny wide narrow
"""

_SIDE = "left right leftmost rightmost left-hand right-hand lefthand righthand clockwise counterclockwise"

_STUFF = """
air asphalt background beach bricks brick bush bushes carpet ceiling clay cloud clouds concrete countryside
desert dirt dust earth fabric field fields floor fog foliage forest grass grassland gravel ground hay hedge
hill hills hillside ice jungle lake land landscape lawn leaves marble marsh meadow metal mist moss mountain
mountains mud ocean pasture pavement pebbles plains planks plaster pond prairie river road rock rocks rug sand
sandy savanna sea shore shrubs sidewalk sky slope smoke snow soil stone stones straw street surf swamp terrain
tile tiles timber tree trees turf vegetation wall walls water waters waves weeds wood wooden woods
"""

LEXICON: dict[str, frozenset[str]] = {
    "colour": frozenset(_COLOUR.split()),
    "shade": frozenset(_SHADE.split()),
    "pattern": frozenset(_PATTERN.split()),
    "size": frozenset(_SIZE.split()),
    "side": frozenset(_SIDE.split()),
    "stuff": frozenset(_STUFF.split()),
}
"""Words for hue, lightness, surface pattern, size, and left and right, and names of stuff."""

FUNCTION_WORDS = frozenset("a an the of in on at with and or to for from by is are its".split())
"""Words of a name that have no meaning of their own and are not embedded."""
