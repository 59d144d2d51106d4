"""Counting the FLOPs of a program before anything compiles it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any


def count_flops(jaxpr: Any, devices: int) -> float:
    """FLOPs of the matrix products and convolutions of a program, of all devices together.

    A `scan` counts as often as it runs, a `while` of unknown length once, of a `cond` the cheapest branch: what a step
    takes at least (in `towers.prompt` the other one hardly ever runs).
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
            # Zeros that dilation puts between inputs are not multiplied by a good kernel.
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
