"""The train step, shared by all methods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ovseg_jax.parallel.sharding import on_cpu
from ovseg_jax.protocols import Batch, Trainable
from ovseg_jax.train.optimizer import Optimizer
from ovseg_jax.train.state import TrainState

# Name -> (sum, count): sums of several steps add up, and one division at the end gives the mean.
Metrics = dict[str, tuple[jax.Array, jax.Array]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_step(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> Step:
    """Compiles `(state, batch) -> (state, metrics)`, which donates its input state.

    The step's random key is fold_in(key(seed), step), so that it depends on nothing that came before. Beside
    the method's own metrics come `loss`, `grad_norm` (before clipping), `param_norm` (of all variables after
    the update: not finite as soon as any of them is not) and `learning_rate`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            # Frozen parameters are constants, so that no gradient is computed for them at all.
            params = jax.tree.map(
                lambda p, moves: p if moves else jax.lax.stop_gradient(p), params, optimizer.trainable
            )
            return method.loss({"params": params, **state.model_state}, batch, rng)

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # Short at first, so that it soon forgets where the run began.
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
            "loss": (loss, one),
            **aux.metrics,
            "grad_norm": (optax.global_norm(grads), one),
            "param_norm": (optax.global_norm(_floats(new.variables)), one),
            "learning_rate": (optimizer.schedule(state.step), one),
        }
        return new, metrics

    # XLA's default runs independent operations at the same time, and each of them on all cores of a CPU: with one
    # operation after another, a step of `scenes` takes three quarters of the time.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return jax.jit(
        step,
        donate_argnums=0,
        # Stated on the way out: left to the compiler, the state could come back spread differently.
        out_shardings=(shardings, None),
        compiler_options=options if on_cpu(shardings.step.mesh) else None,
    )


def _floats(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
