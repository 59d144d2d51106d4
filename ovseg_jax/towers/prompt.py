"""Soft prompts (CoOp; papers/000, 3.1) in the text tower: learned token vectors around class names."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.towers.packed_text import encode_packed, pack
from ovseg_jax.towers.prompt_layout import Layout, NameTokens
from ovseg_jax.vocab.tokenizers import PieceTokenizer

# Sizes of windows are multiples of this many tokens: windows of 10 instead of 16 tokens cost a TPU 14% more memory
# traffic, and save a CPU at most 3% of its time.
_ROUND = 8


def phrase_tokens(tokenizer: PieceTokenizer, texts: Sequence[str]) -> NameTokens:
    """Tokenises whole texts, for a context of length 0.

    Raises:
      UserError: there is no text, or an empty one.
    """
    if not len(texts) or not all(text.strip() for text in texts):
        raise UserError("no labels were given, or an empty one: every label needs at least one word")
    ids, valid = tokenizer(list(texts))
    skip = len(tokenizer.start)
    length = valid.sum(1).astype(np.int32) - skip
    return NameTokens(ids[:, skip : skip + int(length.max())], length, np.zeros(len(texts), np.int32))


def encode_names(
    tower: CLIPText,
    weights: Mapping[str, Any],
    start: int,
    context: Float[Array, "n m d"],
    layout: Layout,
    tokens: NameTokens,
    size: int,
    deep: Float[Array, "j m d"] | None = None,
    *,
    may_exceed: bool = False,
) -> Float[Array, "k e"]:
    """Computes the features of class names under a prompt, not normalised.

    Args:
      tower: see `encode_packed`.
      weights: see `encode_packed`.
      start: the token [SOS].
      context: the context of each class, or [1 M d] for a shared one.
      layout: the position of the context.
      tokens: the tokens of the classes.
      size: the number of tokens to compute at once, at least the total of all classes.
      deep: see `encode_packed`.
      may_exceed: whether the classes may, rarely, have more tokens than `size` (see `likely_size`); they are then
        computed in parts. Inside of a `shard_map`, weights, context and deep vectors must be varying over the devices:
        the sum of their gradients over devices must not be in a branch that only some devices take.
    """
    tokens = NameTokens(*map(jnp.asarray, tokens))
    count, width = tokens.ids.shape
    once = partial(_encode, tower, start, layout)
    inputs = weights, context, deep
    if size >= count * width or not may_exceed:
        return once(min(size, count * width), inputs, tokens)
    exceeds = tokens.length.sum() > size
    # The overflow branch reserves memory too: rematerialise it fully.
    frugal = partial(_encode, tower.clone(remat="all"), start, layout)
    # Not a `cond` between the two: each branch would copy the other's residuals, including all weights, for the
    # backward pass.
    parts = _overflow(partial(_in_parts, frugal, size), exceeds, inputs, tokens)
    return jnp.where(exceeds, parts, once(size, inputs, tokens))


def _encode(
    tower: CLIPText, start: int, layout: Layout, size: int, inputs: tuple[Any, ...], tokens: NameTokens
) -> Float[Array, "k e"]:
    """Computes the features of all classes at once; `inputs` are weights, context and deep vectors."""
    weights, context, deep = inputs
    table = weights["Embed_0"]["embedding"]
    prefix = jnp.concatenate([table[start][None], context[0, : layout.shared].astype(table.dtype)])
    window = -(-tokens.ids.shape[1] // _ROUND) * _ROUND
    packed = pack(tokens.ids, tokens.length, size)
    stream = table[jnp.maximum(packed.ids, 0)]
    if layout.shared < layout.length:
        row = tokens.row[jnp.minimum(packed.text, tokens.row.shape[0] - 1)]
        own = context[row, jnp.clip(-1 - packed.ids, 0, layout.length - 1)]
        stream = jnp.where(packed.ids[:, None] < 0, own.astype(stream.dtype), stream)
    return encode_packed(tower, weights, prefix, stream, packed, window, deep)


def _in_parts(
    once: Callable[..., Array], size: int, inputs: tuple[Any, ...], tokens: NameTokens
) -> Float[Array, "k e"]:
    """Computes the features in groups of classes that never exceed `size` tokens."""
    count, width = tokens.ids.shape
    each = max(1, size // width)
    parts = -(-count // each)
    padded = jax.tree.map(lambda x: jnp.resize(x, (parts * each, *x.shape[1:])), tokens)
    split = jax.tree.map(lambda x: x.reshape(parts, each, *x.shape[1:]), padded)
    out = jax.lax.map(jax.checkpoint(lambda part: once(each * width, inputs, part)), split)
    return out.reshape(parts * each, -1)[:count]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _overflow(function: Callable[..., Array], needed: Array, inputs: Any, tokens: NameTokens) -> Array:
    """Calls `function(inputs, tokens)` if `needed`, else returns zeros; the backward pass only keeps the arguments."""
    nothing = lambda inputs, tokens: _zeros(jax.eval_shape(function, inputs, tokens), tokens)
    return jax.lax.cond(needed, function, nothing, inputs, tokens)


def _overflow_forward(function, needed, inputs, tokens):
    return _overflow(function, needed, inputs, tokens), (needed, inputs, tokens)


def _overflow_backward(function, kept, cotangent):
    needed, inputs, tokens = kept
    pull = lambda inputs, tokens: jax.vjp(lambda x: function(x, tokens), inputs)[1](cotangent)[0]
    return None, jax.lax.cond(needed, pull, _zeros, inputs, tokens), None


_overflow.defvjp(_overflow_forward, _overflow_backward)


def _zeros(tree: Any, tokens: NameTokens) -> Any:
    """Returns zeros, which inside of a `shard_map` are varying if the tokens are."""
    zero = 0 * tokens.length[0]
    return jax.tree.map(lambda x: jnp.full(x.shape, zero, x.dtype), tree)


def likely_size(
    length: Int[np.ndarray, " n"], count: int, share: Float[np.ndarray, " n"] | None = None
) -> int:
    """Returns a number of tokens that `count` drawn classes exceed once in 10,000 draws: mean + 4 deviations.

    A size that no draw exceeds would make every step more expensive (5% for 64 classes of ImageNet-21K) than computing
    the rare larger draws in parts.

    Args:
      length: number of tokens of each class.
      count: number of classes in a draw.
      share: the probability of each class; uniform by default.
    """
    length = np.asarray(length, np.float64)
    mean = np.average(length, weights=share)
    spread = math.sqrt(np.average((length - mean) ** 2, weights=share) * count)
    size = math.ceil((count * mean + 4 * spread) / _ROUND) * _ROUND
    return min(size, count * int(length.max()))


def even_order(length: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Orders classes so that any group of consecutive classes has about the same number of tokens.

    It steps through the classes sorted by length by the golden ratio; the shortest comes last.
    """
    ranked = np.argsort(length, kind="stable")
    place = (np.arange(len(length)) * (math.sqrt(5) - 1) / 2) % 1
    order = np.empty(len(length), np.int64)
    order[:] = ranked[np.argsort(np.argsort(place, kind="stable"), kind="stable")]
    last = int(np.argmin(length[order]))
    order[[last, -1]] = order[[-1, last]]
    return order


def window_size(length: Int[np.ndarray, " n"], count: int) -> int:
    """Returns the largest number of tokens of any `count` consecutive classes, the last one repeated at the end."""
    padded = np.concatenate([length, np.full(count, length[-1])]).astype(np.int64)
    sums = np.cumsum(padded)
    most = (sums[count - 1 :] - np.concatenate([[0], sums[:-count]])).max()
    return int(-(-most // _ROUND) * _ROUND)
