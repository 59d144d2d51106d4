"""Files of weights for the mutation test: how each is written into a folder, and the function that reads it."""

import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ovseg_jax.models.openseg import OpenSegNet
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.pretrained.big_vision import read_big_vision
from ovseg_jax.pretrained.files import npz_names, read_arrays, read_metadata, write_safetensors
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.to_torch import describe, to_torch
from ovseg_jax.towers.prompt_file import Prompt, load_prompt, save_original, save_prompt
from ovseg_jax.towers.prompt_layout import Layout
from tests.extras import require

TOWER = CLIPText(vocab_size=9, length=4, width=8, layers=1, heads=2, embed_dim=4)

NET = OpenSegNet(
    SmallBackbone(16, 1), (0.5,) * 3, (0.25,) * 3, width=8, embed_dim=8, num_queries=2, decoder_layers=1,
    head_convs=1, position_grid=2,
)  # fmt: skip


@functools.cache
def shapes() -> Any:
    """Variables of a small text tower."""
    return jax.eval_shape(TOWER.init, jax.random.key(0), np.zeros((1, 2), np.int32))


def arrays() -> dict[str, np.ndarray]:
    """Parameters of a small text tower by our names."""
    leaves = jax.tree.leaves_with_path(shapes()["params"])
    return {"/".join(k.key for k in path): np.full(leaf.shape, 0.5, leaf.dtype) for path, leaf in leaves}


def tower(path: Path) -> Any:
    """Reads the tower that lies in the folder of a file."""
    return load(str(path.parent), TOWER, shapes())


def _safetensors(folder: Path) -> Path:
    write_safetensors(folder / "model.safetensors", to_torch(arrays()), {"format": "pt"})
    return folder / "model.safetensors"


def _config(folder: Path) -> Path:
    _safetensors(folder)
    (folder / "config.json").write_text(json.dumps(describe(TOWER)))
    return folder / "config.json"


def _index(folder: Path) -> Path:
    parts = _safetensors(folder).rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(read_arrays(parts), parts.name)}))
    return index


def _npz(folder: Path) -> Path:
    scanned = {f"params/txt/{k.replace('block_0', 'block')}": x for k, x in arrays().items()}
    np.savez(folder / "w.npz", **{k: x[None] if "encoderblock" in k else x for k, x in scanned.items()})  # type: ignore[arg-type]
    return folder / "w.npz"


def _pt(folder: Path, zipped: bool = True) -> Path:
    torch = require("torch")
    state = {k: torch.from_numpy(np.array(x)) for k, x in to_torch(arrays()).items()}
    path = folder / "pytorch_model.bin"
    torch.save({"teacher": state, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    return path


def _pkl(folder: Path) -> Path:
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": to_torch(arrays())}, protocol=2))
    return folder / "model.pkl"


def _prompt(folder: Path) -> Path:
    context = np.full((2, 3, 8), 0.5, np.float32)
    prompt = Prompt(
        context, Layout(3, "end", specific=True), (("cat",), ("dog", "hound")), "tiny", "", (0.5,) * 8
    )
    save_prompt(folder / "prompt.safetensors", prompt)
    return folder / "prompt.safetensors"


def _original(folder: Path) -> Path:
    require("torch")
    save_original(folder / "model.pth.tar-20", Prompt(np.zeros((1, 3, 8), np.float32), Layout(3, "end")))
    return folder / "model.pth.tar-20"


def export_tiny(folder: Path) -> Path:
    """A whole exported model with a table of words."""
    require("torch")
    from ovseg_jax.torch.openseg import OpenSegNet as TorchNet

    described = describe(NET)
    state = {k: x.numpy() for k, x in TorchNet(described).state_dict().items()}
    write_safetensors(folder / "model.safetensors", state | {"text.table": np.ones((3, 8), np.float32)})
    classes = dict(names=[["cat"], ["dog"]], ids=[0, 1], isthing=[True, True], groups={})
    words = ["<pad>", "cat", "dog"]
    text = json.dumps(dict(method="openseg", model=described, image_size=16, words=words, classes=classes))
    (folder / "config.json").write_text(text)
    return folder / "config.json"


def segment(path: Path) -> Any:
    """Segments an image with the exported model that lies in the folder of a file."""
    import ovseg_jax.torch

    return ovseg_jax.torch.load(path.parent).segment(np.zeros((8, 9, 3), np.uint8), "cat; dog")


# Name -> (writes a whole file and what it needs beside it, returns its path; reads it: a result or a UserError).
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "config.json of an exported model": (export_tiny, segment),
    "safetensors": (_safetensors, tower),
    "metadata of safetensors": (_safetensors, read_metadata),
    "config.json beside weights": (_config, tower),
    "index of shards": (_index, tower),
    "npz": (_npz, lambda path: (npz_names(path), read_big_vision(path, "txt"))),
    "PyTorch's zip": (_pt, tower),
    "PyTorch's old form": (lambda folder: _pt(folder, False), tower),
    "detectron2's pickle": (_pkl, lambda path: load(str(path), TOWER, shapes())),
    "prompt": (_prompt, load_prompt),
    "original prompt": (_original, load_prompt),
}
