"""Convolutions in the forms that are fastest on a CPU.

On CPU, XLA computes convolutions by a general routine. Three kinds are faster as sums and matrix products, which XLA
compiles well: depthwise ones (13 to 49 times as fast), large 3x3 ones by Winograd's F(4x4, 3x3) (Lavin and Gray 2016;
twice as fast, with a quarter of the multiplications and errors of 4e-6 of the largest value), and most 1x1.
Training uses Winograd's form, in values and gradients, and for large linear layers and 1x1 convolutions `product`,
whose gradient needs no transposition.
`cpu_attention` asks here whether a program is for CPUs.
GPUs and TPUs have fast convolutions, and float16 is too imprecise for Winograd's form.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ovseg_jax.parallel.sharding import active_batch_axes

Function = TypeVar("Function", bound=Callable[..., Any])
Tree = TypeVar("Tree")
Pads = Sequence[tuple[int, int]]

# With fewer channels the transforms cost more than they save.
WINOGRAD_CHANNELS = 64
# Below 1e8 multiplications it is slower than XLA's own; below this many it saves a few milliseconds each time, but
# takes a second to compile, and three with its gradients.
WINOGRAD_PRODUCTS = 5e8

# In training, smaller kernels stay with JAX's own products; below this size they gain nothing.
PRODUCT_SIZE = 1 << 14

_CPU_FORM = contextvars.ContextVar("cpu_form", default="")

# The sixth is infinity. With 0, ±1 and ±2 (Lavin and Gray, 4.2) rounding errors are four times as large.
_POINTS = (0, 0.75, -0.75, 1.5, -1.5)


def _transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns Toom and Cook's matrices of input [6 6], kernel [6 3] and output [4 6] (Lavin and Gray, 4)."""
    others = [[p for p in _POINTS if p != point] for point in _POINTS]
    inputs = [[*np.poly(rest)[::-1], 0] for rest in others] + [np.poly(_POINTS)[::-1]]
    scale = [np.prod(np.subtract(point, rest)) for point, rest in zip(_POINTS, others, strict=True)]
    powers = np.vander(_POINTS, 4, increasing=True)
    kernel = np.vstack([powers[:, :3] / np.array(scale)[:, None], [0, 0, 1]])
    return np.array(inputs), kernel, np.vstack([powers, [0, 0, 0, 1]]).T


_INPUT, _KERNEL, _OUTPUT = _transforms()
_KERNELS = np.kron(_KERNEL, _KERNEL).astype(np.float32)


def fast_on_cpu(function: Function) -> Function:
    """Returns `function` with the convolutions of its Flax modules computed as above, if it is called for CPUs.

    Not for functions that are differentiated, see `fast_in_training`: the gradient of a depthwise convolution would
    keep every shifted image in memory.
    """
    return _intercepted(function, _replace, "inference")


def fast_in_training(function: Function) -> Function:
    """Returns `function` with large 3x3 and 1x1 convolutions and linear layers as above, if it is called for CPUs."""
    return _intercepted(function, _replace_large, "training")


def _intercepted(function: Function, replace: Callable, form: str) -> Function:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not _for_cpu():
            return function(*args, **kwargs)
        token = _CPU_FORM.set(form)
        try:
            with nn.intercept_methods(replace):
                return function(*args, **kwargs)
        finally:
            _CPU_FORM.reset(token)

    return run  # type: ignore[return-value]


def cpu_form() -> str:
    """Returns "inference" in a function of `fast_on_cpu`, "training" in one of `fast_in_training`, if for CPUs."""
    return _CPU_FORM.get()


def one_by_one(function: Callable[..., Tree], *rows: Any) -> Tree:
    """Computes function(*rows) in inference on a CPU image by image, so that a layer's results stay in the cache.

    Args:
      function: a function of which each image's results depend on this image alone.
      *rows: arrays with a row for each image, or None.
    """
    # Of several devices, each would go through the images of all.
    if cpu_form() != "inference" or jax.device_count() > 1 or len(rows[0]) == 1:
        return function(*rows)

    def one(row: Any) -> Any:
        return jax.tree.map(lambda x: x[0], function(*jax.tree.map(lambda x: x[None], row)))

    return jax.lax.map(one, rows)


def _for_cpu() -> bool:
    """Tells whether programs are for CPUs: those of the mesh, which the planner sets to others, else JAX's own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend() == "cpu"
    return mesh.abstract_device is not None and mesh.abstract_device.device_kind == "cpu"


def _replace_large(
    next_function: Callable, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    layer: Any = context.module
    if type(layer) not in (nn.Dense, nn.DenseGeneral) or context.method_name != "__call__":
        return _replace(next_function, args, kwargs, context, large_only=True)
    x, kernel = args[0], layer.get_variable("params", "kernel")
    if kernel is None or kernel.size < PRODUCT_SIZE or not x.dtype == kernel.dtype == jnp.float32:
        return next_function(*args, **kwargs)
    axes = np.atleast_1d(getattr(layer, "axis", -1)) % x.ndim
    last = range(x.ndim - len(axes), x.ndim)
    plain = np.size(getattr(layer, "batch_dims", ())) == 0 and [*axes] == [*last]
    if not plain or layer.dtype not in (None, jnp.float32):
        return next_function(*args, **kwargs)
    kept, ends = x.shape[: last.start], kernel.shape[len(axes) :]
    y = product(x.reshape(*kept, -1), kernel.reshape(-1, math.prod(ends))).reshape(*kept, *ends)
    return y + layer.get_variable("params", "bias") if layer.use_bias else y


def _replace(
    next_function: Callable,
    args: Any,
    kwargs: Any,
    context: nn.module.InterceptorContext,
    large_only: bool = False,
) -> Any:
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
        pads: Pads = ((conv.padding,) * 2,) * 2
    else:
        pads = tuple(jax.lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), str(conv.padding)))
    if size == (3, 3) and stride == conv.feature_group_count == 1 and _large(x, kernel):
        y = winograd(x, kernel, pads)
    elif large_only and (size != (1, 1) or kernel.size < PRODUCT_SIZE):
        return next_function(*args, **kwargs)
    elif kernel.shape[2] == 1 and conv.feature_group_count == x.shape[3] == kernel.shape[3]:
        y = depthwise(x, kernel, stride, pads)
    elif conv.feature_group_count == 1 and size == (1, 1) and not np.any(pads):
        y = product(x[:, ::stride, ::stride], kernel[0, 0])
    else:
        return next_function(*args, **kwargs)
    return y + conv.get_variable("params", "bias") if conv.use_bias else y


def _large(x: jax.Array, kernel: jax.Array) -> bool:
    """Tells whether Winograd's form pays for a 3x3 convolution."""
    products = x[..., 0].size * kernel.size
    return min(kernel.shape[2:]) >= WINOGRAD_CHANNELS and products >= WINOGRAD_PRODUCTS


@jax.custom_vjp
def product(x: Float[Array, "*b c"], kernel: Float[Array, "c d"]) -> Float[Array, "*b d"]:
    """Computes x W. JAX's own gradient of W is the transpose of a product, which several devices sum and then copy."""
    return x @ kernel


def _product_backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = (tuple(range(x.ndim - 1)),) * 2
    # XLA transposes the left side of such a product, by a slow copy.
    turned = x.size > dy.size + kernel.size
    return dy @ kernel.T, jnp.tensordot(dy, x, rows).T if turned else jnp.tensordot(x, dy, rows)


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


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


def _winograd(
    x: Float[Array, "b h w c"], kernels: Float[Array, "36 _c _d"], pads: Pads, product: str
) -> Float[Array, "b r s d"]:
    height, width = (n + sum(pad) - 2 for n, pad in zip(x.shape[1:3], pads, strict=True))
    y = jnp.einsum(product, _tiles(x, pads), kernels)
    rows, columns = -(-height // 4), -(-width // 4)
    y = y.reshape(6, 6, x.shape[0], rows, columns, -1)
    y = jax.lax.optimization_barrier(jnp.stack(_mix(_OUTPUT, list(y)), 3))  # [6 b rows 4 columns d]
    y = jnp.stack(_mix(_OUTPUT, list(y)), 4)
    return y.reshape(x.shape[0], 4 * rows, 4 * columns, -1)[:, :height, :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], pads: Pads
) -> Float[Array, "b r s d"]:
    """Convolves 3x3 with stride 1: each 4x4 block of results takes 36 products instead of 144.

    So do both gradients. The backward pass transforms x again, since the tiles take 2.25 times its memory.
    """
    kernels = jnp.dot(_KERNELS, kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])
    return _winograd(x, kernels, pads, "gnc,gcd->gnd")


def _winograd_forward(x: Array, kernel: Array, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return winograd(x, kernel, pads), (x, kernel)


def _winograd_backward(pads: Pads, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    back = [(2 - before, 2 - after) for before, after in pads]
    turned = jnp.dot(_KERNELS[:, ::-1], kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])
    dx = _winograd(dy, turned, back, "gnd,gcd->gnc")

    def for_kernel(x: Array, dy: Array, axes: tuple[str, ...] = ()) -> Array:
        ends = [(0, -n % 4) for n in dy.shape[1:3]]
        sums = jnp.einsum("gnc,gnd->gcd", _tiles(x, pads), _spread(_OUTPUT.T, dy, ends))
        sums = jax.lax.optimization_barrier(sums).reshape(36, -1)
        return jax.lax.psum((_KERNELS.T @ sums).reshape(kernel.shape), axes)

    axes = active_batch_axes()
    if axes and x.shape[0] % jax.sharding.get_abstract_mesh().size == 0:
        # Left to itself, the compiler would add up the 36 sums of all devices in place of the 9 of the kernel.
        share = PartitionSpec(axes)
        for_kernel = jax.shard_map(
            functools.partial(for_kernel, axes=axes),
            in_specs=(share, share),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    return dx, for_kernel(x, dy)


winograd.defvjp(_winograd_forward, _winograd_backward)


def _tiles(x: Float[Array, "b h w c"], pads: Pads) -> Float[Array, "36 n c"]:
    """Transforms the 6x6 pixels below each 4x4 block of results."""
    filled = [
        (before, after + -(n + before + after - 2) % 4)
        for n, (before, after) in zip(x.shape[1:3], pads, strict=True)
    ]
    return _spread(_INPUT, x, filled)


def _spread(matrix: np.ndarray, x: Float[Array, "b h w c"], pads: Pads) -> Float[Array, "36 n c"]:
    """Transforms rows, then columns, of the blocks that begin at every fourth pixel."""
    size = matrix.shape[1]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
    for axis in (1, 3):
        end = x.shape[axis] - size + 1
        parts = [jax.lax.slice_in_dim(x, i, i + end, 4, axis) for i in range(size)]
        # Without this XLA would transform again for each product.
        x = jax.lax.optimization_barrier(jnp.stack(_mix(matrix, parts), axis // 2))
    return x.reshape(36, -1, x.shape[-1])


def _mix(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    """Returns each row's weighted sum of the parts, without products by 0 and 1."""
    return [
        functools.reduce(
            jnp.add, [p if f == 1 else float(f) * p for f, p in zip(row, parts, strict=True) if f]
        )
        for row in matrix
    ]
