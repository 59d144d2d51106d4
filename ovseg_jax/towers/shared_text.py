"""CLIP's text tower for many texts that begin alike, such as names in templates: a shared beginning is computed once.

The tower is causal, so that the hidden state of a token depends on the tokens before it alone. Texts are therefore laid
out as trees: the tokens of a tree are those of all its texts in alphabetical order, without the tokens that a text has
in common with the one before it, and a token attends to its ancestors and to itself. Features equal those of the tower
applied to each text. Three names in CLIP's 80 templates have half as many tokens this way.

All trees have one size, and come in few numbers, so that other texts rarely need another compilation.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.towers.packed_text import finish, norm, queries_keys_values

# Tokens of a tree, if no text is longer: in larger ones attention costs more than the tokens that they save.
SIZE = 128
# Trees that are computed at once.
MOST = 16


class Trees(NamedTuple):
    """Texts as trees of tokens, in depth-first order.

    Attributes:
      ids: the tokens.
      place: the position of each in its texts.
      after: the number of the first token that is not below this one; of padding, the next number.
      last: the last token of each text; -1 for padding.
    """

    ids: Int[Any, "b t"]
    place: Int[Any, "b t"]
    after: Int[Any, "b t"]
    last: Int[Any, "b k"]


def trees(
    ids: Int[np.ndarray, "n l"], length: Int[np.ndarray, " n"]
) -> Iterator[tuple[Trees, Int[np.ndarray, " m"]]]:
    """Lays out texts as up to `MOST` trees at a time.

    Args:
      ids: the tokens of each text, left-aligned, with those of the beginning and the end.
      length: the number of tokens of each text.

    Yields:
      Trees, and the numbers of their texts in the order of `last`, without padding.
    """
    size = max(SIZE, ids.shape[1])
    texts = [tuple(row[:n]) for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
    whole: list[tuple[list[int], list[int], list[int], list[int], list[int]]] = []
    path: list[int] = []  # the tokens of the text before, by their numbers in the tree
    before: tuple[int, ...] = ()
    for text in sorted(range(len(texts)), key=texts.__getitem__):
        tokens = texts[text]
        shared = next((i for i, (a, b) in enumerate(zip(tokens, before, strict=False)) if a != b), None)
        shared = min(len(tokens), len(before)) if shared is None else shared
        if not whole or len(whole[-1][0]) + len(tokens) - shared > size or len(whole[-1][3]) == size // 2:
            whole.append(([], [], [], [], []))
            path, shared = [], 0
        words, place, after, last, own = whole[-1]
        for number in path[shared:]:
            after[number] = len(words)
        del path[shared:]
        for i in range(shared, len(tokens)):
            path.append(len(words))
            words.append(tokens[i])
            place.append(i)
            after.append(size)
        last.append(path[-1])
        own.append(text)
        before = tokens
    for at in range(0, len(whole), MOST):
        some = whole[at : at + MOST]
        # A power of two, to limit compilations.
        rows = 1 << (len(some) - 1).bit_length()
        made = Trees(*(np.zeros((rows, n), np.int32) for n in (size, size, size, size // 2)))
        made.after[:], made.last[:] = np.arange(1, size + 1), -1
        for row, (words, place, after, last, _) in enumerate(some):
            for array, values in zip(made, (words, place, after, last), strict=True):
                array[row, : len(values)] = values
        yield made, np.array([text for tree in some for text in tree[4]])


def encode_trees(tower: CLIPText, weights: Mapping[str, Any], given: Trees) -> Float[Array, "b k e"]:
    """Computes the embeddings of texts, pooled as in `CLIPText`; not normalised.

    Args:
      tower: the tower's shape, activation and compute type.
      weights: `packed_text.stacked` parameters.
      given: the texts.

    Raises:
      ValueError: the tower has an adapter or a hook, which trees do not pass.
    """
    if tower.adapter is not None or tower.between is not None:
        raise ValueError("trees of texts cannot be encoded by a tower with `adapter` or `between`")
    given, number = Trees(*map(jnp.asarray, given)), jnp.arange(given.ids.shape[1])
    below = (number <= number[:, None]) & (number[:, None] < given.after[:, None])
    x = weights["Embed_0"]["embedding"][given.ids] + weights["pos_embedding"][0][given.place]
    shape, x = x.shape[:2], x.reshape(-1, x.shape[-1]).astype(tower.dtype)

    def layer(x: Array, block: Mapping[str, Any]) -> tuple[Array, None]:
        return finish(tower, block, x, _attend(tower, block, x, below)), None

    if weights.get("blocks"):
        x, _ = jax.lax.scan(layer, x, weights["blocks"])
    # Only the last token of each text is needed from the last block.
    last = (given.last + jnp.arange(shape[0])[:, None] * shape[1]).reshape(-1)
    x = finish(tower, weights["last"], x[last], _attend(tower, weights["last"], x, below)[last])
    x = norm(weights["norm"], x).astype(tower.dtype) @ weights["head"]["kernel"].astype(tower.dtype)
    return x.reshape(shape[0], -1, x.shape[-1])


def _attend(
    tower: CLIPText, block: Mapping[str, Any], x: Float[Array, "n d"], below: Bool[Array, "b t t2"]
) -> Float[Array, "n h e"]:
    """Computes attention before the projection `out`."""
    q, k, v = (y.reshape(*below.shape[:2], *y.shape[1:]) for y in queries_keys_values(tower, block, x))
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(below[:, None], scores, -jnp.inf), -1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", share, v).reshape(-1, *q.shape[2:])
