"""One trace for all equal blocks of a tower, since tracing is a large part of the start of a command."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ovseg_jax.models.transformer import Block

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_once(function: Function) -> Function:
    """Returns `function` with equal blocks of its Flax modules traced once.

    Only for inference: blocks that draw random numbers or change variables are traced as usual. The compiler inlines
    the calls, so that the results are the same.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _blocks(_call):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def init_shapes(module: nn.Module, *args: Any) -> tuple[Any, Any]:
    """Returns the shapes of a module's output and of its variables, without drawing any."""
    with _blocks(_init):
        return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *args))


def _blocks(replace: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Replaces the calls of blocks by `replace(known, block, alone, args)`, except where it returns None.

    `known` is a dict for its results, and `alone` a copy of the block without name and parent, so that equal blocks
    compare equal.
    """
    known: dict[Any, Any] = {}

    def intercept(
        plain: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        block: Any = context.module
        # The one that is traced for all has no path.
        inside = type(block) is Block and context.method_name == "__call__" and block.path and not kwargs
        found = replace(known, block, block.clone(parent=None, name=None), args) if inside else None
        return plain(*args, **kwargs) if found is None else found

    return nn.intercept_methods(intercept)


def _call(known: dict[Any, Any], block: Any, alone: Any, args: Any) -> Any:
    if block.is_initializing() or block.drop_rate or block.variables.keys() != {"params"}:
        return None
    leaves, structure = jax.tree.flatten(args)
    # Numbers, such as that of the class tokens, are part of the program.
    fixed = tuple(None if isinstance(x, jax.Array) else x for x in leaves)
    key = alone, structure, fixed
    if key not in known:

        @jax.jit
        def apply(params: Any, arrays: list[jax.Array]) -> Any:
            given = iter(arrays)
            whole = [next(given) if x is None else x for x in fixed]
            return alone.apply({"params": params}, *jax.tree.unflatten(structure, whole))

        known[key] = apply
    return known[key](block.variables["params"], [x for x in leaves if isinstance(x, jax.Array)])


def _init(known: dict[Any, Any], block: Any, alone: Any, args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    key = alone, structure, tuple((x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
    if key not in known:
        rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        known[key] = jax.eval_shape(lambda: alone.init_with_output(rngs, *args))
    out, variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), known[key])
    for collection, tree in variables.items():
        for name, value in tree.items():
            block.put_variable(collection, name, value)
    return out
