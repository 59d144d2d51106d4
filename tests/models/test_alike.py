"""Towers whose alike blocks are traced once: the same program after inlining, so the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models import transformer
from ovseg_jax.models.alike import init_shapes, traced_once
from ovseg_jax.models.convpass import with_convpass
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.models.vit import ViT

SIZES: dict[str, Any] = dict(patch=4, width=16, depth=4, heads=2, grid=(3, 3))
TOWERS: dict[str, Any] = {
    "vit": ViT(**SIZES, mlp_dim=24),
    "last": ViT(**SIZES, mlp_dim=24, cls="placed", last="clearclip"),
    "remat": ViT(**SIZES, mlp_dim=24, remat="all"),
    "eva": Eva(patch=4, width=16, depth=4, heads=2, hidden=24, grid=3, last="sclip"),
}


def weights_of(module, *args):
    rng = np.random.default_rng(0)
    variables = module.init(jax.random.key(0), *args)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), variables)


def traced(monkeypatch, function, *args):
    """The result, and how many blocks were traced."""
    whole, count = transformer.attend, []
    monkeypatch.setattr(transformer, "attend", lambda *a, **k: count.append(1) or whole(*a, **k))
    found = jax.jit(function)(*args)
    monkeypatch.undo()
    return found, len(count)


@pytest.mark.parametrize(("name", "blocks"), [("vit", 1), ("last", 2), ("remat", 1), ("eva", 2)])
def test_blocks_that_are_alike_are_traced_once(name, blocks, monkeypatch):
    tower, image = (
        TOWERS[name],
        jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 20, 3)), jnp.float32),
    )
    variables = weights_of(tower, image)
    shown = jnp.ones((2, 3, 5), bool).at[1, :, 3:].set(False)
    forward = lambda v, x: tower.apply(v, x, inside=shown)
    want, each = traced(monkeypatch, forward, variables, image)
    found, once = traced(monkeypatch, traced_once(forward), variables, image)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert (each, once) == (4, blocks)


def test_blocks_of_a_text_are_traced_once(monkeypatch):
    tower = CLIPText(vocab_size=20, length=6, width=16, layers=3, heads=2, embed_dim=8)
    ids, valid = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)
    variables = weights_of(tower, ids)
    want, _ = traced(monkeypatch, tower.apply, variables, ids, valid)
    found, once = traced(monkeypatch, traced_once(tower.apply), variables, ids, valid)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert once == 1


def test_blocks_with_random_numbers_are_left_alone():
    tower, image = ViT(**SIZES, mlp_dim=24, drop_rate=0.5), jnp.ones((2, 12, 12, 3))
    variables = weights_of(tower, image)
    forward = lambda v, x: tower.apply(v, x, rngs={"dropout": jax.random.key(3)})
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(traced_once(forward))(variables, image),
        jax.jit(forward)(variables, image),
    )


@pytest.mark.parametrize("name", [*TOWERS, "text", "adapters", "dropout"])
def test_shapes_are_those_of_the_variables(name):
    if name == "text":
        tower, args = (
            CLIPText(vocab_size=20, length=6, width=16, layers=3, heads=2, embed_dim=8),
            (jnp.ones((1, 6), int),),
        )
    else:
        others = {
            "adapters": with_convpass(TOWERS["vit"], width=4),
            "dropout": ViT(**SIZES, mlp_dim=24, drop_rate=0.5),
        }
        tower, args = (TOWERS | others)[name], (jnp.ones((1, 12, 12, 3)),)
    rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(init_shapes(tower, *args)) == shapes(tower.init_with_output(rngs, *args))
