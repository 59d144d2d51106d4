"""A text tower in a folder that `ovseg_jax.torch.Text` reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.files import record, write_recorded
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.to_torch import describe, to_torch
from ovseg_jax.vocab.tokenizers import PieceTokenizer


def write_text_tower(
    folder: epath.PathLike,
    tokenizer: PieceTokenizer,
    tower: Any,
    arrays: Mapping[str, np.ndarray],
    templates: Sequence[str],
    dtype: Any = np.float32,
) -> None:
    """Writes `model.safetensors` with the names of `pretrained.to_torch`, `config.json` and the tokeniser's files.

    Args:
      folder: created if missing.
      tokenizer: the tower's.
      tower: its module.
      arrays: its variables by path.
      templates: of class names; none for names as they are.
      dtype: of the weights in the file.
    """
    folder = epath.Path(folder)
    tokenizer.save(folder)
    cast = {name: x.astype(dtype) for name, x in to_torch(arrays).items()}
    write_safetensors(folder / "model.safetensors", cast, {"format": "pt"})
    record(folder / "model.safetensors")
    # Written last, so that a folder with this file is complete.
    described = describe(tower) | ({"templates": list(templates)} if templates else {})
    write_recorded(folder / "config.json", json.dumps(described, indent=1, ensure_ascii=False) + "\n")
