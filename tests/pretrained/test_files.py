"""Weights on disk: written by the real libraries, read by ours; damaged and dangerous files."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.files import read_arrays, write_safetensors
from tests.extras import require

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "b": RNG.normal(size=5).astype(np.float16),
    "c": RNG.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
    "count": np.array(7),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_same(found, expected=ARRAYS):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype and found[name].shape == x.shape
        assert found[name].tobytes() == x.tobytes()


def tensors(torch):
    to = lambda x: (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        if x.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(x)
    )
    return {name: to(x) for name, x in ARRAYS.items()}


def test_safetensors_written_by_the_library(tmp_path):
    torch = require("torch")
    require("safetensors.torch").save_file(tensors(torch), tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(read_arrays(tmp_path / "model.safetensors"))
    assert_same(read_arrays(tmp_path))


def test_our_safetensors_are_read_by_the_library(tmp_path):
    torch = require("torch")
    write_safetensors(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"})
    assert_same(read_arrays(tmp_path / "x.safetensors"))
    found = require("safetensors.torch").load_file(tmp_path / "x.safetensors")
    for name, expected in tensors(torch).items():
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected)


def test_shards(tmp_path):
    first = {k: v for k, v in ARRAYS.items() if k < "b"}
    write_safetensors(tmp_path / "model-1.safetensors", first)
    write_safetensors(tmp_path / "model-2.safetensors", {k: v for k, v in ARRAYS.items() if k not in first})
    where = {k: f"model-{1 if k in first else 2}.safetensors" for k in ARRAYS}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same(read_arrays(tmp_path))


@pytest.mark.parametrize("wrapped", [False, True])
def test_pytorch_archives(tmp_path, wrapped):
    torch = require("torch")
    state = tensors(torch)
    torch.save({"model": state, "epoch": 3} if wrapped else state, tmp_path / "pytorch_model.bin")
    assert_same(read_arrays(tmp_path))


def test_a_torchscript_archive(tmp_path):
    torch = require("torch")
    module = torch.nn.Linear(2, 3)
    torch.jit.trace(module, torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    found = read_arrays(tmp_path / "ViT-B-16.pt")
    assert found.keys() == {"weight", "bias"}
    np.testing.assert_array_equal(found["weight"], module.weight.detach().numpy())


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_executed(tmp_path, capfd):
    torch = require("torch")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"x": Evil()}))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(UserError, match=f"{name} cannot be read as weights: it holds more than tensors"):
            read_arrays(tmp_path / name)
    assert "executed" not in capfd.readouterr().out


def test_npz_with_bfloat16(tmp_path):
    as_saved = {k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in ARRAYS.items()}
    np.savez(tmp_path / "w.npz", **as_saved)
    assert_same(read_arrays(tmp_path / "w.npz"))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such weights: .*nowhere"):
        read_arrays(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no weights: none of model.safetensors"):
        read_arrays(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights.h5: known are .safetensors, .npz"):
        read_arrays(tmp_path / "weights.h5")
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    whole = (tmp_path / "x.safetensors").read_bytes()
    for cut in (0, 4, 30, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut.safetensors cannot be read as weights"):
            read_arrays(tmp_path / "cut.safetensors")
    (tmp_path / "w.npz").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"w.npz cannot be read"):
        read_arrays(tmp_path / "w.npz")
