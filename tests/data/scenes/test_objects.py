"""One class an image: which classes, where and how they look, and captions that are true and name them."""

import itertools
import time

import numpy as np
import pytest

from ovseg_jax.data.scenes.layout import thing_window
from ovseg_jax.data.scenes.objects import SceneObjects
from ovseg_jax.data.scenes.source import draw
from ovseg_jax.data.scenes.world import SIZES, World
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.words import split_words


@pytest.mark.parametrize("size", SIZES)
def test_a_class_and_its_thing_are_one_another(size):
    world = World.of_size(size)
    assert [world.thing_class(*world.thing_of(k)) for k in range(world.num_things)] == list(
        range(world.num_things)
    )


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_each_split_shows_its_classes(size):
    train, test = SceneObjects("train", 2, size=size), SceneObjects("test", 3, size=size)
    groups = train.classes.groups
    assert train.classes.names == test.classes.names == World.of_size(size).class_list().names
    assert sorted(set(train.labels)) == sorted({*groups["seen"], *groups["stuff"]})
    assert (np.bincount(test.labels) == 3).all() and len(test) == 3 * len(test.classes)
    assert test.labels.dtype == np.int32
    for split, group in (("train", "seen"), ("test", "held_out"), ("validation", "stuff")):
        assert tuple(SceneObjects(split, 1, size=size, group=group).labels) == groups[group]
    for source in (train, test):
        for index in range(0, len(source), 7):
            layout = source.layout(index)
            shown = [source.world.thing_class(t.noun, t.colour, t.pattern) for t in layout.things]
            shown = shown or [source.world.stuff_class(k) for k in layout.stuff]
            assert shown == [source.labels[index]] == [source[index]["label"]]


def test_things_on_one_colour():
    """The same things, and stuff as it was."""
    plain, filled = (SceneObjects("test", 2, size="tiny", fill=fill) for fill in (None, (0.0, 0.0, 9.4)))
    for index in range(len(plain)):
        a, b, layout = plain[index]["image"], filled[index]["image"], plain.layout(index)
        _, segments = draw(
            plain.world, layout, 32, np.random.default_rng(0)
        )  # where things are, whatever the paint
        thing = segments > len(layout.stuff) if layout.things else np.ones((32, 32), bool)
        np.testing.assert_array_equal(b[thing], a[thing])
        assert (b[~thing] == (0, 0, 9)).all()
    with pytest.raises(UserError, match=r"scene_objects: fill=.* is not three numbers"):
        SceneObjects(fill=(300.0, 0.0, 0.0))


def test_an_image_follows_from_class_and_shot():
    few = SceneObjects("test", 2, size="small", group="held_out")
    many = SceneObjects("test", 5, size="small")
    many[0]  # what was read before must not matter
    for index in (0, 1, 7):
        label, shot = divmod(index, 2)
        a, b = few[index], many[5 * many.classes.groups["held_out"][label] + shot]
        assert a["label"] == b["label"] and a["captions"] == b["captions"] and a["image_id"] == b["image_id"]
        np.testing.assert_array_equal(a["image"], b["image"])
    for other in (
        few[1],
        SceneObjects("validation", 2, size="small", group="held_out")[0],
        SceneObjects("test", 2, size="small", group="held_out", seed=1)[0],
    ):
        assert not np.array_equal(few[0]["image"], other["image"])
    with pytest.raises(IndexError):
        few[len(few)]


def test_the_thing_is_large_and_has_its_colour():
    source = SceneObjects("test", 1, image_size=64)
    world, shares = source.world, []
    for index in range(0, world.num_things, 10):  # the plain ones
        layout = source.layout(index)
        window, _, _, mask = thing_window(world, layout.things[0], 64)
        shares.append(mask.sum() / 64**2)
        colour = source[index]["image"][window][mask].mean(0)
        paint = np.array(world.colours[layout.things[0].colour][1], float)
        assert np.ptp(paint) == 0 or np.corrcoef(colour, paint)[0, 1] > 0.8, source.classes.display(index)
    assert min(shares) > 0.08 and 0.25 < np.mean(shares) < 0.6
    assert len({source.layout(k).stuff for k in range(100)}) == len(world.stuff)


def _true(caption, source, index):
    """Whether each word for a noun, colour, pattern or stuff is of what the image shows."""
    world, layout = source.world, source.layout(index)
    thing = layout.things[0] if layout.things else None
    shown = {name for k in layout.stuff for name in world.stuff[k]}
    known = {name for names in world.stuff for name in names}
    known |= {name for noun in world.nouns for name in noun.names}
    known |= {name for name, _ in world.colours} | {p.name for p in world.patterns}
    if thing:
        shown |= {*world.nouns[thing.noun].names, world.colours[thing.colour][0]}
        shown |= {world.patterns[thing.pattern].name} if world.patterns else set()
    return known & set(split_words(caption)) <= shown


@pytest.mark.parametrize("size", ["small", "large"])
def test_captions_are_true_and_hold_names_and_prompts(size):
    source = SceneObjects("train", 40 if size == "small" else 1, size=size)
    captions = list(source.captions())
    spoken = [source[index]["captions"] for index in range(0, len(source), 50)]
    per = len(spoken[0])
    assert spoken == [captions[per * index : per * (index + 1)] for index in range(0, len(source), 50)]
    for index, caption in enumerate(captions):
        assert _true(caption, source, index // per), caption
        assert caption == " ".join(split_words(caption))
    names = {name for k in set(source.labels) for name in source.classes.names[k]}
    bare = sum(caption in names for caption in captions) / len(captions)
    assert 0.1 < bare < 0.4
    # Of others some adjectives are left out, which leaves nouns to be learned by themselves.
    nouns = {name.split()[-1] for name in names}
    assert 0.02 < sum(caption in nouns for caption in captions) / len(captions) < 0.3
    if size == "small":
        assert names <= set(captions)
    prompted = [c for c in captions if c.startswith(("a photo of a ", "a picture of a ", "an image of a "))]
    assert len(prompted) > 0.05 * len(captions)
    vocabulary = {word for caption in captions for word in caption.split()}
    assert vocabulary >= {word for name in names for word in name.split()}
    assert vocabulary >= {"a", "an", "the", "photo", "picture", "image", "of", "on"}


def test_captions_of_training_never_speak_of_held_out_pairs():
    source = SceneObjects("train", 6, size="small")
    held_out = {name for k in source.classes.groups["held_out"] for name in source.classes.names[k]}
    said = {" ".join(pair) for caption in source.captions() for pair in itertools.pairwise(caption.split())}
    assert not said & held_out


@pytest.mark.parametrize(
    "arguments",
    [dict(split="dev"), dict(size="huge"), dict(image_size=8), dict(shots=0), dict(group="thing"),
     dict(group="held_out")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments):
    with pytest.raises(UserError, match=str(next(iter(arguments.values())))):
        SceneObjects(**arguments)


def test_fast_enough_to_draw_while_training():
    """Well under a millisecond an image on one core; the limit allows for a busy machine."""
    source = SceneObjects("test", 1)
    times = []
    for index in range(0, 2400, 24):
        start = time.process_time()
        source[index]
        times.append(time.process_time() - start)
    assert np.median(times) < 0.01
