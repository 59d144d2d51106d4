"""The training state and its sharding over the mesh."""

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


def create_state(
    method: Trainable,
    optimizer: Optimizer,
    seed: int,
    shardings: TrainState,
    given: Mapping[str, Any] | None = None,
) -> TrainState:
    """Creates the state before the first step; each device computes only the shards that it keeps.

    Args:
      method: draws the initial values.
      optimizer: creates its state for them.
      seed: the seed of the initial values.
      shardings: see `state_shardings`.
      given: NumPy arrays in a tree like the variables, with only the leaves to take in place of initial values, such as
        published weights. Every process has all of them, and each device gets its shard.

    Raises:
      ValueError: an array of `given` has another shape than its variable.
    """
    create = lambda given: _create(method, optimizer, seed, given)
    return _compiled_once(create, shardings)(_placed(method, seed, shardings.variables, given or {}))


def create_variables(
    method: Trainable, seed: int, shardings: Variables, given: Mapping[str, Any] | None = None
) -> Variables:
    """Creates only the variables of `create_state`; for arguments and errors see there."""
    create = lambda given: _initial(method, seed, given)
    return _compiled_once(create, shardings)(_placed(method, seed, shardings, given or {}))


def _compiled_once(create: Any, shardings: Any) -> Any:
    mesh = jax.tree.leaves(shardings)[0].mesh
    # The program runs once: on a CPU, optimising it would take more time and memory than running it.
    options = {"xla_backend_optimization_level": 0} if on_cpu(mesh) else None
    return jax.jit(create, out_shardings=shardings, donate_argnums=0, compiler_options=options)


def _placed(method: Trainable, seed: int, shardings: Variables, given: Mapping[str, Any]) -> dict[Any, Any]:
    """Returns {path: array} of the given leaves on their devices."""
    if not given:  # to trace the initialisation once more may take seconds
        return {}
    shapes, places = map(flax.traverse_util.flatten_dict, (abstract_variables(method, seed), shardings))
    placed = {}
    for path, array in flax.traverse_util.flatten_dict(dict(given)).items():
        whole = np.asarray(array, shapes[path].dtype)
        if whole.shape != shapes[path].shape:
            raise ValueError(f"{'/'.join(path)} has the shape {whole.shape}, not {shapes[path].shape}")
        placed[path] = jax.make_array_from_callback(whole.shape, places[path], whole.__getitem__)
    return placed


def abstract_state(method: Trainable, optimizer: Optimizer, seed: int, shardings: TrainState) -> TrainState:
    """Returns the shapes, dtypes and shardings of a state without computing it, as a target for restoring."""
    shapes = jax.eval_shape(lambda: _create(method, optimizer, seed, {}))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _create(method: Trainable, optimizer: Optimizer, seed: int, given: Mapping[Any, Any]) -> TrainState:
    variables = _initial(method, seed, given)
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, params) if optimizer.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.transform.init(params), average)


def _initial(method: Trainable, seed: int, given: Mapping[Any, Any]) -> dict[str, Any]:
    # Without weak types, which the first step would return as strong ones, so that the step would compile twice.
    variables = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), dict(method.init(jax.random.key(seed))))
    # XLA leaves out what is drawn for the leaves that are given.
    flat = flax.traverse_util.flatten_dict(variables, keep_empty_nodes=True) | dict(given)
    return flax.traverse_util.unflatten_dict(flat)
