"""The train step, shared by all methods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ovseg_jax.kernels.cpu_convs import fast_in_training
from ovseg_jax.parallel.sharding import on_cpu
from ovseg_jax.protocols import Batch, Trainable
from ovseg_jax.train.optimizer import Optimizer
from ovseg_jax.train.state import TrainState

# Name -> (sum, count): sums of several steps add up, and one division at the end gives the mean.
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> Step:
    """Creates the jitted function `(state, batch) -> (state, metrics)`, which donates its input state.

    The random key of a step is fold_in(key(seed), step), so that a resumed run draws the same numbers. The metrics are
    those of the method, `loss`, `grad_norm` (before clipping), `param_norm` (of all variables after the update; it is
    NaN or infinite if any of them is) and `learning_rate`.

    Args:
      method: defines the loss.
      optimizer: see `make_optimizer`; parameters that it does not train are constants.
      seed: seed of the random keys.
      shardings: of the state, before and after the step.
    """

    loss = fast_in_training(method.loss)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            # No gradient is computed for frozen parameters.
            params = jax.tree.map(
                lambda p, moves: p if moves else jax.lax.stop_gradient(p), params, optimizer.trainable
            )
            return loss({"params": params, **state.model_state}, batch, rng)

        (total, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # The average covers few steps at first, so that it forgets the initial parameters.
            share = 1 - jnp.minimum(optimizer.ema, (1 + state.step) / (10 + state.step))
            averaged = optax.incremental_update(params, average, share)
            average = jax.tree.map(
                lambda p, a, moves: a if moves else p, params, averaged, optimizer.trainable
            )
        new = TrainState(
            step=state.step + 1,
            params=params,
            model_state={**state.model_state, **aux.mutated},
            opt_state=opt_state,
            average=average,
        )
        one = jnp.ones((), jnp.float32)
        metrics = {
            "loss": (total, one),
            **aux.metrics,
            "grad_norm": (optax.global_norm(grads), one),
            "param_norm": (optax.global_norm(_floats(new.variables)), one),
            "learning_rate": (optimizer.schedule(state.step), one),
        }
        return new, metrics

    # By default XLA runs independent operations concurrently, each on all CPU cores. Run one after another, they take
    # three quarters of the time for a step of `scenes`.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(
        step,
        donate_argnums=0,
        # Without it the compiler could choose another sharding for the new state.
        out_shardings=(shardings, None),
        compiler_options=options if on_cpu(shardings.step.mesh) else None,
    )


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
