import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.remat import rematerialise


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, factor):
        x = jnp.sin(nn.Conv(4, (3, 3), name="conv")(x))
        return jnp.cos(nn.Dense(4, name="dense")(x)) * factor


def kept(policy):
    """Numbers of floats of each shape that the backward pass of two blocks keeps."""
    x, block = jnp.ones((2, 8, 8, 4)), rematerialise(Block, policy, static_argnums=(2,))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return block(name="b")(block(name="a")(x, 2), 3)

    params = jax.eval_shape(Net().init, jax.random.key(0), x)
    residuals = jax.eval_shape(lambda p, x: jax.vjp(lambda p: Net().apply(p, x), p)[1], params, x)
    return sum(leaf.shape == x.shape for leaf in jax.tree.leaves(residuals))


def test_what_is_kept_of_each_policy():
    # Inputs of two blocks; with "dots" beside them two results each, the bias not yet added.
    assert kept("all") == 2
    assert kept("dots") == 2 + 4
    assert kept("none") > kept("dots")


def test_an_unknown_policy_is_named():
    with pytest.raises(UserError, match="'some' is not one of none, dots, all"):
        rematerialise(Block, "some")
