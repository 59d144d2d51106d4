"""Files of published weights as NumPy arrays by name: safetensors, PyTorch's archives, npz, detectron2's pickles."""

import argparse
import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from ovseg_jax.errors import UserError, optional
from ovseg_jax.files import verify
from ovseg_jax.reading import reading

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
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_MOST_HEADER = 100_000_000  # bytes, as the safetensors package has it
# The files of weights in a folder, in order of preference.
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
    without pickle. Of a `.pkl`, as detectron2's models come, only arrays and Python's own values are read.

    Raises:
      UserError: the file is missing, unknown or damaged, holds arrays that are not numbers, or needs PyTorch, which is
        not installed.
    """
    path = weights_file(path)
    verify(path)
    readers = {
        ".safetensors": _safetensors,
        ".npz": _npz,
        ".bin": _torch,
        ".pt": _torch,
        ".pth": _torch,
        ".pkl": _pickled,
    }
    read = _shards if path.name.endswith(".index.json") else readers.get(path.suffix)
    if read is None:
        raise UserError(
            f"{path} is neither a file of weights ({', '.join(readers)}) nor a folder of Hugging Face"
        )
    with reading(path, "the weights"):
        arrays = read(path)
        for name, array in arrays.items():
            if not _is_number(array.dtype):
                raise ValueError(f"{name} holds {array.dtype}, not numbers")
        return arrays


def weights_file(path: str | Path) -> Path:
    """Returns the path itself, or that of the first of `NAMES` that a folder holds.

    Raises:
      UserError: there is no such file, or the folder holds no weights.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{path} holds no weights: none of {', '.join(NAMES)}")
        return found
    if not path.exists():
        raise UserError(f"no such weights: {path}")
    return path


def has_weights(folder: Path) -> bool:
    """Tells whether a folder holds one of `NAMES`."""
    return any((folder / name).is_file() for name in NAMES)


def npz_names(path: Path) -> list[str]:
    """Returns the names of an npz file's arrays without reading these.

    Raises:
      UserError: the file is missing or damaged.
    """
    with reading(path, "the weights"), np.load(path) as file:
        return list(file.files)


def write_safetensors(
    path: epath.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}
) -> None:
    """Writes arrays as a safetensors file, sorted by name."""
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
    """Reads the metadata of a safetensors file, a dict of texts.

    Raises:
      UserError: the file is damaged.
    """
    with reading(path, "the weights"):
        return _header(path)[1]


class _Entry(NamedTuple):
    """The type, the shape and the byte range of an array in a safetensors file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _header(path: Path) -> tuple[dict[str, _Entry], dict[str, str], int]:
    """Reads the entries of the arrays, the metadata, and the offset of the data.

    It makes the checks of the safetensors package: the arrays fill the data without gaps, overlaps or a rest, and each
    has as many bytes as its shape and type need.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(length - 8, _MOST_HEADER):
            raise ValueError("its header is truncated")
        header = json.loads(file.read(size).decode(), object_pairs_hook=_no_repeats)
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is not an object of texts")
    entries = {name: _entry(name, given) for name, given in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            raise ValueError(f"{name} begins at byte {entry.begin} of the data, not at {at}")
        at = entry.end
    if at != length - 8 - size:
        raise ValueError(f"its arrays take {at} bytes, but it holds {length - 8 - size}")
    return entries, metadata, 8 + size


def _entry(name: str, given: Any) -> _Entry:
    if not isinstance(given, dict) or not given.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    shape, offsets = given["shape"], given["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"shape and data_offsets of {name} are not lists of counts")
    if not isinstance(given["dtype"], str) or given["dtype"] not in _TYPES:
        raise ValueError(f"{name} has the unknown type {given['dtype']!r}")
    dtype = np.dtype(_TYPES[given["dtype"]])
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of {given['dtype']} {shape} does not fit its data_offsets {offsets}")
    return _Entry(dtype, tuple(shape), *offsets)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    entries, _, start = _header(path)
    empty = path.stat().st_size == start
    data = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r", offset=start)
    return {
        name: data[entry.begin : entry.end].view(entry.dtype).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _shards(index: Path) -> dict[str, np.ndarray]:
    where = json.loads(index.read_text("utf-8"))["weight_map"]
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(set(where.values())):
        if name.endswith(".index.json"):
            raise ValueError(f"it names the index {name} as a part")
        arrays |= read_arrays(index.parent / Path(name).name)
    if lost := sorted(where.keys() - arrays.keys()):
        raise ValueError(f"its parts lack {lost[0]}")
    return arrays


def _torch(path: Path) -> dict[str, np.ndarray]:
    torch = optional("torch", f"{path} needs PyTorch: pip install torch, or use the model's safetensors file")
    try:
        # Full checkpoints of DINO and MAE hold their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds other objects than tensors") from error
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        state = torch.jit.load(str(path), map_location="cpu").state_dict()
    state, arrays = _unwrapped(state), {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            continue
        if tensor.dtype == torch.bfloat16:
            arrays[name] = tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.detach().numpy()
    if not arrays:
        raise ValueError("it holds no tensors")
    return arrays


def _unwrapped(state: Any) -> Mapping[str, Any]:
    """Returns the tensors by name of a checkpoint."""
    # Training scripts wrap the state; DINO's full checkpoints hold `student` beside the published `teacher`.
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"it holds a {type(state).__name__}, not tensors by name")
    return state


class _ArraysOnly(pickle.Unpickler):
    """A reader of pickles that creates nothing but NumPy's arrays and numbers, and Python's own values."""

    def find_class(self, module: str, name: str) -> Any:
        """Returns what NumPy needs to create an array, by its old or new name."""
        if f"{module.replace('numpy.core', 'numpy._core')}.{name}" not in _OF_ARRAYS:
            raise ValueError(f"it holds {module}.{name}, not only arrays")
        return super().find_class(module, name)


_OF_ARRAYS = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
    "collections.OrderedDict",
    "_codecs.encode",
)


def _pickled(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        state = _unwrapped(_ArraysOnly(file, encoding="latin1").load())
    arrays = {name: x for name, x in state.items() if isinstance(name, str) and isinstance(x, np.ndarray)}
    if not arrays:
        raise ValueError("it holds no arrays")
    return arrays


def _npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as data:
        # NumPy has no bfloat16 and saves it as raw values of two bytes.
        return {k: v.view(ml_dtypes.bfloat16) if v.dtype == "V2" else v for k, v in data.items()}


def _is_number(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" or dtype in (np.dtype(kind) for kind in _TYPES.values())
