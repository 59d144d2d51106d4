"""The transformer of all towers: attention, MLP, block, and a loop over blocks.

Parameters keep the names of the published families, see `Style`. Each branch of a block may have an `adapter` beside
it, and a hook between two blocks may reduce the tokens (`between`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.kernels.cpu_attention import attention
from ovseg_jax.models.remat import rematerialise_function
from ovseg_jax.parallel.sharding import split_batch, whole

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}
# How patch tokens attend in the last block of a tower for dense features, see `Block`; "" as in all others.
LAST = ("", "value", "sclip", "clearclip")
# Cosines and sines for each token and channel of a head, shared by all images or for each; see `eva.rotary_table`.
Rotary = Float[Array, "2 n r"] | Float[Array, "2 b n r"]


@flax.struct.dataclass
class Places:
    """The positions of an image's tokens.

    Attributes:
      grid: rows and columns of patches.
      first: the number of class tokens, which precede the patch tokens.
      kept: the grid position, in reading order, of each remaining patch token; None while all remain.
      owner: the patch token that represents each grid position; None while each represents its own.
    """

    grid: tuple[int, int] = flax.struct.field(pytree_node=False)
    first: int = flax.struct.field(pytree_node=False)
    kept: Int[Array, "b m"] | None = None
    owner: Int[Array, "b p"] | None = None

    @property
    def count(self) -> int:
        """The number of patch tokens."""
        return self.grid[0] * self.grid[1] if self.kept is None else self.kept.shape[1]

    def unfold(self, x: Float[Array, "b n d"]) -> Float[Array, "b q d"]:
        """Returns class tokens and one patch token per position; tokens after them, such as prompts, are dropped."""
        if self.owner is None:
            return x[:, : self.first + self.count]
        patches = x[:, self.first : self.first + self.count]
        patches = jnp.take_along_axis(patches, self.owner[..., None], axis=1)
        return jnp.concatenate([x[:, : self.first], patches], axis=1)


# Called after a block with its number, the remaining patch tokens and their places; returns those to keep. `kept` holds
# grid positions, and `owner` indices of the returned tokens, see `Places`.
Between = Callable[[int, Float[Array, "b m d"], Places], tuple[Float[Array, "b k d"], Places]]
Taps = dict[int, tuple[Float[Array, "b _ d"], Places]]  # by number of a block
# Creates a module by name, which maps the input of a branch [b n d], and its places (None for texts), to an addition to
# its output.
Adapter = Callable[..., Any]


class Style(NamedTuple):
    """The names and initialisers of a block's parts in a family of models."""

    attention: str
    mlp: str
    norms: tuple[str, str]
    dense: tuple[str, str]
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros  # of the MLP


_BIG_VISION = Style(
    attention="MultiHeadDotProductAttention_0",
    mlp="MlpBlock_0",
    norms=("LayerNorm_0", "LayerNorm_1"),
    dense=("Dense_0", "Dense_1"),
    kernel_init=nn.initializers.lecun_normal(),
)
TEXT = _BIG_VISION
VIT = _BIG_VISION._replace(
    kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.normal(1e-6)
)
EVA = Style("attn", "mlp", ("norm1", "norm2"), ("fc1", "fc2"), nn.initializers.truncated_normal(0.02))


def attend(
    layer: Callable[..., Callable[[Array], Array]],
    heads: int,
    queries: Float[Array, "b q d"],
    values: Float[Array, "b n d"],
    *,
    keys: Float[Array, "b n d"] | None = None,
    features: int | None = None,
    key_bias: bool = True,
    mask: Bool[Array, "b 1 #q n"] | None = None,
    causal: bool = False,
    rotary: Rotary | None = None,
    inner_norm: Callable[[Array], Array] | None = None,
    apart: tuple[int, str] | None = None,
) -> Float[Array, "b q e"]:
    """Computes multi-head attention (Vaswani et al. 2017); the softmax is always float32.

    Args:
      layer: creates a dense layer from a name ("query", "key", "value", "out"), a shape and `DenseGeneral`'s options.
      heads: number of heads; divides the width.
      queries: the input of the queries.
      values: the input of the values.
      keys: the input of the keys; None means that of the values.
      features: channels of the result; None means those of the queries.
      key_bias: whether keys have a bias.
      mask: True for values that may be attended to; None means all.
      causal: whether tokens do not attend to later ones.
      rotary: rotary embedding of queries and keys.
      inner_norm: normalises the concatenated heads before the projection (sub-LN).
      apart: the first of the tokens that attend in another way, and the way, see `Block.last`; None for no such tokens.
        Queries and values are then the same tokens.
    """
    width = queries.shape[-1]
    split = (heads, width // heads)
    query = layer("query", split)(queries)
    key = layer("key", split, use_bias=key_bias)(values if keys is None else keys)
    value = layer("value", split)(values)
    if rotary is not None:
        query, key = rotate(query, rotary), rotate(key, rotary)
    first = None if apart is None else apart[0]
    mixed = attention(query[:, :first], key, value, mask, causal)
    if apart is not None:
        # Attention from queries to queries or from keys to keys, each a softmax of its own.
        itself = {"value": [], "sclip": [query, key], "clearclip": [query]}[apart[1]]
        rest = [attention(x[:, first:], x, value, mask) for x in itself]
        mixed = jnp.concatenate([mixed, sum(rest) if rest else value[:, first:]], axis=1)
    if inner_norm is not None:
        mixed = inner_norm(mixed.reshape(*mixed.shape[:2], width)).reshape(mixed.shape)
    return layer("out", features or width, axis=(-2, -1))(mixed)


def rotate(x: Float[Array, "b n h d"], table: Rotary) -> Float[Array, "b n h d"]:
    """Rotates each pair of neighbouring channels of each token by its angle, in float32."""
    cos, sin = table[..., None, :]
    y = x.astype(jnp.float32)
    # By shifts, since with an axis of pairs attention compiled for a TPU v4 moves 29% more bytes.
    first = jnp.arange(x.shape[-1]) % 2 == 0
    turned = y * cos + jnp.where(first, -jnp.roll(y, -1, axis=-1), jnp.roll(y, 1, axis=-1)) * sin
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with its parameters; for the attributes see `attend` and `Block`."""

    heads: int
    style: Style
    causal: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        values: Float[Array, "b n d"],
        valid: Bool[Array, "b n"] | Bool[Array, "b q n"] | None = None,
        rotary: Rotary | None = None,
        keys: Float[Array, "b n d"] | None = None,
        apart: tuple[int, str] | None = None,
    ) -> Float[Array, "b q d"]:
        """Attends from each query to all values, or to those `valid` (for it); for the others see `attend`."""
        if valid is not None and valid.ndim == 2:
            valid = valid[:, None]

        def layer(name: str, shape: Any, **options: Any) -> nn.DenseGeneral:
            init = self.style.kernel_init
            return nn.DenseGeneral(shape, dtype=self.dtype, kernel_init=init, name=name, **options)

        return attend(
            layer,
            self.heads,
            queries,
            values,
            keys=keys,
            key_bias=self.key_bias,
            mask=None if valid is None else valid[:, None],
            causal=self.causal,
            rotary=rotary,
            inner_norm=nn.LayerNorm(self.epsilon, dtype=self.dtype, name="inner_norm")
            if self.inner_norm
            else None,
            apart=apart,
        )


class Mlp(nn.Module):
    """An MLP: dense, activation, optional norm (sub-LN), dense back to the width of the input.

    Attributes:
      hidden: channels inside.
      activation: a key of `ACTIVATIONS`; or "swiglu": silu(gate(x)) times the first dense layer (Shazeer 2020).
      style: names and initialisers.
      norm: whether the hidden channels are normalised.
      epsilon: of that norm.
      dtype: compute type.
    """

    hidden: int
    activation: str
    style: Style
    norm: bool = False
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """Maps each token."""

        def dense(features: int, name: str) -> nn.Dense:
            kernel, bias = self.style.kernel_init, self.style.bias_init
            return nn.Dense(features, dtype=self.dtype, kernel_init=kernel, bias_init=bias, name=name)

        first, last = self.style.dense
        y = dense(self.hidden, first)(x)
        if self.activation == "swiglu":
            y = nn.silu(dense(self.hidden, "gate")(x)) * y
        else:
            y = ACTIVATIONS[self.activation](y)
        if self.norm:
            y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(y)
        return dense(x.shape[-1], last)(y)


class Block(nn.Module):
    """A block: attention, then an MLP, each added to its input.

    Attributes:
      heads: number of attention heads; divides the width.
      hidden: channels inside the MLP.
      activation: see `Mlp`.
      epsilon: epsilon of all norms.
      style: names and initialisers.
      order: what is normalised in each branch: "pre", its input; "post", its output, before it is added (EVA-02-CLIP
        E/14); "sum", the sum (BERT).
      causal, key_bias, attention_norm, mlp_norm: see `attend` and `Mlp`.
      last: for the last block of a tower, how tokens behind the class tokens attend: "" as in any block; "value", each
        only to itself, so that it keeps its value (MaskCLIP, Zhou et al. 2022; CLIPSelf, Wu et al. 2024); "sclip", by
        the sum of the softmaxes of queries with queries and of keys with keys (SCLIP, Wang et al. 2024);
        "clearclip", by queries with queries, and they are the output of attention alone, without the residual and the
        MLP (ClearCLIP, Lan et al. 2024).
      adapter: creates a module beside each branch, `adapter_attention` and `adapter_mlp`, with the same input as the
        branch, which is normalised for the order "pre".
      adapter_scale: factor on the output of adapters.
      drop_rate: probability that a branch of an example is dropped (stochastic depth), for training.
      dtype: compute type.
    """

    heads: int
    hidden: int
    activation: str
    epsilon: float
    style: Style
    order: str = "pre"
    causal: bool = False
    key_bias: bool = True
    attention_norm: bool = False
    mlp_norm: bool = False
    last: str = ""
    adapter: Adapter | None = None
    adapter_scale: float = 1.0
    drop_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        valid: Bool[Array, "b n"] | None = None,
        rotary: Rotary | None = None,
        places: Places | None = None,
    ) -> Float[Array, "b n d"]:
        """Maps tokens to tokens; `places` are for the adapters and for `last`."""
        apart = (places.first, self.last) if self.last and places is not None else None
        style, common = self.style, dict(epsilon=self.epsilon, dtype=self.dtype)
        attention = Attention(
            self.heads,
            style,
            self.causal,
            self.key_bias,
            self.attention_norm,
            **common,  # type: ignore[arg-type]
            name=style.attention,
        )
        mlp = Mlp(self.hidden, self.activation, style, self.mlp_norm, **common, name=style.mlp)  # type: ignore[arg-type]
        branches: list[tuple[str, Any]] = [
            ("attention", lambda y: attention(y, y, valid, rotary, apart=apart)),
            ("mlp", mlp),
        ]
        for norm_name, (name, branch) in zip(style.norms, branches, strict=True):
            norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, name=norm_name)
            y = norm(x) if self.order == "pre" else x
            out = branch(y)
            out = norm(out) if self.order == "post" else out
            if self.adapter is not None:
                out = out + self.adapter_scale * self.adapter(name=f"adapter_{name}")(y, places)
            if name == "attention":
                attended = out
            if self.drop_rate:
                out = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2), deterministic=False)(out)
            x = x + out
            x = norm(x) if self.order == "sum" else x
        if apart is not None and self.last == "clearclip":
            x = jnp.concatenate([x[:, : apart[0]], attended[:, apart[0] :]], axis=1)
        return x


def scan_blocks(
    block: Block,
    remat: str,
    weights: Sequence[Mapping[str, Any]],
    x: Float[Array, "b n d"],
    *args: Any,
    dropout: Array | None = None,
) -> Float[Array, "b n d"]:
    """Applies equal blocks in one loop, so that only one of them is traced and compiled.

    Args:
      block: the module of all blocks, without a parent.
      remat: what the backward pass recomputes in each, see `rematerialise`.
      weights: the parameters of each.
      x: tokens.
      *args: the further arguments of each, see `Block.__call__`.
      dropout: the key of dropout, if there is any.
    """
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *weights)
    keys = None if dropout is None else jax.random.split(dropout, len(weights))

    def step(y: Array, own: Any, key: Array | None) -> Array:
        rngs = None if key is None else {"dropout": key}
        # In a loop, the compiler would split the tokens' channels as the weights are, and gather the whole batch.
        out: Any = block.apply({"params": jax.tree.map(whole, own)}, split_batch(y), *args, rngs=rngs)
        return split_batch(out)

    step = rematerialise_function(step, remat)
    return jax.lax.scan(lambda y, each: (step(y, *each), None), x, (stacked, keys))[0]


def through_blocks(
    block: Callable[[int], Callable[..., Array]],
    depth: int,
    x: Float[Array, "b n d"],
    places: Places,
    *,
    valid: Bool[Array, "b n"] | None = None,
    rotary: Float[Array, "2 n r"] | None = None,
    between: Between | None = None,
    before: Callable[[int, Array], Array] = lambda i, x: x,
    taps: Collection[int] = (),
    loop: tuple[range, Callable[..., Array]] = (range(0), lambda x: x),
) -> tuple[Float[Array, "b m d"], Places, Taps]:
    """Applies the blocks of a tower to an image's tokens.

    Args:
      block: creates block i.
      depth: number of blocks.
      x: class tokens, patch tokens in reading order, and any others after them.
      places: the positions of the tokens.
      valid: the tokens that may be attended to; None means all. Not with `between`.
      rotary: a table for the class tokens and all grid positions, in this order.
      between: called after each block except the last.
      before: changes the tokens before block i.
      taps: the blocks whose output is also returned.
      loop: the numbers of blocks that one function applies together, and this function; `between` and `before` are not
        called for them, and they have no taps.

    Returns:
      The tokens after the last block and their places, and both for each block of `taps`.
    """
    tapped, turned = {}, rotary
    at_once, apply = loop
    for i in range(depth):
        if i in at_once:
            x = apply(x, valid, turned, places) if i == at_once.start else x
            continue
        x = block(i)(before(i, x), valid, turned, places)
        if i in taps:
            tapped[i] = x, places
        if between is None or i == depth - 1:
            continue
        front, end = places.first, places.first + places.count
        patches, places = between(i, x[:, front:end], places)
        x = jnp.concatenate([x[:, :front], patches, x[:, end:]], axis=1)
        if rotary is not None and places.kept is not None:
            chosen = rotary[:, front:][:, places.kept]
            still = jnp.broadcast_to(rotary[:, None, :front], (2, x.shape[0], front, rotary.shape[-1]))
            turned = jnp.concatenate([still, chosen], axis=2)
    return x, places, tapped
