"""The optimiser against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.train.optimizer import RULES, make_optimizer, make_schedule

PARAMS = {"head": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.ones(3)}, "temperature": jnp.array(1.5)}
GRADS = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)


def updates(steps=1, grads=GRADS, **config):
    config = ConfigDict({"learning_rate": 0.1, "schedule": "constant", **config})
    optimizer = make_optimizer(config, PARAMS, 10)
    params, state = PARAMS, optimizer.transform.init(PARAMS)
    for _ in range(steps):
        update, state = optimizer.transform.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, update)
    return jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), params, PARAMS)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "polynomial"])
def test_schedules(name):
    config = ConfigDict(dict(learning_rate=0.2, schedule=name, warmup_steps=4, final_fraction=0.1, power=2.0))
    rate = make_schedule(config, 14)
    np.testing.assert_allclose([rate(t) for t in range(5)], [0.05, 0.1, 0.15, 0.2, 0.2], rtol=1e-6)
    middle = {"constant": 1.0, "linear": 0.55, "cosine": 0.55, "polynomial": 0.325}[name]
    end = {"constant": 1.0, "linear": 0.1, "cosine": 0.1, "polynomial": 0.1}[name]
    np.testing.assert_allclose([rate(9), rate(14), rate(99)], [0.2 * middle, 0.2 * end, 0.2 * end], rtol=1e-6)


def test_a_rate_that_falls_in_steps():
    rate = make_schedule(ConfigDict(dict(learning_rate=0.2, schedule="steps", drops=(5, 8))), 10)
    np.testing.assert_allclose(
        [rate(t) for t in (0, 4, 5, 7, 8, 99)], np.repeat([0.2, 0.02, 0.002], 2), rtol=1e-5
    )


def test_a_rate_set_once_an_epoch():
    """CoOp's: the first epoch at a constant rate, then a cosine as long as the run, a step an epoch."""
    settings = dict(learning_rate=0.002, schedule="cosine", warmup_steps=5, warmup_rate=1e-5)
    rate = make_schedule(ConfigDict(dict(settings, hold_steps=5, decay_steps=20)), 20)
    epochs = [1e-5, *(0.001 * (1 + np.cos(np.pi * e / 4)) for e in range(3))]
    np.testing.assert_allclose([rate(t) for t in range(20)], np.repeat(epochs, 5), rtol=1e-5)


def test_sgd_is_momentum_over_the_gradient_plus_decay():
    moved = updates(2, name="sgd", momentum=0.9, weight_decay=0.01)
    w, v = 2.0, 0.0
    for _ in range(2):
        v = 0.9 * v + 0.5 + 0.01 * w
        w -= 0.1 * v
    np.testing.assert_allclose(moved["head"]["kernel"], w - 2.0, rtol=1e-5)
    # One-dimensional parameters and scalars do not decay.
    np.testing.assert_allclose(moved["head"]["bias"], -0.1 * (0.5 + 0.95), rtol=1e-5)
    np.testing.assert_allclose(moved["temperature"], -0.1 * (0.5 + 0.95), rtol=1e-5)


def test_adamw_decay_is_decoupled():
    moved = updates(name="adamw", weight_decay=0.1)
    np.testing.assert_allclose(moved["head"]["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(moved["head"]["kernel"], -0.1 * (1 + 0.1 * 2.0), rtol=1e-5)


def test_what_no_decay_names_does_not_decay():
    params = {"query": {"bias": jnp.ones((2, 3)), "kernel": jnp.ones((2, 3))}, "cls": jnp.ones((1, 1, 3))}
    config = ConfigDict(
        dict(learning_rate=0.1, schedule="constant", weight_decay=0.1, no_decay=("^cls$", "/bias$"))
    )
    optimizer = make_optimizer(config, params, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    update, _ = optimizer.transform.update(zeros, optimizer.transform.init(params), params)
    assert not update["query"]["bias"].any() and not update["cls"].any()
    np.testing.assert_allclose(update["query"]["kernel"], -0.01, rtol=1e-5)


def test_layer_decay_of_a_vit():
    """Groups = layers + 2: the embeddings are group 0, block i is group i + 1, the head is the last."""
    from ovseg_jax.configs.common import layer_decay
    from ovseg_jax.models.vit import ViT

    vit = ViT(patch=4, width=8, depth=11, heads=2, mlp_dim=8, grid=(2, 2))
    shapes = jax.eval_shape(vit.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params = {"image": {"backbone": {"tower": shapes}, "head": {"kernel": jnp.zeros((2, 2))}}}
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    multipliers = layer_decay(0.7, 11, "image/backbone/tower")
    config = ConfigDict(dict(name="sgd", learning_rate=1.0, schedule="constant", multipliers=multipliers))
    optimizer = make_optimizer(config, params, 10)
    ones = jax.tree.map(jnp.ones_like, params)
    update, _ = optimizer.transform.update(ones, optimizer.transform.init(params), params)
    tower = update["image"]["backbone"]["tower"]
    groups = {0: [tower["cls"], tower["pos_embedding"], tower["embedding"]]}
    groups |= {i + 1: [tower["Transformer"][f"encoderblock_{i}"]] for i in range(11)}
    groups[12] = [tower["Transformer"]["encoder_norm"], update["image"]["head"]]
    for group, trees in groups.items():
        for leaf in jax.tree.leaves(trees):
            np.testing.assert_allclose(leaf, -(0.7 ** (12 - group)), rtol=1e-5)


def test_clipping_bounds_the_norm_over_everything():
    moved = updates(name="sgd", clip_norm=0.25)
    total = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(moved)))
    np.testing.assert_allclose(total, 0.1 * 0.25, rtol=1e-5)


def test_the_first_multiplier_that_is_found_counts():
    moved = updates(name="sgd", multipliers=(("bias", 0.5), ("^head/", 0.1)))
    np.testing.assert_allclose(moved["head"]["bias"], -0.025, rtol=1e-5)
    np.testing.assert_allclose(moved["head"]["kernel"], -0.005, rtol=1e-5)
    np.testing.assert_allclose(moved["temperature"], -0.05, rtol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_frozen_parameters_do_not_move_and_are_not_part_of_the_norm(name):
    big = jax.tree.map(jnp.asarray, {**GRADS, "temperature": jnp.array(1e6)})
    config = dict(
        name=name, weight_decay=0.1, clip_norm=0.25, multipliers=(("temperature", None), ("head", 0.5))
    )
    moved = updates(3, big, **config)
    assert moved["temperature"] == 0
    assert np.all(moved["head"]["kernel"] != 0)
    other = updates(3, {**big, "temperature": jnp.array(0.0)}, **config)
    np.testing.assert_array_equal(moved["head"]["kernel"], other["head"]["kernel"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(name="adamx"), "adamx.*sgd"),
        (dict(schedule="stairs"), "stairs.*cosine"),
        (dict(schedule="steps"), "needs optimizer.drops"),
        (dict(multipliers=(("hed/", None),)), 'multipliers has "hed/"'),
        (dict(multipliers=(("hed/", 1.0),)), 'multipliers has "hed/"'),
        (dict(no_decay=("hed/",)), 'no_decay has "hed/"'),
    ],
)
def test_mistakes(config, message):
    with pytest.raises(UserError, match=message):
        updates(**config)


def test_lamb_is_evas():
    """EVA-CLIP's LAMB: Adam's step with decay, scaled to the parameter's norm; a parameter without decay is not."""
    moved = updates(2, name="lamb", weight_decay=0.05, b1=0.9, b2=0.98)
    params, m, v = {"kernel": np.full((2, 3), 2.0), "bias": np.ones(3)}, 0.0, 0.0
    for t in (1, 2):
        m, v = 0.9 * m + 0.1 * 0.5, 0.98 * v + 0.02 * 0.25
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.98**t)) + 1e-6)
        update = step + 0.05 * params["kernel"]
        params["kernel"] = params["kernel"] - 0.1 * update * np.linalg.norm(
            params["kernel"]
        ) / np.linalg.norm(update)
        params["bias"] = params["bias"] - 0.1 * step
    np.testing.assert_allclose(moved["head"]["kernel"], params["kernel"] - 2, rtol=1e-5)
    np.testing.assert_allclose(moved["head"]["bias"], params["bias"] - 1, rtol=1e-5)
    np.testing.assert_allclose(moved["temperature"], params["bias"][0] - 1, rtol=1e-5)
