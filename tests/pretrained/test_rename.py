import jax
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.rename import Rename, conv, dense, fit, heads_in, heads_out, heads_qkv, rename

RNG = np.random.default_rng(0)
RENAMES = [
    Rename(r"blocks\.(\d+)\.attn\.qkv\.weight", r"params/block_\1/{}/kernel", heads_qkv(2)),
    Rename(r"blocks\.(\d+)\.attn\.qkv\.bias", r"params/block_\1/{}/bias", heads_qkv(2)),
    Rename(r"stem\.weight", "params/stem/kernel", conv),
    Rename(r"head\..*", ""),
]


def test_names_and_layouts():
    source = {
        "blocks.3.attn.qkv.weight": RNG.normal(size=(12, 5)),
        "blocks.3.attn.qkv.bias": RNG.normal(size=12),
        "stem.weight": RNG.normal(size=(7, 3, 2, 4)),
        "head.weight": RNG.normal(size=(2, 2)),
    }
    out = rename(source, RENAMES)
    assert {k: v.shape for k, v in out.items()} == {
        "params/block_3/query/kernel": (5, 2, 2),
        "params/block_3/key/kernel": (5, 2, 2),
        "params/block_3/value/kernel": (5, 2, 2),
        "params/block_3/query/bias": (2, 2),
        "params/block_3/key/bias": (2, 2),
        "params/block_3/value/bias": (2, 2),
        "params/stem/kernel": (2, 4, 3, 7),
    }
    x = RNG.normal(size=5)
    q, k, v = np.split(source["blocks.3.attn.qkv.weight"] @ x + source["blocks.3.attn.qkv.bias"], 3)
    for name, expected in (("query", q), ("key", k), ("value", v)):
        kernel, bias = (out[f"params/block_3/{name}/{leaf}"] for leaf in ("kernel", "bias"))
        np.testing.assert_allclose(np.einsum("c,chd->hd", x, kernel) + bias, expected.reshape(2, 2))


def test_layouts_of_single_arrays():
    weight, x = RNG.normal(size=(6, 4)), RNG.normal(size=4)
    np.testing.assert_allclose(x @ dense(weight), weight @ x)
    np.testing.assert_allclose(np.einsum("c,chd->hd", x, heads_in(3)(weight)).ravel(), weight @ x)
    out, y = RNG.normal(size=(4, 6)), RNG.normal(size=(3, 2))
    np.testing.assert_allclose(np.einsum("hd,hdo->o", y, heads_out(3)(out)), out @ y.ravel())
    assert heads_in(3)(np.zeros(6)).shape == (3, 2) and heads_out(3)(np.zeros(4)).shape == (4,)


def test_what_nobody_knows_is_named():
    with pytest.raises(UserError, match=r"2 names \(tail.weight, tale\) that this model does not have"):
        rename({"tail.weight": np.zeros(2), "tale": np.zeros(2)}, RENAMES)
    with pytest.raises(UserError, match="two arrays of the checkpoint belong to params/a; one of them is a2"):
        rename({"a1": np.zeros(2), "a2": np.zeros(2)}, [Rename(r"a\d", "params/a")])


def test_a_fit_is_strict():
    shapes = {
        "params": {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}, "b": np.zeros(4, np.float32)}
    }
    arrays = {"params/a/kernel": np.ones((2, 3), np.float64), "params/b": np.ones(4, np.float16)}
    tree = fit(arrays, shapes)
    assert tree["params"]["a"]["kernel"].dtype == tree["params"]["b"].dtype == np.float32
    part = fit({"params/b": arrays["params/b"]}, shapes, may_miss=["/a/"])
    assert set(part["params"]) == {"b"}
    for changed, message in (
        ({"params/b": arrays["params/b"]}, r"lacks 1 names \(params/a/kernel\)"),
        (arrays | {"params/c": np.ones(1)}, r"has 1 names \(params/c\) too many"),
        (arrays | {"params/b": np.ones(5)}, r"wrong shape: params/b is \(5,\), not \(4,\)"),
    ):
        with pytest.raises(UserError, match=message):
            fit(changed, shapes)


def test_an_array_is_copied_once(tmp_path):
    """Into memory of its own, by `rename` or by `fit`: a file may change while its arrays are in use."""
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float32).reshape(2, 3))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    renamed = rename(
        {"w": mapped, "v": mapped}, [Rename("w", "params/turned", dense), Rename("v", "params/same")]
    )
    found = fit(
        renamed, {"params": {"turned": np.zeros((3, 2), np.float32), "same": np.zeros((2, 3), np.float32)}}
    )
    assert np.shares_memory(found["params"]["turned"], renamed["params/turned"])
    for x in found["params"].values():
        assert not np.shares_memory(x, mapped) and x.flags.writeable
