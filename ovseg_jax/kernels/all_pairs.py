"""Contrastive sums over all pairs of a global batch, in three forms that give the same values and gradients.

`dense`: one matrix of all pairs; what XLA makes of it on one device, and the reference of the others.
`gather`: under `shard_map`, the columns are gathered on every device, which scores its own rows against them all.
`ring`: no matrix at all. One side stays, the other travels: every device scores its own rows against the columns
that pass by, keeps what the loss needs of each row, and sends along with the columns what it needs of each column.
After as many steps as there are devices the columns are home again. The backward pass goes round once more and
scores again, so that no more than one block of pairs is ever alive, forward or backward, whatever the batch. The
next columns are sent for before the present ones are scored, so a device waits for the network only where the
network is slower than it. On one device there is no ring, and the same code streams the columns block by block.

Gathering costs memory, the ring a second scoring: `pick` takes the gather as long as its pairs fit.
"""

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
FORMS: tuple[Form, ...] = ("dense", "gather", "ring")
Score = Callable[[Any, Any, Any], Float[Array, "b c"]]
GATHER_BUDGET, RING_BUDGET = (
    256 << 20,
    64 << 20,
)  # bytes a device: of a TPU v3 core's 16 GiB, a 64th and a 256th
LOWEST = jnp.finfo(jnp.float32).min


class PairSums(NamedTuple):
    """What a contrastive loss needs of the scores G of all pairs, for the items of this device.

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


def pick(batch: int, axes: tuple[str, ...], bytes_per_pair: int) -> tuple[Form, int]:
    """Form and block for a global batch, by its size, under the mesh in use.

    `dense` on one device and else `gather`, while the scores of a device's rows with all columns fit
    `GATHER_BUDGET`; beyond it `ring`, with as many columns at once as fit `RING_BUDGET`.

    Args:
      batch: size of the global batch.
      axes: the mesh axes over which it is sharded.
      bytes_per_pair: of the largest intermediate that scoring makes for a pair.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    devices = math.prod(shape[axis] for axis in axes)
    rows = batch // devices
    if rows * batch * bytes_per_pair <= GATHER_BUDGET:
        return "gather" if devices > 1 else "dense", rows
    fits = lambda block: rows % block == 0 and rows * block * bytes_per_pair <= RING_BUDGET
    return "ring", next((block for block in range(rows, 1, -1) if fits(block)), 1)


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
    block: int | None = None,
) -> PairSums:
    """Sums over all pairs of the global batch; called under `shard_map` when `axes` are given.

    Args:
      score: `score(rows, columns, shared)`, the scores of this device's rows with some columns, [b c]. Row i and
        column i are a pair. A row or column without anything valid opposite has a sum that means nothing.
      rows: what stays, a tree of floating arrays with a leading axis of b.
      columns: what travels, the same.
      shared: what all devices have in common, a tree of floating arrays: temperatures.
      row_valid: False for padding, which is in nobody's sum.
      column_valid: the same of the columns.
      form: how, see above.
      kind: what is summed, see `PairSums`.
      axes: the mesh axes over which the batch is sharded; () on one device, where "gather" is "dense".
      block: ring: score so many columns at once; it divides b. All of a device's by default.
    """
    if form != "ring":
        return _at_once(score, kind, axes, rows, columns, shared, row_valid, column_valid)
    b = row_valid.shape[0]
    block = block or b
    if b % block:
        raise ValueError(f"{b} columns do not divide into blocks of {block}")
    # Made each device's own: the gradients of all devices are then summed.
    shared = _vary(shared, axes)
    columns, column_valid = jax.tree.map(
        lambda x: x.reshape(-1, block, *x.shape[1:]), (columns, column_valid)
    )
    return _pairs(score, kind, axes, rows, columns, shared, row_valid, column_valid)


def over_batch(local: Callable, axes: tuple[str, ...], batched: tuple, shared: Any) -> Any:
    """`local(*batched, shared)` on each device's share of a batch; what it returns is the same on all."""
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
    positive = scores[jnp.arange(b), start + jnp.arange(b)]
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


def _vary(x: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def _send(tree: Any, axes: tuple[str, ...]) -> Any:
    if not axes:
        return tree
    n = jax.lax.axis_size(axes)
    return jax.lax.ppermute(tree, axes, [(i, (i + 1) % n) for i in range(n)])


def _steps(axes: tuple[str, ...]) -> Array:
    return jnp.arange(jax.lax.axis_size(axes) if axes else 1)


def _own(t: Array, j: Array, block: int, b: int) -> Bool[Array, "b c"]:
    """Which pairs of block j at step t belong together: at step 0 the columns are the device's own."""
    return (t == 0) & (jnp.arange(b)[:, None] == j * block + jnp.arange(block))


class _Running(NamedTuple):
    """A sum under way: for "softmax" the largest score so far and the sum beside it, else the sum alone."""

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
def _pairs(
    score: Score, kind: Kind, axes: tuple[str, ...], rows, columns, shared, row_valid, column_valid
) -> PairSums:
    m, block = column_valid.shape
    b = m * block
    vary = partial(_vary, axes=axes)
    numbers = vary(jnp.arange(m))

    def step(carry, t):
        (columns, column_valid), column, row, positive = carry
        following = _send((columns, column_valid), axes)

        def one(carry, xs):
            row, positive = carry
            j, columns, valid, column = xs
            scores = score(rows, columns, shared).astype(jnp.float32)
            positive += jnp.where(_own(t, j, block, b), scores, 0).sum(1)
            scores = jnp.where(row_valid[:, None] & valid, scores, LOWEST)
            return (row.add(scores, 1, kind), positive), column.add(scores, 0, kind)

        (row, positive), column = jax.lax.scan(one, (row, positive), (numbers, columns, column_valid, column))
        return (following, _send(column, axes), row, positive), None

    start = (
        (columns, column_valid),
        _Running.empty((m, block), vary),
        _Running.empty((b,), vary),
        vary(jnp.zeros(b)),
    )
    (_, column, row, positive), _ = jax.lax.scan(step, start, _steps(axes))
    return PairSums(row.total(kind), column.total(kind).reshape(-1), positive, column.best.reshape(-1))


def _forward(score, kind, axes, rows, columns, shared, row_valid, column_valid):
    out = _pairs(score, kind, axes, rows, columns, shared, row_valid, column_valid)
    return out, (rows, columns, shared, row_valid, column_valid, out.row, out.column)


def _backward(score, kind, axes, saved, g: PairSums):
    rows, columns, shared, row_valid, column_valid, row_total, column_total = saved
    m, block = column_valid.shape
    b = m * block
    vary = partial(_vary, axes=axes)
    numbers = vary(jnp.arange(m))
    add = lambda total, x: jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, x)
    fold = lambda x: x.reshape(m, block)

    def step(carry, t):
        travelling, d_columns, d_fixed = carry
        following = _send(travelling, axes)

        def one(d_fixed, xs):
            j, columns, valid, total, g_total, d_columns = xs
            scores, pull = jax.vjp(lambda *x: score(*x).astype(jnp.float32), rows, columns, shared)
            if kind == "softmax":
                d = jnp.exp(scores - row_total[:, None]) * g.row[:, None] + jnp.exp(scores - total) * g_total
            else:
                d = jax.nn.sigmoid(scores) * (g.row[:, None] + g_total)
            d = jnp.where(row_valid[:, None] & valid, d, 0)
            d += jnp.where(_own(t, j, block, b), g.positive[:, None], 0)
            of_rows, of_columns, of_shared = pull(d)
            return add(d_fixed, (of_rows, of_shared)), add(d_columns, of_columns)

        d_fixed, d_columns = jax.lax.scan(one, d_fixed, (numbers, *travelling, d_columns))
        return (following, _send(d_columns, axes), d_fixed), None

    travelling = columns, column_valid, fold(column_total), fold(g.column)
    zeros = vary(jax.tree.map(lambda x: jnp.zeros(x.shape), (columns, (rows, shared))))
    (_, d_columns, (d_rows, d_shared)), _ = jax.lax.scan(step, (travelling, *zeros), _steps(axes))
    like = lambda d, x: jax.tree.map(lambda d, x: d.astype(x.dtype), d, x)
    return like(d_rows, rows), like(d_columns, columns), like(d_shared, shared), None, None


_pairs.defvjp(_forward, _backward)
