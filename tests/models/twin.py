"""For the tests of PyTorch modules: the same random parameters in a Flax module and in its twin."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.parallel.sharding import path_name
from ovseg_jax.pretrained.to_torch import to_torch
from tests import reference


def flatten(variables):
    """Arrays by path, without the names of collections."""
    trees = variables.values()
    return {path_name(path): leaf for tree in trees for path, leaf in jax.tree.leaves_with_path(tree)}


def draw(module, *inputs, small=""):
    """Variables of a Flax module in which each parameter matters; `small` are paths of what is kept near zero."""
    rng = np.random.default_rng(0)

    def perturb(path, leaf):
        if path[-1].key == "kernel":
            value = leaf
        elif path[-1].key in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(0, 0.5, leaf.shape)
        near_zero = small and re.match(small, path_name(path[1:]))
        return jnp.asarray(value * (0.002 if near_zero else 1), jnp.float32)

    return jax.tree.map_with_path(perturb, reference.init(module, *inputs))


def load(twin, variables):
    """Gives the twin these variables: none lacks, none is left over."""
    import torch

    state = to_torch({path: np.asarray(value) for path, value in flatten(variables).items()})
    twin.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    return twin.eval()


def assert_tower_agrees(label, found, expected):
    """A TowerOutput of PyTorch against Flax's, to 1e-4 of the largest value of each part."""
    assert found.taps.keys() == expected.taps.keys()
    pairs = [(found.pooled, expected.pooled), (found.tokens.permute(0, 2, 3, 1), expected.tokens)]
    pairs += [(found.taps[i].permute(0, 2, 3, 1), value) for i, value in expected.taps.items()]
    error = max(reference.relative_error(ours.numpy(), theirs) for ours, theirs in pairs)
    print(f"{label} max relative error {error:.1e}")
    assert error < 1e-4


def assert_same_shapes(module, twin, *inputs):
    """A Flax module's parameters, as PyTorch names and shapes them, are those of a twin on no device."""
    shapes = flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    # A view of one byte stands for each array.
    state = to_torch({path: np.broadcast_to(np.int8(0), leaf.shape) for path, leaf in shapes.items()})
    assert {name: value.shape for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in twin.state_dict().items()
    }


def assert_exports(module, x):
    """torch.export traces the twin for any number of inputs x."""
    import torch

    program = torch.export.export(module.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.cat([x, x])
    with torch.no_grad():
        pairs = zip(*map(jax.tree.leaves, (program.module()(more), module(more))), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
