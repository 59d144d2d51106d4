"""Published weights into our modules: found, read, recognised by their names, held to the module's names and shapes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.pretrained import efficientnet, resnet
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.pretrained.hub import find
from ovseg_jax.pretrained.rename import Rename, fit, rename


def load(
    init: str, module: nn.Module, shapes: Mapping[str, Any], *, may_miss: Sequence[str] = ()
) -> dict[str, Any]:
    """A module's variables from published weights.

    Args:
      init: see `hub.find`.
      module: what they are for.
      shapes: its variables, {"params": ..., "batch_stats": ...}, as arrays or shapes.
      may_miss: regexes of paths that the weights may lack; these are left out of the result.

    Returns:
      NumPy arrays in a tree like `shapes`, in its dtypes.

    Raises:
      UserError: weights that are not there, cannot be read, are of another architecture or of another shape.
    """
    path = find(init)
    arrays = read_arrays(path)
    format_, renames = recognise(arrays, formats(module), path)
    try:
        return fit(rename(arrays, renames), shapes, may_miss=may_miss)
    except UserError as error:
        raise UserError(f"init={init}, read as {format_}: {error}") from error


def formats(module: nn.Module) -> dict[str, list[Rename]]:
    """The formats in which weights of such a module have been published: name -> renames."""
    if isinstance(module, ResNet):
        return {
            "torchvision's or timm's ResNet": resnet.from_torchvision_resnet(),
            "transformers' ResNet": resnet.from_hf_resnet(),
        }
    if isinstance(module, EfficientNet):
        return {
            "timm's EfficientNet": efficientnet.from_timm_efficientnet(module.depth),
            "transformers' EfficientNet": efficientnet.from_hf_efficientnet(),
        }
    raise UserError(f"no published weights are known for a {type(module).__name__}")


def recognise(
    arrays: Mapping[str, np.ndarray], known: Mapping[str, list[Rename]], path: Path
) -> tuple[str, list[Rename]]:
    """The format that knows most of the names.

    Raises:
      UserError: none knows a fifth of them (of a two-tower file, each tower has about half).
    """

    def share(renames: list[Rename]) -> float:
        patterns = [re.compile(r.pattern) for r in renames if r.target]
        return sum(any(p.fullmatch(name) for p in patterns) for name in arrays) / max(len(arrays), 1)

    shares = {name: share(renames) for name, renames in known.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] < 0.2:
        some = ", ".join(list(arrays)[:4])
        raise UserError(f"{path} is none of {', '.join(known)}: it holds {some}, ...")
    return best, known[best]
