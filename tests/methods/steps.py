"""Train steps of a method, as the tests of several methods take them."""

import jax
import numpy as np
from ml_collections import ConfigDict

from ovseg_jax.parallel.sharding import DEFAULT_RULES, make_mesh, put_batch
from ovseg_jax.train.optimizer import make_optimizer
from ovseg_jax.train.state import abstract_variables, create_state, state_shardings
from ovseg_jax.train.step import make_step

ADAMW = dict(name="adamw", learning_rate=1e-2, schedule="constant", warmup_steps=0, clip_norm=1.0)


def take_steps(method, data, devices, count=4, optimizer=ADAMW):
    """Takes steps with one batch; returns the parameters before and after, and the loss of each step."""
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        variables = abstract_variables(method, 0)
        made = make_optimizer(ConfigDict(optimizer), variables["params"], count, method.frozen)
        shardings = state_shardings(made, variables, mesh, DEFAULT_RULES)
        step, state = make_step(method, made, 0, shardings), create_state(method, made, 0, shardings)
        before, losses = jax.device_get(state.params), []
        for _ in range(count):
            state, metrics = step(state, put_batch(data, mesh))
            losses.append(float(metrics["loss"][0]))
        assert step._cache_size() == 1  # compiled once
        return before, jax.device_get(state.params), losses


def check_devices(method, data, devices):
    """Checks that several devices compute the losses of one, and that they fall."""
    curves = [take_steps(method, data, count)[2] for count in (1, devices)]
    np.testing.assert_allclose(*curves, rtol=2e-4)
    assert curves[0][-1] < curves[0][0]
