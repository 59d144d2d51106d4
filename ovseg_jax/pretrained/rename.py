"""Conversion of published checkpoints to our parameters: names and layouts, with a check that nothing is left over.

Each model family has a file in this package with a list of `Rename`s for each format. PyTorch stores dense weights as
[out in] and convolutions as [out in h w]; Flax uses [in out] and [h w in out], and an axis of heads in attention.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import numpy as np

from ovseg_jax.errors import UserError

# Returns an array in our layout; or several, by the text that replaces {} in the target.
Layout = Callable[[np.ndarray], np.ndarray | dict[str, np.ndarray]]
Plain = Callable[[np.ndarray], np.ndarray]


def same(x: np.ndarray) -> np.ndarray:
    """Returns the array unchanged."""
    return x


def dense(x: np.ndarray) -> np.ndarray:
    """Transposes [out in] to [in out]; a bias stays."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """Transposes [out in h w] to [h w in out]; for a depthwise convolution `in` is 1. A bias stays."""
    return x if x.ndim == 1 else x.transpose(2, 3, 1, 0)


def pointwise(x: np.ndarray) -> np.ndarray:
    """Converts a 1x1 convolution [out in 1 1] to a dense kernel [in out]; a bias stays."""
    return x if x.ndim == 1 else dense(x[:, :, 0, 0])


def heads_in(heads: int) -> Plain:
    """Splits query, key or value: [heads*d in] to [in heads d], bias [heads*d] to [heads d]."""
    return lambda x: x.reshape(heads, -1) if x.ndim == 1 else x.T.reshape(x.shape[1], heads, -1)


def heads_out(heads: int) -> Plain:
    """Splits the projection after attention: [out heads*d] to [heads d out]; its bias stays."""
    return lambda x: x if x.ndim == 1 else x.T.reshape(heads, -1, x.shape[0])


def heads_qkv(heads: int) -> Layout:
    """Splits joint query, key and value, [3*heads*d in] or [3*heads*d], into three."""
    split = heads_in(heads)
    return lambda x: {
        name: split(part) for name, part in zip(("query", "key", "value"), np.split(x, 3), strict=True)
    }


class Rename(NamedTuple):
    r"""A rule for one kind of array.

    Attributes:
      pattern: a regex that matches the source's whole name.
      target: our path, `encoder/block_\1/kernel`, with the pattern's groups; `{}` if the layout returns several arrays;
        "" to ignore the array.
      layout: converts the source's layout to ours.
    """

    pattern: str
    target: str
    layout: Layout = same


def linear(pattern: str, target: str, layout: Layout = dense) -> list[Rename]:
    """Returns the renames of weight and bias of a dense layer or convolution; `layout` knows a bias by its one axis."""
    return [
        Rename(rf"{pattern}\.weight", f"{target}/kernel", layout),
        Rename(rf"{pattern}\.bias", f"{target}/bias", layout),
    ]


def norm(pattern: str, target: str) -> list[Rename]:
    """Returns the renames of scale and bias of a layer norm or group norm."""
    return [Rename(rf"{pattern}\.weight", f"{target}/scale"), Rename(rf"{pattern}\.bias", f"{target}/bias")]


def batch_norm(pattern: str, target: str) -> list[Rename]:
    """Returns the renames of a PyTorch batch norm; `target` is our path within a collection."""
    return [
        *norm(pattern, f"params/{target}"),
        Rename(rf"{pattern}\.running_mean", f"batch_stats/{target}/mean"),
        Rename(rf"{pattern}\.running_var", f"batch_stats/{target}/var"),
        Rename(rf"{pattern}\.num_batches_tracked", ""),
    ]


def inside(renames: Iterable[Rename], prefix: str, path: str) -> list[Rename]:
    """Returns the renames for a part of a model: its names follow `prefix` (a regex), its module is at `path`."""

    def target(ours: str) -> str:
        collection, _, rest = ours.partition("/")
        return f"{collection}/{path}/{rest}" if ours else ""

    return [Rename(f"{prefix}(?:{r.pattern})", target(r.target), r.layout) for r in renames]


def rename(
    source: Mapping[str, np.ndarray], renames: Iterable[Rename], *, copy: bool = True
) -> dict[str, np.ndarray]:
    """Renames a checkpoint's arrays to our paths; the first rename that matches a name is used.

    Args:
      source: the arrays by name.
      renames: the renames.
      copy: whether to lay arrays out anew in memory; else they may be views of the source.

    Raises:
      UserError: a name matches no rename, or two arrays have the same path.
    """
    compiled = [(re.compile(r.pattern), r) for r in renames]
    out: dict[str, np.ndarray] = {}
    extra = []
    for name, array in source.items():
        found = next(((match, r) for pattern, r in compiled if (match := pattern.fullmatch(name))), None)
        if found is None:
            extra.append(name)
            continue
        match, r = found
        if not r.target:
            continue
        try:
            target, arrays = match.expand(r.target), r.layout(array)
        except (ValueError, IndexError) as error:
            raise UserError(f"{name} of the checkpoint has the shape {array.shape}: {error}") from error
        for part, value in (arrays if isinstance(arrays, dict) else {"": arrays}).items():
            path = target.replace("{}", part)
            if path in out:
                raise UserError(f"two arrays of the checkpoint belong to {path}; one of them is {name}")
            out[path] = np.ascontiguousarray(value) if value.ndim and copy else value
    if extra:
        raise UserError(f"the checkpoint has {_some(extra)} that this model does not have")
    return out


def fit(
    arrays: Mapping[str, np.ndarray], shapes: Any, *, may_miss: Sequence[str] = (), copy: bool = True
) -> dict[str, Any]:
    """Arranges the arrays as a tree like `shapes`, in its dtypes.

    Args:
      arrays: arrays by path, such as `params/conv/kernel`.
      shapes: a tree of nested dicts of arrays or of their shapes.
      may_miss: regexes of paths that `arrays` may lack, such as a new head; these are left out of the result.
      copy: whether to copy arrays that are views of others.

    Raises:
      UserError: names are missing or extra, or shapes differ; the message lists them.
    """
    expected = flax.traverse_util.flatten_dict(shapes, sep="/")
    missing = [
        path
        for path in expected
        if path not in arrays and not any(re.search(pattern, path) for pattern in may_miss)
    ]
    extra = [path for path in arrays if path not in expected]
    wrong = [
        f"{path} is {arrays[path].shape}, not {tuple(leaf.shape)}"
        for path, leaf in expected.items()
        if path in arrays and arrays[path].shape != tuple(leaf.shape)
    ]
    faults = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
    if faults := [*faults, *(f"has a wrong shape: {text}" for text in wrong[:4])]:
        raise UserError(f"the checkpoint does not fit the model: it {'; it '.join(faults)}")
    # Those that `rename` has laid out anew are not copied once more.
    flat = {
        path: arrays[path].astype(leaf.dtype, copy=copy and not arrays[path].flags.owndata)
        for path, leaf in expected.items()
        if path in arrays
    }
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} names ({', '.join(names[:8])}{rest})"
