"""Weights on disk: written by the real libraries, read by ours; damaged and dangerous files."""

import json
import pickle
from argparse import Namespace

import ml_dtypes
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.files import read_arrays, read_metadata, write_safetensors
from ovseg_jax.pretrained.load import formats, recognise, without_wrapper
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


@pytest.mark.parametrize("prefix", ["", "module."])
def test_full_checkpoints_of_dino(tmp_path, prefix):
    """`teacher` is what they publish; the student, the arguments and the head are left."""
    torch = require("torch")
    small = lambda value: (
        {
            f"{prefix}backbone.{name}": torch.full((2,), value)
            for name in ("cls_token", "blocks.0.norm1.weight")
        }
        | {f"{prefix}head.mlp.0.weight": torch.zeros(3)}
    )
    full = dict(
        student=small(1.0), teacher=small(2.0), optimizer={"state": {}}, epoch=3, args=Namespace(lr=1.0)
    )
    torch.save(full, tmp_path / "checkpoint.pth")
    found = without_wrapper(read_arrays(tmp_path / "checkpoint.pth"))
    assert found.keys() == {"cls_token", "blocks.0.norm1.weight"}
    assert all((x == 2).all() for x in found.values())
    assert recognise(found, formats(ViT()), tmp_path)[0] == "timm's ViT"


def test_wrapped_names_without_a_backbone_keep_all():
    arrays = {"module.conv1.weight": np.zeros(1), "module.fc.bias": np.ones(1)}
    assert without_wrapper(arrays).keys() == {"conv1.weight", "fc.bias"}
    assert without_wrapper({"module.a": np.zeros(1), "b": np.zeros(1)}).keys() == {"module.a", "b"}


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_executed(tmp_path, capfd):
    torch = require("torch")
    torch.save({"x": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"x": Evil()}))
    for name in ("evil.pt", "evil.bin"):
        with pytest.raises(UserError, match=f"{name} cannot be read: it holds other objects than tensors"):
            read_arrays(tmp_path / name)
    assert "executed" not in capfd.readouterr().out


def test_pickles_of_arrays_alone(tmp_path, capfd):
    """As detectron2's: by both of NumPy's names of its functions; anything else is refused and not run."""
    state = {
        "model": {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "__author__": "x",
        "step": 3,
    }
    for protocol in (2, 5):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(state, protocol))
        np.testing.assert_array_equal(read_arrays(tmp_path / "w.pkl")["a.weight"], state["model"]["a.weight"])
    old = pickle.dumps(state, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "w.pkl").write_bytes(old)
    assert read_arrays(tmp_path / "w.pkl").keys() == {"a.weight"}
    for other, message in ((Evil(), "it holds builtins.print, not only arrays"), ({"a": 1}, "no arrays")):
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(other))
        with pytest.raises(UserError, match=message):
            read_arrays(tmp_path / "w.pkl")
    assert "executed" not in capfd.readouterr().out


def test_npz_with_bfloat16(tmp_path):
    as_saved = {k: v.view("V2") if v.dtype == ml_dtypes.bfloat16 else v for k, v in ARRAYS.items()}
    np.savez(tmp_path / "w.npz", **as_saved)
    assert_same(read_arrays(tmp_path / "w.npz"))


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(begin, end, dtype="F32", shape=None):
    return dict(
        dtype=dtype, shape=[(end - begin) // 4] if shape is None else shape, data_offsets=[begin, end]
    )


@pytest.mark.parametrize(
    "text,data,expected",
    [
        (header(a=entry(0, 8), b=entry(8, 16)), 20, "its arrays take 16 bytes, but it holds 20"),
        (header(a=entry(0, 8), b=entry(8, 16)), 12, "its arrays take 16 bytes, but it holds 12"),
        (header(a=entry(4, 8), b=entry(8, 16)), 16, "a begins at byte 4 of the data, not at 0"),
        (header(a=entry(0, 8), b=entry(4, 16)), 16, "b begins at byte 4 of the data, not at 8"),
        (header(a=entry(0, 8), b=entry(0, 8)), 8, "b begins at byte 0 of the data, not at 8"),
        (header(a=entry(-8, 0, shape=[2])), 8, "shape and data_offsets of a are not lists of counts"),
        (header(a=entry(0, 8, shape=[-2])), 8, "shape and data_offsets of a are not lists of counts"),
        (header(a=entry(0, 8, shape=[True, 2])), 8, "shape and data_offsets of a are not lists of counts"),
        (header(a=entry(0, 8, shape=[2.0])), 8, "shape and data_offsets of a are not lists of counts"),
        (header(a=entry(0, 8, shape=[3])), 8, "a of F32 .3. does not fit its data_offsets"),
        (header(a=entry(0, 8, dtype="F64")), 8, "a of F64 .2. does not fit its data_offsets"),
        (header(a=entry(0, 8, dtype="F31")), 8, "a has the unknown type 'F31'"),
        (header(a=entry(0, 8, dtype=[])), 8, "a has the unknown type"),
        (header(a=[0, 8]), 8, "a is not described by dtype, shape and data_offsets"),
        (header(a=dict(dtype="F32", shape=[2])), 8, "a is not described by dtype, shape and data_offsets"),
        (header(__metadata__={"a": 1}), 0, "its __metadata__ is not an object of texts"),
        (b"\x02\0\0\0\0\0\0\0[]", 0, "its header is not a JSON object"),
        (b"\xff" * 8, 8, "its header is truncated"),
        (b"\x12\0\0\0\0\0\0\0" + b'{"a":{},"a": null}', 0, "a name occurs twice in its header"),
    ],
)
def test_safetensors_that_hold_something_else_than_they_say(tmp_path, text, data, expected):
    """The package refuses each of them as well."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(text + bytes(data))
    for read in (read_arrays, read_metadata):
        with pytest.raises(UserError, match=f"x.safetensors cannot be read: {expected}"):
            read(path)
    if "twice" not in expected:  # The package takes the last one.
        with pytest.raises(Exception, match=r".+"):
            require("safetensors.numpy").load(path.read_bytes())


def test_arrays_are_numbers(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array(["x"]), b=np.zeros(2))
    with pytest.raises(UserError, match=r"w.npz cannot be read: a holds <U1, not numbers"):
        read_arrays(tmp_path / "w.npz")


def test_shards_that_lack_some(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", {"b": ARRAYS["b"]})
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        '{"weight_map": {"b": "model-1.safetensors", "c": "model-1.safetensors"}}',
        '{"weight_map": {"b": "model.safetensors.index.json"}}',
        '{"weight_map": {"b": 3}}',
        '{"weight_map": ["b"]}',
        "[]",
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=r"model.safetensors.index.json cannot be read: "):
            read_arrays(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such weights: .*nowhere"):
        read_arrays(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no weights: none of model.safetensors"):
        read_arrays(tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"weights.h5 is neither a file of weights \(.safetensors, .npz"):
        read_arrays(tmp_path / "weights.h5")
    write_safetensors(tmp_path / "x.safetensors", ARRAYS)
    whole = (tmp_path / "x.safetensors").read_bytes()
    for cut in (0, 4, 30, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut.safetensors cannot be read"):
            read_arrays(tmp_path / "cut.safetensors")
    (tmp_path / "w.npz").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match=r"w.npz cannot be read"):
        read_arrays(tmp_path / "w.npz")
