"""Tracing of the blocks of a tower once, since they are alike: a large part of the start of a command is tracing."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from ovseg_jax.models.transformer import Block

Function = TypeVar("Function", bound=Callable[..., Any])


def traced_once(function: Function) -> Function:
    """Returns `function`, whose program then calls one function for all blocks of its Flax modules that are alike.

    Only for inference: blocks that draw random numbers or change variables are left as they are. The compiler inlines
    the calls, so that the results are the same.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        known: dict[Any, Callable[..., Any]] = {}
        with nn.intercept_methods(functools.partial(_call, known)):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def init_shapes(module: nn.Module, *args: Any) -> tuple[Any, Any]:
    """Returns the shapes of a module's output and of its variables, without drawing any."""
    known: dict[Any, Any] = {}
    with nn.intercept_methods(functools.partial(_init, known)):
        return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *args))


def _call(
    known: dict[Any, Callable[..., Any]],
    next_function: Callable,
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    block: Any = context.module
    if not _is_block(context) or kwargs:
        return next_function(*args, **kwargs)
    if block.is_initializing() or block.drop_rate or block.variables.keys() != {"params"}:
        return next_function(*args, **kwargs)
    alone = block.clone(parent=None, name=None)
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


def _init(
    known: dict[Any, Any],
    next_function: Callable,
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    block: Any = context.module
    if not _is_block(context) or kwargs:
        return next_function(*args, **kwargs)
    alone = block.clone(parent=None, name=None)
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


def _is_block(context: nn.module.InterceptorContext) -> bool:
    """Tells whether this is a call of a block in a tower; the one that is traced for all has no path."""
    return type(context.module) is Block and context.method_name == "__call__" and bool(context.module.path)
