"""Published weights on disk as NumPy arrays by name: safetensors, PyTorch's archives, big_vision's npz."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.files import verify

# https://huggingface.co/docs/safetensors: the header's names of types.
_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# What a folder may hold, best first.
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a file, or the one of `NAMES` that a folder holds.

    safetensors are memory-mapped and need no package. `.bin`, `.pt` and `.pth` need PyTorch, which reads nothing but
    tensors (`weights_only`); a TorchScript archive, as OpenAI's CLIP comes, is opened and never run. An npz is read
    without pickle.

    Raises:
      UserError: no such file, an unknown or damaged one, PyTorch missing.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).exists()), None)
        if found is None:
            raise UserError(f"{path} holds no weights: none of {', '.join(NAMES)}")
        path = found
    if not path.exists():
        raise UserError(f"no such weights: {path}")
    verify(path)
    readers = {".safetensors": _safetensors, ".npz": _npz, ".bin": _torch, ".pt": _torch, ".pth": _torch}
    try:
        if path.name.endswith(".index.json"):
            return _shards(path)
        if path.suffix not in readers:
            raise UserError(f"{path}: known are {', '.join(readers)} and folders of Hugging Face")
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} cannot be read as weights: {first}") from error


def write_safetensors(
    path: epath.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}
) -> None:
    """Writes what `read_arrays` reads; rows in the order of their names."""
    kinds = {np.dtype(kind): name for name, kind in _TYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, parts = 0, []
    for name, array in sorted(arrays.items()):
        part = np.ascontiguousarray(array)
        header[name] = {
            "dtype": kinds[part.dtype],
            "shape": list(np.shape(array)),
            "data_offsets": [at, at + part.nbytes],
        }
        at += part.nbytes
        parts.append(part)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with epath.Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            file.write(part.tobytes())


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors that `read_arrays` reads says beside its arrays."""
    return _header(path)[0].get("__metadata__", {})


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and its size in bytes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("its header is cut off")
        return json.loads(file.read(size)), size


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    header, size = _header(path)
    header.pop("__metadata__", None)
    data = (
        np.memmap(path, np.uint8, "r", offset=8 + size)
        if path.stat().st_size > 8 + size
        else np.empty(0, np.uint8)
    )
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if end > len(data):
            raise ValueError(f"it ends before {name} does")
        arrays[name] = data[begin:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def _shards(index: Path) -> dict[str, np.ndarray]:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        arrays |= read_arrays(index.parent / Path(name).name)
    return arrays


def _torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path} needs PyTorch to be read: pip install torch, or take the model's safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors") from error
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
    for key in ("state_dict", "model", "teacher"):  # How training scripts wrap it.
        if key in state and isinstance(state[key], Mapping):
            state = state[key]
    arrays = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.detach().numpy()
    return arrays


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        # NumPy has no bfloat16 and keeps it as two bytes without a meaning.
        return {k: v.view(ml_dtypes.bfloat16) if v.dtype == "V2" else v for k, v in data.items()}
