"""The training state and its sharding over the mesh."""

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
    """The whole state of a run, except for the position in the data.

    The same structure also holds a state's shapes (`abstract_state`) and its shardings (`state_shardings`).

    Attributes:
      step: the number of steps done, int32.
      params: the parameters.
      model_state: the other collections, such as `batch_stats`: {collection: tree}.
      opt_state: optax's state.
      average: the parameters' moving average; None if `optimizer.ema` is 0.
    """

    step: Any
    params: Any
    model_state: dict[str, Any]
    opt_state: Any
    average: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The parameters and the other collections in one dict, as methods take them."""
        return {"params": self.params, **self.model_state}

    @property
    def averaged(self) -> dict[str, Any]:
        """The variables for evaluation: with averaged parameters, if the run keeps them."""
        return self.variables if self.average is None else {**self.variables, "params": self.average}


def abstract_variables(method: Trainable, seed: int) -> Variables:
    """Returns the shapes and dtypes of a method's variables without computing them."""
    return jax.eval_shape(method.init, jax.random.key(seed))


def state_shardings(
    optimizer: Optimizer, variables: Variables, mesh: AnyMesh, rules: Iterable[Sequence[str]] = DEFAULT_RULES
) -> TrainState:
    """Returns a TrainState of shardings; the optimiser's state is sharded like its parameters."""
    rules = tuple(tuple(rule) for rule in rules)

    def place(leaf: Any, path: str) -> Any:
        return leaf_sharding(path, leaf.shape, mesh, rules)

    params = variables["params"]
    paths = tree_paths(params)
    known = set(jax.tree.leaves(paths))

    def place_kept(leaf: Any, path: str) -> Any:
        # Adam's mean of `head/kernel` is at `1/mu/head/kernel`: the longest suffix that is a parameter's path decides.
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
    """Creates the state before the first step; each device computes only the shards that it keeps."""
    # The program runs once: on a CPU, optimising it would take more time and memory than running it.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(
        lambda: _create(method, optimizer, seed),
        out_shardings=shardings,
        compiler_options=options if on_cpu(shardings.step.mesh) else None,
    )()


def start_from(state: TrainState, parts: Mapping[str, Any]) -> TrainState:
    """Replaces initial values of a state by published weights.

    Args:
      state: the state that `create_state` returns.
      parts: NumPy arrays in a tree like the variables, with only the leaves to replace. Every process has all of them,
        and each device gets its shard.
    """
    if not parts:
        return state
    variables = replaced(state.variables, parts)
    average = None if state.average is None else replaced(state.averaged, parts)["params"]
    return dataclasses.replace(state, params=variables.pop("params"), model_state=variables, average=average)


def replaced(variables: Variables, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables with leaves replaced by those of `parts`, see `start_from`; shardings stay."""
    flat = flax.traverse_util.flatten_dict(dict(variables), keep_empty_nodes=True)
    for path, array in flax.traverse_util.flatten_dict(dict(parts)).items():
        before = flat[path]
        whole = np.asarray(array, before.dtype)
        if whole.shape != before.shape:
            raise ValueError(f"{'/'.join(path)} has the shape {whole.shape}, not {before.shape}")
        flat[path] = jax.make_array_from_callback(whole.shape, before.sharding, whole.__getitem__)
    return flax.traverse_util.unflatten_dict(flat)


def abstract_state(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> TrainState:
    """Returns the shapes, dtypes and shardings of a state without computing it, as a target for restoring."""
    shapes = jax.eval_shape(lambda: _create(method, optimizer, seed))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _create(method: Trainable, optimizer: Optimizer, seed: int) -> TrainState:
    # The first step would return values of weak type with a strong one, and the step would be compiled again.
    variables = dict(jax.tree.map(lambda x: jnp.asarray(x, x.dtype), method.init(jax.random.key(seed))))
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, params) if optimizer.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.transform.init(params), average)
