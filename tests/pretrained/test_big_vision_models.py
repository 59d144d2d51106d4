"""big_vision's ViT and SigLIP beside ours, from files that it could have written.

With the variable BIG_VISION naming a checkout of it, its own modules are built and compared; without, ours are held to
numbers that they gave (`python -m pytest -s` with the variable prints them).
"""

import importlib
import os
import sys
import types
import zlib

import jax
import numpy as np
import pytest

from ovseg_jax.models.text_towers import SiglipText
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.load import load

WIDTH, DEPTH, HEADS, MLP, SIZE, PATCH, EMBED = 24, 3, 2, 40, 24, 8, 10
VOCAB, LENGTH = 50, 7
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
TEXT = RNG.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)

THEIRS = dict(width=WIDTH, depth=DEPTH, mlp_dim=MLP, num_heads=HEADS)
SHAPE = dict(width=WIDTH, mlp_dim=MLP, heads=HEADS, embed_dim=EMBED)
IMAGE_SHAPE = dict(SHAPE, depth=DEPTH, patch=PATCH, grid=(3, 3), activation="gelu_tanh", resize="bilinear")
OURS = {
    "map": ViT(**IMAGE_SHAPE, cls="none", pool="map"),
    "gap": ViT(**IMAGE_SHAPE, cls="none", pool="mean"),
    "tok": ViT(**IMAGE_SHAPE, cls="plain", pool="cls"),
    "txt": SiglipText(**SHAPE, layers=DEPTH, vocab_size=VOCAB, length=LENGTH),
}
# What big_vision gave: the first row's first four numbers.
GOLDEN = {
    "map": [0.017217, 0.280735, 0.12748, 0.253781],
    "gap": [0.163994, 0.097705, 0.413892, 0.279596],
    "tok": [0.597326, 0.607629, 0.034363, 0.52568],
    "txt": [-0.284038, 0.086318, -0.576397, 1.259028],
}


def values(path, shape):
    """Weights that depend on their names alone."""
    drawn = np.random.default_rng(zlib.crc32(path.encode())).normal(size=shape)
    if path.endswith("scale"):
        return (1 + 0.2 * drawn).astype(np.float32)
    return (drawn * (0.3 if len(shape) < 2 else 0.5 * np.prod(shape[:-1]) ** -0.5)).astype(np.float32)


def shapes_of(kind):
    module = OURS[kind]
    return jax.eval_shape(module.init, jax.random.key(0), TEXT if kind == "txt" else IMAGE)


def write(folder, kind, prefix):
    """A file in big_vision's spelling of our module's parameters, which are its own."""
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(shapes_of(kind)["params"])
    }
    arrays = {prefix + k: values(k, leaf.shape) for k, leaf in flat.items()}
    np.savez(folder / "w.npz", **arrays, **({} if prefix == "params/" else {"params/t": np.ones(1)}))
    return folder / "w.npz", {k: values(k, leaf.shape) for k, leaf in flat.items()}


def ours(path, kind):
    module = OURS[kind]
    variables = load(f"big_vision:{path}", module, shapes_of(kind))
    return np.asarray(jax.jit(module.apply)(variables, TEXT if kind == "txt" else IMAGE).pooled)


@pytest.mark.parametrize("prefix", ["params/", "params/{tower}/"])
@pytest.mark.parametrize("kind", OURS)
def test_the_numbers_that_big_vision_gave(tmp_path, kind, prefix):
    path, _ = write(tmp_path, kind, prefix.format(tower="txt" if kind == "txt" else "img"))
    np.testing.assert_allclose(ours(path, kind)[0, :4], GOLDEN[kind], rtol=1e-4, atol=1e-5)


@pytest.fixture
def big_vision(monkeypatch):
    checkout = os.environ.get("BIG_VISION")
    if not checkout:
        pytest.skip("BIG_VISION names no checkout of big_vision")
    monkeypatch.syspath_prepend(checkout)
    # Its utils need TensorFlow, for files; models need them for loading, which we do.
    monkeypatch.setitem(sys.modules, "big_vision.utils", types.ModuleType("big_vision.utils"))
    return lambda name: importlib.import_module(f"big_vision.models.{name}")


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", OURS)
def test_big_vision_itself(tmp_path, big_vision, kind, scan):
    from flax.traverse_util import unflatten_dict

    from ovseg_jax.pretrained.big_vision import to_scan, write_big_vision

    _, arrays = write(tmp_path, kind, "params/")
    if kind == "txt":
        model = big_vision("proj.image_text.text_transformer").Model(
            EMBED, vocab_size=VOCAB, scan=scan, **THEIRS
        )
    else:
        model = big_vision("vit").Model(EMBED, patch_size=(PATCH, PATCH), pool_type=kind, scan=scan, **THEIRS)
    params = unflatten_dict(to_scan(arrays) if scan else arrays, sep="/")
    x = TEXT if kind == "txt" else IMAGE
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    expected = np.asarray(jax.jit(model.apply)({"params": params}, x)[0])
    print(f'\n    "{kind}": {[round(float(v), 6) for v in expected[0, :4]]},')
    write_big_vision(tmp_path / "s.npz", {f"params/{k}": v for k, v in arrays.items()}, scan=scan)
    error = np.abs(ours(tmp_path / "s.npz", kind) - expected).max() / np.abs(expected).max()
    assert error < 1e-4
