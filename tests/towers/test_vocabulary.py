"""Which words a text side knows."""

import itertools

import pytest
from ml_collections import ConfigDict

from ovseg_jax.data.scenes.objects import SceneObjects
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.methods import method_type
from ovseg_jax.towers.vocabulary import counted_words, spoken_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class Stream(Source):
    """Captions without an end, which must not be collected."""

    name, classes = "stream", ClassList((("dog of the sea",),), (0,), (True,))
    provides = frozenset({"image", "captions", "tags"})

    def texts(self, field):
        return (f"a red {field[:-1]} and a cat" for _ in itertools.count())


class Silent(Stream):
    provides = frozenset({"image", "segments"})


def test_counted_words_are_bounded_and_hold_the_names():
    words = counted_words({"count_captions": 20, "min_count": 3, "extra_words": ("photo",)}, Stream())
    assert set(words.words) == {"<pad>", "red", "caption", "cat", "photo", "dog", "sea"}
    assert counted_words({}, Stream(), captions=False).words == ("<pad>", "dog", "sea")


def test_spoken_words_are_those_of_the_texts_in_a_batch(tmp_path):
    own = ["a", "and", "cat", "dog", "of", "red", "sea", "the"]
    data = {"count_captions": 5, "min_count": 99}
    assert spoken_words(data, Stream()).words == ("<pad>", "dog", "of", "sea", "the")
    assert set(spoken_words(data, Stream(), ("image", "tokens")).words) == {"<pad>", "caption", *own}
    assert set(spoken_words(data, Stream(), ("tags", "tokens")).words) == {"<pad>", "caption", "tag", *own}
    scenes = Scenes("train", 3, size="tiny")
    assert "background" in spoken_words({}, scenes, ("box_tokens",)) and "background" not in spoken_words(
        {}, scenes
    )
    WordList(["x"]).save(tmp_path / "words.json")
    for count in (counted_words, spoken_words):
        assert count({"words": tmp_path / "words.json"}, Stream()).words == ("<pad>", "x")
    (tmp_path / "words.json").write_text('["<pad>"]')
    for count in (counted_words, spoken_words):
        with pytest.raises(UserError, match=r"data\.words: .*words\.json lists no word"):
            count({"words": tmp_path / "words.json"}, Stream())


def test_methods_say_which_words_they_need():
    def words(source, method="openseg", masks=0.0, captions=1.0, **towers):
        loss = dict(mask_weight=masks, grounding_weight=captions)
        config = ConfigDict(dict(method=method, loss=loss, data=dict(count_captions=9), towers=towers))
        return method_type(config.method).vocabulary(config, source)

    assert "red" in words(Stream()) and "red" not in words(Stream(), captions=0.0)
    with pytest.raises(UserError, match=r"'stream' has no segments, .* mask loss .*mask_weight=0 trains"):
        words(Stream(), masks=1.0)
    with pytest.raises(
        UserError, match=r"'stream' has no caption.*loss\.grounding_weight=0 trains masks alone"
    ):
        words(Silent())
    # Captions are read for a tokeniser of this run's words alone.
    assert "red" in words(Stream(), "clip", tokenizer="words")
    assert words(Stream(), "clip", tokenizer="somewhere") == ("<pad>", "dog", "of", "sea", "the")
    objects = SceneObjects("train", 1, size="tiny", count=2)
    assert "photo" not in words(objects, "pomp", tokenizer="words")
