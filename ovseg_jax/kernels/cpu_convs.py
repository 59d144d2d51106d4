"""Convolutions in the forms that are fastest on a CPU, for inference and frozen towers.

On CPU, XLA computes convolutions by a general routine. Three kinds are faster as sums and matrix products, which XLA
compiles well: depthwise ones (13 to 49 times as fast), large 3x3 ones by Winograd's F(4x4, 3x3) (Lavin and Gray 2016;
twice as fast, with a quarter of the multiplications and errors of 2e-5 of the largest value), and most 1x1.
GPUs and TPUs have fast convolutions, and float16 is too imprecise for Winograd's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Function = TypeVar("Function", bound=Callable[..., Any])
Pads = Sequence[tuple[int, int]]

# With fewer channels the transforms cost more than they save.
WINOGRAD_CHANNELS = 64
# Below 1e8 multiplications it is slower than XLA's own; below this many it saves a few milliseconds each time, but
# takes 1.5 seconds to compile.
WINOGRAD_PRODUCTS = 5e8

# The transforms of input, kernel and output (Lavin and Gray, 4.2).
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = np.array(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32
) / np.float32(24)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


def fast_on_cpu(function: Function) -> Function:
    """Returns `function` with the convolutions of its Flax modules computed as above, if it is called for CPUs.

    Not for functions that are differentiated: the gradient would keep every transformed tile in memory.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _for_cpu():
            return function(*args, **kwargs)
        with nn.intercept_methods(_replace):
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def _for_cpu() -> bool:
    """Tells whether programs are for CPUs: those of the mesh, which the planner sets to others, else JAX's own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    return mesh.abstract_device is not None and mesh.abstract_device.device_kind == "cpu"


def _replace(next_function: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    conv: Any = context.module
    if (
        type(conv) is not nn.Conv
        or context.method_name != "__call__"
        or not conv.has_variable("params", "kernel")
    ):
        return next_function(*args, **kwargs)
    x: jax.Array = args[0]
    kernel: Any = conv.get_variable("params", "kernel")
    plain = conv.input_dilation in (1, None) and conv.kernel_dilation in (1, None) and conv.mask is None
    strides = np.broadcast_to(conv.strides or 1, 2)
    known = (isinstance(conv.padding, str) and conv.padding in ("SAME", "VALID")) or isinstance(
        conv.padding, int
    )
    exact = x.dtype == kernel.dtype == jnp.float32 and conv.dtype in (None, jnp.float32)
    if not (plain and known and exact and x.ndim == kernel.ndim == 4 and strides[0] == strides[1]):
        return next_function(*args, **kwargs)
    stride, size = int(strides[0]), kernel.shape[:2]
    if isinstance(conv.padding, int):
        pads = [(conv.padding,) * 2] * 2
    else:
        pads = jax.lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), str(conv.padding))
    if kernel.shape[2] == 1 and conv.feature_group_count == x.shape[3] == kernel.shape[3]:
        y = depthwise(x, kernel, stride, pads)
    elif conv.feature_group_count > 1:
        return next_function(*args, **kwargs)
    elif size == (1, 1) and not np.any(pads):
        y = x[:, ::stride, ::stride] @ kernel[0, 0]
    elif size == (3, 3) and stride == 1 and _large(x, kernel):
        y = winograd(x, kernel, pads)
    else:
        return next_function(*args, **kwargs)
    return y + conv.get_variable("params", "bias") if conv.use_bias else y


def _large(x: jax.Array, kernel: jax.Array) -> bool:
    """Tells whether Winograd's form pays for a 3x3 convolution."""
    products = x[..., 0].size * kernel.size
    return min(kernel.shape[2:]) >= WINOGRAD_CHANNELS and products >= WINOGRAD_PRODUCTS


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], stride: int, pads: Pads
) -> Float[Array, "b r s c"]:
    """Convolves each channel by itself, as a sum of shifted images that compiles to one pass over memory."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    ends = (rows - 1) * stride + 1, (columns - 1) * stride + 1
    return sum(
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )  # type: ignore[return-value]


def winograd(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], pads: Pads
) -> Float[Array, "b r s d"]:
    """Convolves 3x3 with stride 1: each 4x4 block of results takes 36 products instead of 144."""
    b, c, d = x.shape[0], *kernel.shape[2:]
    height, width = (n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))
    rows, columns = -(-height // 4), -(-width // 4)
    fill = ((pads[0][0], pads[0][1] + 4 * rows - height), (pads[1][0], pads[1][1] + 4 * columns - width))
    x = jnp.pad(x, ((0, 0), *fill, (0, 0)))
    kernels = (np.kron(_KERNEL, _KERNEL) @ kernel.reshape(9, -1)).reshape(36, c, d)

    down = _mix(_INPUT, [x[:, i : i + 4 * rows - 3 : 4] for i in range(6)])
    tiles = [
        tile
        for part in down
        for tile in _mix(_INPUT, [part[:, :, j : j + 4 * columns - 3 : 4] for j in range(6)])
    ]
    # Without this XLA would recompute the tiles in each product.
    tiles = jax.lax.optimization_barrier(tiles)
    products = [
        (tile.reshape(-1, c) @ u).reshape(b, rows, columns, d) for tile, u in zip(tiles, kernels, strict=True)
    ]
    up = [_mix(_OUTPUT, products[j::6]) for j in range(6)]
    lines = [jnp.stack(_mix(_OUTPUT, [part[i] for part in up]), 3) for i in range(4)]
    y = jnp.stack(lines, 2).reshape(b, 4 * rows, 4 * columns, d)
    return y[:, :height, :width]


def _mix(matrix: Sequence[Sequence[int]], parts: Sequence[Array]) -> list[Array]:
    """Returns each row's weighted sum of the parts, without products by 0 and 1."""
    return [
        functools.reduce(jnp.add, [p if f == 1 else f * p for f, p in zip(row, parts, strict=True) if f])
        for row in matrix
    ]
