"""Tracing of the blocks of a tower once, since they are alike: a large part of the start of a command is tracing."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax

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


def _call(
    known: dict[Any, Callable[..., Any]],
    next_function: Callable,
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
) -> Any:
    block: Any = context.module
    # A block without a path is the one that is traced for all.
    if type(block) is not Block or context.method_name != "__call__" or not block.path or kwargs:
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
