"""Everything that a training step changes, and how it is spread over the mesh."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.parallel.sharding import DEFAULT_RULES, AnyMesh, leaf_sharding, on_cpu, replicated, tree_paths
from ovseg_jax.protocols import Trainable, Variables
from ovseg_jax.train.optimizer import Optimizer


@flax.struct.dataclass
class TrainState:
    """The whole state of a run, apart from the position in the data.

    The same structure also holds a state's shapes (`abstract_state`) and its shardings (`state_shardings`).

    Attributes:
      step: steps done, int32.
      params: what the gradient moves.
      model_state: the other collections, such as `batch_stats`: {collection: tree}.
      opt_state: optax's state.
      average: the parameters' moving average, None where `optimizer.ema` is 0.
    """

    step: Any
    params: Any
    model_state: dict[str, Any]
    opt_state: Any
    average: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What a method takes: the parameters and the other collections in one dict."""
        return {"params": self.params, **self.model_state}

    @property
    def averaged(self) -> dict[str, Any]:
        """The variables with averaged parameters, where they are averaged: what is evaluated."""
        return self.variables if self.average is None else {**self.variables, "params": self.average}


def abstract_variables(method: Trainable, seed: int) -> Variables:
    """Shapes and dtypes of a method's variables, without computing them."""
    return jax.eval_shape(method.init, jax.random.key(seed))


def state_shardings(
    optimizer: Optimizer, variables: Variables, mesh: AnyMesh, rules: Iterable[Sequence[str]] = DEFAULT_RULES
) -> TrainState:
    """A TrainState of shardings. What the optimiser keeps for a parameter follows that parameter's rule."""
    rules = tuple(tuple(rule) for rule in rules)

    def place(leaf: Any, path: str) -> Any:
        return leaf_sharding(path, leaf.shape, mesh, rules)

    params = variables["params"]
    paths = tree_paths(params)
    known = set(jax.tree.leaves(paths))

    def place_kept(leaf: Any, path: str) -> Any:
        # Adam's mean of `head/kernel` is at `1/mu/head/kernel`: find the longest ending that is a parameter.
        parts = path.split("/")
        endings = ("/".join(parts[i:]) for i in range(len(parts)))
        owner = next((ending for ending in endings if ending in known), None)
        return replicated(mesh) if owner is None else place(leaf, owner)

    kept = jax.eval_shape(optimizer.transform.init, params)
    model_state = {name: tree for name, tree in variables.items() if name != "params"}
    placed = jax.tree.map(place, params, paths)
    return TrainState(
        step=replicated(mesh),
        params=placed,
        model_state=jax.tree.map(place, model_state, tree_paths(model_state)),
        opt_state=jax.tree.map(place_kept, kept, tree_paths(kept)),
        average=placed if optimizer.ema else None,
    )


def create_state(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> TrainState:
    """The state before the first step, each device computing only the shards that it keeps."""
    # Runs once: a CPU would spend more time and memory on optimising this program than on running it.
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    return jax.jit(
        lambda: _create(method, optimizer, seed),
        out_shardings=shardings,
        compiler_options=options if on_cpu(shardings.step.mesh) else None,
    )()


def start_from(state: TrainState, parts: Mapping[str, Any]) -> TrainState:
    """The state with published weights in place of what was drawn.

    Args:
      state: as `create_state` makes it.
      parts: NumPy arrays in a tree like the variables, with only those leaves that are replaced. Every process has
        all of them, each device is given its shard.
    """
    if not parts:
        return state
    variables = replaced(state.variables, parts)
    average = None if state.average is None else replaced(state.averaged, parts)["params"]
    return dataclasses.replace(state, params=variables.pop("params"), model_state=variables, average=average)


def replaced(variables: Variables, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with `parts` in the places of their leaves, see `start_from`; each stays where it was."""
    flat = flax.traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)
    for path, array in flax.traverse_util.flatten_dict(dict(parts)).items():
        before = flat[path]
        whole = np.asarray(array, before.dtype)
        if whole.shape != before.shape:
            raise ValueError(f"{'/'.join(path)} is {whole.shape}, not {before.shape}")
        flat[path] = jax.make_array_from_callback(whole.shape, before.sharding, whole.__getitem__)
    return flax.traverse_util.unflatten_dict(flat)


def abstract_state(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, without computing it: what a checkpoint is restored onto."""
    shapes = jax.eval_shape(lambda: _create(method, optimizer, seed))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _create(method: Trainable, optimizer: Optimizer, seed: int) -> TrainState:
    # A value of weak type would come back from the first step without it, and the step be compiled again.
    variables = dict(jax.tree.map(lambda x: jnp.asarray(x, x.dtype), method.init(jax.random.key(seed))))
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, params) if optimizer.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.transform.init(params), average)
