"""FLOP counts of a traced program, before it is compiled."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


def count_flops(jaxpr: Any, devices: int) -> float:
    """Counts the FLOPs of a program's matrix products and convolutions, over all devices together.

    A `scan` counts once for each iteration, a `while`, whose length is unknown, once, and a `cond` by its cheapest
    branch, so that the count is a lower bound (the other branch in `towers.prompt` hardly ever runs).
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner
        elif name == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, params["dimension_numbers"]
            inner = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
            # A good kernel skips the zeros that dilation inserts between the inputs.
            holes = math.prod(params["lhs_dilation"])
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * inner / holes / params["batch_group_count"]
        else:
            inside = [count_flops(sub, devices) for sub in _subprograms(params)]
            if name == "cond":
                total += min(inside, default=0.0)
            else:
                times = params["length"] if name == "scan" else devices if name == "shard_map" else 1
                total += times * sum(inside)
    return total


def _subprograms(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner
