"""Where a prompt's vectors stand, and how many tokens classes take together."""

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.towers.prompt import Layout, even_order, likely_size, phrase_tokens, window_size
from ovseg_jax.vocab.word_tokenizer import WordTokenizer
from ovseg_jax.vocab.words import WordList

WORDS = WordList(["red", "ball", "very", "big"])
TOKENIZER = WordTokenizer(WORDS, 10)
RED, BALL, END = 1, 2, 6


@pytest.mark.parametrize(
    ("layout", "shared", "expected"),
    [
        (Layout(4, "end"), 4, [RED, BALL, END]),
        (Layout(4, "middle"), 2, [RED, BALL, -3, -4, END]),
        (Layout(4, "front"), 0, [RED, BALL, -1, -2, -3, -4, END]),
        (Layout(4, "end", specific=True), 0, [-1, -2, -3, -4, RED, BALL, END]),
        (Layout(3, "middle", specific=True), 0, [-1, RED, BALL, -2, -3, END]),
    ],
)
def test_layouts(layout, shared, expected):
    tokens = layout.tokens(TOKENIZER, ["ball", "red_ball"])
    assert layout.shared == shared
    assert tokens.ids[1].tolist() == expected
    assert tokens.length.tolist() == [len(expected) - 1, len(expected)]
    assert tokens.row.tolist() == ([0, 1] if layout.specific else [0, 0])


def test_whole_phrases():
    tokens = phrase_tokens(TOKENIZER, ["big red ball", "ball"])
    assert tokens.ids.tolist() == [[4, RED, BALL, END], [BALL, END, 0, 0]]
    with pytest.raises(UserError, match="empty"):
        phrase_tokens(TOKENIZER, ["ball", ""])


def test_names_without_room():
    with pytest.raises(UserError, match=r"'very big red ball'.*11 tokens.*10"):
        Layout(5).tokens(TOKENIZER, ["ball", "very big red ball"])
    assert Layout(4).tokens(TOKENIZER, ["very big red ball"]).length.tolist() == [5]


@pytest.mark.parametrize("count", [1, 7, 100, 1000])
def test_neighbours_in_even_order(count):
    rng = np.random.default_rng(count)
    length = rng.integers(2, 20, count)
    order = even_order(length)
    assert sorted(order) == list(range(count))
    assert length[order][-1] == length.min()
    for chunk in {1, min(5, count), count}:
        size = window_size(length[order], chunk)
        cut = np.pad(length[order], (0, chunk), mode="edge")
        sums = [cut[i : i + chunk].sum() for i in range(count)]
        assert max(sums) <= size < max(sums) + 8
    if count == 1000:
        assert window_size(length[order], 100) < 1.03 * 100 * length.mean()


def test_a_draw_seldom_needs_more():
    rng = np.random.default_rng(0)
    length = rng.integers(2, 20, 5000) + (rng.random(5000) < 0.02) * 30
    size = likely_size(length, 200)
    draws = [length[rng.permutation(5000)[:200]].sum() for _ in range(2000)]
    assert max(draws) <= size < 1.4 * np.mean(draws)
    share = length / length.sum()
    weighted = [length[rng.choice(5000, 200, p=share)].sum() for _ in range(500)]
    assert max(weighted) <= likely_size(length, 200, share)
    assert likely_size(length, 3) <= 3 * length.max()
