"""big_vision's npz checkpoints, read and written (github.com/google-research/big_vision).

Keys are paths joined by "/". They begin with `params/`, in older files with `opt/target/`, or have no prefix; a
two-tower file then has `img/` and `txt/`, and the scalars `t` (log of the scale) and `b` (bias). The blocks of a
transformer are `encoderblock_{i}`, or, if scanned, one `encoderblock` with all of them stacked. Our ViT and SigLIP's
text tower have big_vision's names, so that nothing else is renamed.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.files import read_arrays

PREFIXES = ("params/", "opt/target/", "")
TOWERS = ("img", "txt")


def read_big_vision(path: str | Path, tower: str = "") -> dict[str, np.ndarray]:
    """Reads parameters by path, `params/Transformer/encoderblock_0/...`, with unstacked blocks.

    Args:
      path: an npz file.
      tower: "img" or "txt" of a two-tower file, which is removed from the paths; "" reads all parameters. It has no
        effect on a file of one tower.

    Raises:
      UserError: there is no such file, or no such tower in it.
    """
    arrays = read_arrays(path)
    prefix = next(p for p in PREFIXES if any(name.startswith(p) for name in arrays) or not p)
    own = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if tower and any(k.startswith(tuple(f"{t}/" for t in TOWERS)) for k in own):
        own = {k.removeprefix(f"{tower}/"): v for k, v in own.items() if k.startswith(f"{tower}/")}
        if not own:
            raise UserError(
                f"{path} has no tower {tower!r}: its parameters are {', '.join(sorted(arrays)[:3])}, ..."
            )
    # Before 2021 the table of positions was in a module of its own.
    own = {k.replace("Transformer/posembed_input/pos_embedding", "pos_embedding"): v for k, v in own.items()}
    return {f"params/{k}": v for k, v in to_loop(own).items()}


def write_big_vision(path: str | Path, arrays: Mapping[str, np.ndarray], *, scan: bool = False) -> None:
    """Writes parameters by path, `params/img/embedding/kernel`, as an npz that big_vision loads."""
    np.savez(path, **(to_scan(arrays) if scan else dict(arrays)))  # type: ignore[arg-type]


def to_loop(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits stacked blocks into single ones; other arrays stay.

    Raises:
      UserError: an array of a stack has no axes.
    """
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        head, found, tail = name.partition("encoderblock/")
        if found:
            if not array.ndim:
                raise UserError(f"{name} is a single number, not a stack of blocks")
            out |= {f"{head}encoderblock_{i}/{tail}": layer for i, layer in enumerate(array)}
        else:
            out[name] = array
    return out


def to_scan(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacks blocks: the inverse of `to_loop`."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    out = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(.*encoderblock)_(\d+)(/.*)", name):
            stacks.setdefault(match[1] + match[3], {})[int(match[2])] = array
        else:
            out[name] = array
    return out | {name: np.stack([layers[i] for i in range(len(layers))]) for name, layers in stacks.items()}
