"""CLIP's text tower for very many short texts with a shared prefix, without repeated work or padding.

A learned prompt reads [SOS][context][name][EOT] (papers/000, 3.1). The tower is causal: the tokens before the name have
the same hidden states for all classes, and tokens after [EOT] have no influence. Therefore the prefix is computed once,
and the rest of all texts is concatenated to one stream of tokens without padding; a token attends to the prefix and to
its own text. Features and gradients equal those of the tower applied to each text in full.

The stream is cut into windows at least as long as the longest text, so that a text lies in one window or in two
neighbours: a token attends to its window and the one before. Blocks are scanned; the tower's `remat` says what the
backward pass recomputes; with "all", one vector per token and block is kept.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.models.remat import rematerialise_function
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.models.transformer import ACTIVATIONS

EPSILON = 1e-5


class Packed(NamedTuple):
    """Concatenated texts.

    Attributes:
      ids: the token at each position of the stream.
      text: the index of its text; for padding, the number of texts.
      place: its position in that text.
      end: the position of each text's last token in the stream.
    """

    ids: Int[Array, " t"]
    text: Int[Array, " t"]
    place: Int[Array, " t"]
    end: Int[Array, " k"]


def pack(ids: Int[Array, "k l"], length: Int[Array, " k"], size: int) -> Packed:
    """Concatenates texts.

    Args:
      ids: tokens of each text, left-aligned.
      length: number of tokens of each text, at least 1.
      size: length of the stream, at least the sum of `length`; tokens beyond it are dropped.
    """
    after = jnp.cumsum(length)
    t = jnp.arange(size)
    text = jnp.searchsorted(after, t, side="right").astype(jnp.int32)
    row = jnp.minimum(text, ids.shape[0] - 1)
    place = jnp.clip(t - (after - length)[row], 0, ids.shape[1] - 1)
    return Packed(ids[row, place], text, place, after - 1)


def stacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Stacks the parameters of all blocks of a `CLIPText` except the last, [layers - 1 ...].

    With one block there is no "blocks": files do not keep an empty tree.
    """
    encoder = params["Encoder_0"]
    blocks = [encoder[f"encoderblock_{i}"] for i in range(len(encoder) - 1)]
    rest = {key: value for key, value in params.items() if key != "Encoder_0"}
    stack = lambda *x: (jnp if isinstance(x[0], jax.Array) else np).stack(x)
    first = {"blocks": jax.tree.map(stack, *blocks[:-1])} if len(blocks) > 1 else {}
    return {**rest, **first, "last": blocks[-1], "norm": encoder["encoder_norm"]}


def unstacked(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `stacked`."""
    first = weights.get("blocks", {})
    count = jax.tree.leaves(first)[0].shape[0] if first else 0
    blocks = [jax.tree.map(lambda x, i=i: x[i], first) for i in range(count)]
    encoder = {f"encoderblock_{i}": block for i, block in enumerate([*blocks, weights["last"]])}
    rest = {key: value for key, value in weights.items() if key not in ("blocks", "last", "norm")}
    return {**rest, "Encoder_0": {**encoder, "encoder_norm": weights["norm"]}}


def encode_packed(
    tower: CLIPText,
    weights: Mapping[str, Any],
    prefix: Float[Array, "p d"],
    stream: Float[Array, "t d"],
    packed: Packed,
    window: int,
    deep: Float[Array, "j m d"] | None = None,
) -> Float[Array, "k e"]:
    """Computes the embeddings of packed texts, pooled as in `CLIPText`; not normalised.

    Args:
      tower: the tower's shape, activation, compute type and `remat`.
      weights: `stacked` parameters.
      prefix: token vectors of the shared prefix, including [SOS], without positions.
      stream: token vectors of the rest of the texts, in the order of `packed`.
      packed: the texts of the stream; `ids` is not used.
      window: the size of a window, at least the length of the longest rest.
      deep: vectors that replace prefix tokens 1 to M after each of the first j blocks (MaPLe).

    Raises:
      ValueError: the tower has an adapter or a hook, which packed texts do not pass.
    """
    if tower.adapter is not None or tower.between is not None:
        raise ValueError("packed texts cannot be encoded by a tower with `adapter` or `between`")
    p, dtype = prefix.shape[0], tower.dtype
    windows = -(-stream.shape[0] // window)
    padding = windows * window - stream.shape[0]
    positions = weights["pos_embedding"][0]
    place = jnp.minimum(p + packed.place, tower.length - 1)
    stream = jnp.pad(stream + positions[place], ((0, padding), (0, 0)))
    x = jnp.concatenate([prefix + positions[:p], stream]).astype(dtype)
    mask = _own_text(jnp.pad(packed.text, (0, padding), constant_values=-1), windows, window)
    attend = lambda block, x: _attend(tower, block, x, mask, p)

    def layer(x, inputs):
        block, vectors = inputs
        if vectors is not None:
            replaced, vectors = vectors
            x = jnp.where(replaced, x.at[1 : 1 + vectors.shape[0]].set(vectors.astype(dtype)), x)
        return finish(tower, block, x, attend(block, x)), None

    if weights.get("blocks"):
        layer = rematerialise_function(layer, tower.remat)
        x, _ = jax.lax.scan(layer, x, (weights["blocks"], _per_block(tower.layers - 1, deep)))
    if deep is not None and 1 < tower.layers <= len(deep) + 1:  # The last block is not scanned.
        x = x.at[1 : 1 + deep.shape[1]].set(deep[tower.layers - 2].astype(dtype))
    # Only the last token of each text is needed from the last block.
    end = p + packed.end
    x = finish(tower, weights["last"], x[end], attend(weights["last"], x)[end])
    return norm(weights["norm"], x).astype(dtype) @ weights["head"]["kernel"].astype(dtype)


def _per_block(blocks: int, deep: Array | None) -> Any:
    """Returns for each scanned block whether it replaces the context, and the replacement."""
    if deep is None:
        return None
    j = min(deep.shape[0], blocks - 1)
    vectors = jnp.pad(deep[:j], ((1, blocks - 1 - j), (0, 0), (0, 0)))
    return (jnp.arange(blocks) >= 1) & (jnp.arange(blocks) <= j), vectors


def _own_text(text: Int[Array, " t"], windows: int, window: int) -> Bool[Array, "n w v"]:
    """Returns which tokens of its window and of the one before a token may attend to."""
    here = text.reshape(windows, window)
    before = jnp.concatenate([jnp.full((1, window), -2, here.dtype), here[:-1]])
    same = here[:, :, None] == jnp.concatenate([before, here], 1)[:, None]
    earlier = jnp.arange(2 * window) <= window + jnp.arange(window)[:, None]
    return same & earlier


def queries_keys_values(
    tower: CLIPText, block: Mapping[str, Any], x: Float[Array, "n d"]
) -> tuple[Float[Array, "n h e"], Float[Array, "n h e"], Float[Array, "n h e"]]:
    """Computes the scaled queries, the keys and the values of a block."""
    own = block["MultiHeadDotProductAttention_0"]
    y = norm(block["LayerNorm_0"], x).astype(tower.dtype)
    # One product of matrices for all three, since XLA would transpose an array of three axes first.
    three = [own[name] for name in ("query", "key", "value")]
    kernel = jnp.concatenate([layer["kernel"].reshape(y.shape[-1], -1) for layer in three], 1)
    bias = jnp.concatenate([layer["bias"].reshape(-1) for layer in three])
    qkv = y @ kernel.astype(y.dtype) + bias.astype(y.dtype)
    q, k, v = (x.reshape(-1, *three[0]["bias"].shape) for x in jnp.split(qkv, 3, -1))
    return q * (q.shape[-1] ** -0.5), k, v


def _attend(
    tower: CLIPText, block: Mapping[str, Any], x: Float[Array, "n d"], mask: Bool[Array, "w c d2"], p: int
) -> Float[Array, "n h e"]:
    """Computes attention before the projection `out`, for the first p tokens and the stream after them."""
    q, k, v = queries_keys_values(tower, block, x)
    causal = jnp.tril(jnp.ones((p, p), bool))
    scores = jnp.einsum("qhe,khe->hqk", q[:p], k[:p], preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1).astype(v.dtype)
    first = jnp.einsum("hqk,khe->qhe", share, v[:p])

    windows, window, _ = mask.shape
    cut = lambda x: x[p:].reshape(windows, window, *x.shape[1:])
    both = lambda x: jnp.concatenate([jnp.pad(x[:-1], ((1, 0), (0, 0), (0, 0), (0, 0))), x], 1)
    to_prefix = jnp.einsum("wqhe,khe->whqk", cut(q), k[:p], preferred_element_type=jnp.float32)
    to_own = jnp.einsum("wqhe,wkhe->whqk", cut(q), both(cut(k)), preferred_element_type=jnp.float32)
    scores = jnp.concatenate([to_prefix, jnp.where(mask[:, None], to_own, -jnp.inf)], -1)
    share = jax.nn.softmax(scores, -1).astype(v.dtype)
    rest = jnp.einsum("whqk,khe->wqhe", share[..., :p], v[:p])
    rest += jnp.einsum("whqk,wkhe->wqhe", share[..., p:], both(cut(v)))
    return jnp.concatenate([first, rest.reshape(-1, *rest.shape[2:])])


def finish(
    tower: CLIPText, block: Mapping[str, Any], x: Float[Array, "n d"], gathered: Float[Array, "n h e"]
) -> Float[Array, "n d"]:
    """Computes the rest of a block after its attention."""
    out, mlp = block["MultiHeadDotProductAttention_0"]["out"], block["MlpBlock_0"]
    matrix = lambda layer: layer["kernel"].reshape(-1, layer["bias"].shape[0])
    dense = lambda layer, x: x @ matrix(layer).astype(x.dtype) + layer["bias"].astype(x.dtype)
    x = x + dense(out, gathered.reshape(gathered.shape[0], -1))
    y = norm(block["LayerNorm_1"], x).astype(x.dtype)
    return x + dense(mlp["Dense_1"], ACTIVATIONS[tower.activation](dense(mlp["Dense_0"], y)))


def norm(layer: Mapping[str, Array], x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Computes a layer norm in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON) * layer["scale"] + layer["bias"]
