"""The text side: lookups, phrases, a frozen table from a file, and what it says of words it never saw."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.towers.text_table import TextTable
from ovseg_jax.vocab.words import WordList

WORDS = WordList(["red", "dog", "grass", "polar bear", "berry"])


def table(**config):
    return TextTable(ConfigDict(config), WORDS, 4)


def embed(text_table, params, texts):
    return text_table.encode(params, texts)


def test_a_phrase_is_the_normalised_sum_of_its_words():
    t = table()
    params = t.init(jax.random.key(0))
    red, dog, both = np.asarray(embed(t, params, ["red", "dog", "a red dog"]))
    expected = (red + dog) / np.linalg.norm(red + dog)
    np.testing.assert_allclose(both, expected, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm([red, dog, both], axis=-1), 1, rtol=1e-5)


def test_known_phrases_plurals_and_case():
    ids, valid = table().tokenize(["Polar  Bear", "dogs", "berries on the grass"])
    index = WORDS.index
    assert ids[0, 0] == index["polar bear"]
    assert ids[1, 0] == index["dog"]
    assert [index["berry"], index["grass"]] == ids[2][valid[2]].tolist()


@pytest.mark.parametrize("texts", [[], ["  "], ["the of"]])
def test_nothing_to_embed_is_an_error(texts):
    with pytest.raises(UserError):
        table().tokenize(texts)


def test_an_unknown_word_is_named_with_near_ones():
    with pytest.raises(UserError, match=r"never seen 'gras'.*grass"):
        table().tokenize(["red gras"])


def save(path, words, dim=4):
    np.savez(path, words=np.array(words), vectors=np.arange(len(words) * dim).reshape(len(words), dim))
    return str(path)


def test_a_frozen_table_holds_the_files_vectors(tmp_path):
    path = save(tmp_path / "vectors.npz", [*WORDS.words[::-1], "more"])
    params = table(learned=False, vectors=path).init(jax.random.key(0))
    rows = {w: np.arange(4) + 4 * i for i, w in enumerate(WORDS.words[::-1])}
    np.testing.assert_array_equal(params["table"], [rows[w] for w in WORDS.words])


@pytest.mark.parametrize(
    ("words", "dim", "message"),
    [(["red"], 4, "no vector for 4 words"), (list(WORDS.words), 3, "model.embed_dim")],
)
def test_a_file_that_does_not_fit_says_so(tmp_path, words, dim, message):
    path = save(tmp_path / "vectors.npz", words, dim)
    with pytest.raises(UserError, match=message):
        table(learned=False, vectors=path).init(jax.random.key(0))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        table(vectors=str(tmp_path / "none.npz")).init(jax.random.key(0))
    (tmp_path / "bad.npz").write_text("not a zip")
    with pytest.raises(UserError, match=r"bad\.npz cannot be read"):
        table(vectors=str(tmp_path / "bad.npz")).init(jax.random.key(0))


def test_a_frozen_table_without_a_file_is_refused():
    with pytest.raises(UserError, match=r"text\.vectors"):
        table(learned=False)
