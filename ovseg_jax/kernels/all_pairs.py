"""Contrastive sums over all pairs of a global batch, in three forms with equal values and gradients.

`dense`: one matrix of all pairs, on one device; the reference for the others.
`gather`: under `shard_map`, every device gathers all columns and scores its own rows against them.
`ring`: no full matrix. Rows stay on their device and columns travel: every device scores its rows against the passing
columns, accumulates the sums of its rows, and sends the columns on together with their sums. After as many steps as
there are devices, the columns are back. The backward pass repeats the round and recomputes the scores, so that only one
block of pairs is in memory at a time, forward or backward, for any batch. The next columns are requested before the
present ones are scored, so that communication overlaps with computation. On one device the same code processes the
columns block by block.

Gathering needs memory, the ring computes the scores twice: `pick` chooses `gather` as long as its pairs fit.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

Kind = Literal["softmax", "sigmoid"]
Form = Literal["dense", "gather", "ring"]
Block = tuple[int, int]
FORMS: tuple[Form, ...] = ("dense", "gather", "ring")
Score = Callable[[Any, Any, Any], Float[Array, "b c"]]
# Bytes per device: 1/64 and 1/256 of the 16 GiB of a TPU v3 core.
GATHER_BUDGET, RING_BUDGET = 256 << 20, 64 << 20
LOWEST = jnp.finfo(jnp.float32).min
_LOG = logging.getLogger(__name__)


class PairSums(NamedTuple):
    """The sums over the scores G of all pairs that a contrastive loss needs, for the items of this device.

    Attributes:
      row: "softmax": log Σ_j exp G_ij over all columns; "sigmoid": Σ_j log(1 + exp G_ij).
      column: the same over all rows, for each of this device's columns.
      positive: G_ii.
      best: max_i G_ij, for each of this device's columns. No gradient flows through it.
    """

    row: Float[Array, " b"]
    column: Float[Array, " b"]
    positive: Float[Array, " b"]
    best: Float[Array, " b"]


def pick(
    batch: int, axes: tuple[str, ...], bytes_per_pair: int, row_to_column: float = 1.0
) -> tuple[Form, Block]:
    """Chooses form and block for a global batch, by its size, under the mesh in use.

    It is `dense` on one device, else `gather`, while the scores of a device's rows with all columns fit
    `GATHER_BUDGET`; beyond that `ring`, in blocks of rows and columns that fit `RING_BUDGET`. Among these it takes the
    block that reads least memory: a row is read once for each block of columns, and a column once for each block of
    rows.

    Args:
      batch: size of the global batch.
      axes: the mesh axes over which it is sharded.
      bytes_per_pair: bytes of the largest intermediate result for a pair.
      row_to_column: the size of a row in units of the size of a column.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(shape[axis] for axis in axes)
    size = batch // devices
    if size * batch * bytes_per_pair <= GATHER_BUDGET:
        return "gather" if devices > 1 else "dense", (size, size)
    sides = [side for side in range(1, size + 1) if size % side == 0]
    fitting = [(r, c) for r in sides for c in sides if r * c * bytes_per_pair <= RING_BUDGET]
    return "ring", min(fitting, key=lambda block: row_to_column / block[1] + 1 / block[0], default=(1, 1))


def resolve_form(
    name: str, form: Form | None, block: Block | None, picked: tuple[Form, Block]
) -> tuple[Form, Block]:
    """Returns the requested form and block, or else the picked ones, and logs them."""
    form, block = form or picked[0], block or picked[1]
    blocks = f" in blocks of {block[0]} x {block[1]}" if form == "ring" else ""
    _LOG.info("%s of the whole batch: %s%s", name, form, blocks)
    return form, block


def all_pairs(
    score: Score,
    rows: Any,
    columns: Any,
    shared: Any,
    row_valid: Bool[Array, " b"],
    column_valid: Bool[Array, " b"],
    *,
    form: Form,
    kind: Kind = "softmax",
    axes: tuple[str, ...] = (),
    block: Block | None = None,
) -> PairSums:
    """Computes sums over all pairs of the global batch; called under `shard_map` if `axes` are given.

    Args:
      score: `score(rows, columns, shared)` returns the scores of this device's rows with some columns, [b c]. Row i and
        column i are a positive pair. The sum of a row or column without any valid partner is undefined.
      rows: a tree of floating arrays with a leading axis of b, which stay on their device.
      columns: the same for the columns, which travel in the ring.
      shared: a tree of floating arrays that are equal on all devices, such as temperatures.
      row_valid: False for padding, which no sum includes.
      column_valid: the same for the columns.
      form: how to compute the sums, see above.
      kind: what to sum, see `PairSums`.
      axes: the mesh axes over which the batch is sharded; () on one device, where "gather" equals "dense".
      block: for the ring: (rows, columns) to score at once, which divide b; by default all of a device.
    """
    if form != "ring":
        return _at_once(score, kind, axes, rows, columns, shared, row_valid, column_valid)
    b = row_valid.shape[0]
    block = block or (b, b)
    if b % block[0] or b % block[1]:
        raise ValueError(f"{b} rows and columns are not a multiple of the block {block}")
    # Marked as varying, so that the gradients of all devices are summed.
    shared = varying(shared, axes)
    cut = lambda tree, size: jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)
    rows, columns = cut((rows, row_valid), block[0]), cut((columns, column_valid), block[1])
    return _pairs(score, kind, axes, rows, columns, shared)


def over_batch(local: Callable, axes: tuple[str, ...], batched: tuple, shared: Any) -> Any:
    """Runs `local(*batched, shared)` on each device's share of a batch; its result must be equal on all devices."""
    if not axes:
        return local(*batched, shared)
    share = PartitionSpec(axes)
    in_specs = (*(share for _ in batched), PartitionSpec())
    return jax.shard_map(local, in_specs=in_specs, out_specs=PartitionSpec())(*batched, shared)


def _at_once(score, kind, axes, rows, columns, shared, row_valid, column_valid) -> PairSums:
    b = row_valid.shape[0]
    start = 0
    if axes:
        start = jax.lax.axis_index(axes) * b
        gather = partial(jax.lax.all_gather, axis_name=axes, tiled=True)
        columns, column_valid = jax.tree.map(gather, (columns, column_valid))
    scores = score(rows, columns, shared).astype(jnp.float32)
    own_column = start + jnp.arange(b)[:, None] == jnp.arange(scores.shape[1])
    positive = jnp.where(own_column, scores, 0).sum(1)  # Not a gather, whose gradient is a slow scatter.
    scores = jnp.where(row_valid[:, None] & column_valid, scores, LOWEST)
    best = jax.lax.stop_gradient(scores).max(0)
    if axes:
        best = jax.lax.pmax(best, axes)
    own = jax.lax.dynamic_slice_in_dim(best, start, b)
    sum_own = lambda x: jax.lax.psum_scatter(x, axes, tiled=True) if axes else x
    if kind == "sigmoid":
        each = jax.nn.softplus(scores)
        return PairSums(each.sum(1), sum_own(each.sum(0)), positive, own)
    column = own + jnp.log(sum_own(jnp.exp(scores - best).sum(0)))
    return PairSums(jax.nn.logsumexp(scores, 1), column, positive, own)


def varying(x: Any, axes: tuple[str, ...]) -> Any:
    """Marks values that are equal on all devices as varying from here on; for use inside of `over_batch`."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _send(tree: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return tree
    n = jax.lax.axis_size(axes)
    return jax.lax.ppermute(tree, axes, [(i, (i + 1) % n) for i in range(n)])


def _steps(axes: tuple[str, ...]) -> Array:
    return jnp.arange(jax.lax.axis_size(axes) if axes else 1)


def _each_block(
    pair: Callable, axes: tuple[str, ...], rows: Any, columns: Any, row_sums: Any, column_sums: Any
):
    """Loops over the pairs of blocks of a device's rows with the columns that it holds.

    `pair(i, rows, row_sums, j, columns, column_sums)` adds the pairs of row block i and column block j to their sums
    and returns both. All trees have a leading axis of blocks.
    """
    number = lambda tree: varying(jnp.arange(len(jax.tree.leaves(tree)[0])), axes)

    def one_row(column_sums, xs):
        i, rows, row_sums = xs

        def one_column(row_sums, xs):
            j, columns, column_sums = xs
            return pair(i, rows, row_sums, j, columns, column_sums)

        return jax.lax.scan(one_column, row_sums, (number(columns), columns, column_sums))[::-1]

    return jax.lax.scan(one_row, column_sums, (number(rows), rows, row_sums))[::-1]


def _own(t: Array, i: Array, j: Array, shape: tuple[int, ...]) -> Bool[Array, "r c"]:
    """Marks the positive pairs of row block i and column block j; at step t = 0 a device holds its own columns."""
    r, c = shape
    return (t == 0) & ((i * r + jnp.arange(r))[:, None] == j * c + jnp.arange(c))


class _Running(NamedTuple):
    """A running sum: for "softmax" the largest score so far and the sum relative to it, else just the sum."""

    best: Array
    sum: Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], vary: Callable) -> "_Running":
        return cls(vary(jnp.full(shape, LOWEST)), vary(jnp.zeros(shape)))

    def add(self, scores: Array, axis: int, kind: Kind) -> "_Running":
        best = jnp.maximum(self.best, scores.max(axis))
        if kind == "sigmoid":
            return _Running(best, self.sum + jax.nn.softplus(scores).sum(axis))
        new = jnp.exp(scores - jnp.expand_dims(best, axis)).sum(axis)
        return _Running(best, self.sum * jnp.exp(self.best - best) + new)

    def total(self, kind: Kind) -> Array:
        return self.sum if kind == "sigmoid" else self.best + jnp.log(self.sum)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pairs(score: Score, kind: Kind, axes: tuple[str, ...], rows, columns, shared) -> PairSums:
    """Computes the sums of the ring; `rows` and `columns` are (tree, valid), cut into blocks."""
    vary = partial(varying, axes=axes)
    row_shape, column_shape = rows[1].shape, columns[1].shape

    def step(carry, t):
        columns, column_sums, row_sums = carry
        following = _send(columns, axes)

        def pair(i, rows, row_sums, j, columns, column):
            (rows, row_valid), (columns, column_valid), (row, positive) = rows, columns, row_sums
            scores = score(rows, columns, shared).astype(jnp.float32)
            positive += jnp.where(_own(t, i, j, scores.shape), scores, 0).sum(1)
            scores = jnp.where(row_valid[:, None] & column_valid, scores, LOWEST)
            return (row.add(scores, 1, kind), positive), column.add(scores, 0, kind)

        row_sums, column_sums = _each_block(pair, axes, rows, columns, row_sums, column_sums)
        return (following, _send(column_sums, axes), row_sums), None

    row_sums = _Running.empty(row_shape, vary), vary(jnp.zeros(row_shape))
    start = columns, _Running.empty(column_shape, vary), row_sums
    (_, column, (row, positive)), _ = jax.lax.scan(step, start, _steps(axes))
    sums = PairSums(row.total(kind), column.total(kind), positive, column.best)
    return jax.tree.map(lambda x: x.reshape(-1), sums)


def _forward(score, kind, axes, rows, columns, shared):
    out = _pairs(score, kind, axes, rows, columns, shared)
    return out, (rows, columns, shared, out.row, out.column)


def _backward(score, kind, axes, saved, g: PairSums):
    rows, columns, shared, row_total, column_total = saved
    row_shape, column_shape = rows[1].shape, columns[1].shape
    add = lambda total, x: jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, x)

    def step(carry, t):
        travelling, d_columns, d_rows = carry
        following = _send(travelling, axes)

        def pair(i, rows, d_rows, j, columns, d_columns):
            (rows, row_valid), row_total, g_row, g_positive = rows
            (columns, column_valid), column_total, g_column = columns
            scores, pull = jax.vjp(lambda *x: score(*x).astype(jnp.float32), rows, columns, shared)
            if kind == "softmax":
                d = jnp.exp(scores - row_total[:, None]) * g_row[:, None]
                d += jnp.exp(scores - column_total) * g_column
            else:
                d = jax.nn.sigmoid(scores) * (g_row[:, None] + g_column)
            d = jnp.where(row_valid[:, None] & column_valid, d, 0)
            d += jnp.where(_own(t, i, j, scores.shape), g_positive[:, None], 0)
            of_rows, of_columns, of_shared = pull(d)
            return add(d_rows, (of_rows, of_shared)), add(d_columns, of_columns)

        d_rows, d_columns = _each_block(pair, axes, fixed, travelling, d_rows, d_columns)
        return (following, _send(d_columns, axes), d_rows), None

    as_rows, as_columns = lambda x: x.reshape(row_shape), lambda x: x.reshape(column_shape)
    fixed = rows, as_rows(row_total), as_rows(g.row), as_rows(g.positive)
    travelling = columns, as_columns(column_total), as_columns(g.column)
    # The shared arrays get a gradient from each block of rows.
    of_shared = jax.tree.map(lambda x: jnp.zeros((row_shape[0], *x.shape)), shared)
    zeros = lambda tree: varying(jax.tree.map(lambda x: jnp.zeros(x.shape), tree), axes)
    start = travelling, zeros(columns[0]), zeros((rows[0], of_shared))
    (_, d_columns, (d_rows, d_shared)), _ = jax.lax.scan(step, start, _steps(axes))
    like = lambda d, x: jax.tree.map(lambda d, x: d.astype(x.dtype), d, x)
    d_shared = jax.tree.map(lambda d: d.sum(0), d_shared)
    return (like(d_rows, rows[0]), None), (like(d_columns, columns[0]), None), like(d_shared, shared)


_pairs.defvjp(_forward, _backward)
