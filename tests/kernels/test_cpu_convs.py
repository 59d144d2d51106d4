"""Convolutions for a CPU beside XLA's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.kernels import cpu_convs
from ovseg_jax.kernels.cpu_convs import fast_in_training, fast_on_cpu
from ovseg_jax.parallel.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)


def run(conv, shape):
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    variables = conv.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: v + 0.1 * jnp.asarray(RNG.normal(size=v.shape), v.dtype), variables)
    with jax.default_matmul_precision("float32"):
        return conv.apply(variables, x), fast_on_cpu(conv.apply)(variables, x)


@pytest.mark.parametrize("shape", [(2, 16, 20, 64), (1, 17, 23, 64), (1, 3, 1, 70)])
@pytest.mark.parametrize("padding", ["SAME", 1, "VALID"])
def test_winograd(shape, padding, monkeypatch):
    if padding == "VALID" and min(shape[1:3]) < 3:
        pytest.skip("nothing is left of it")
    monkeypatch.setattr(cpu_convs, "WINOGRAD_PRODUCTS", 0)
    calls = spy(monkeypatch, "winograd")
    expected, found = run(nn.Conv(66, (3, 3), padding=padding), shape)
    assert calls == [shape] and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "shape, padding, devices",
    [
        ((1, 17, 23, 64), "SAME", 1),
        ((3, 8, 5, 96), "VALID", 1),
        ((1, 6, 7, 70), 2, 1),
        ((1, 4, 5, 64), 3, 1),
        ((8, 9, 6, 64), "SAME", 8),
        ((3, 9, 6, 64), "SAME", 8),
    ],
)
def test_winograd_gradients(shape, padding, devices, monkeypatch):
    """Values and the gradients of pixels, kernel and bias beside sums in float64."""
    monkeypatch.setattr(cpu_convs, "WINOGRAD_PRODUCTS", 0)
    calls = spy(monkeypatch, "winograd")
    conv, pad = nn.Conv(66, (3, 3), padding=padding), {"SAME": 1, "VALID": 0}.get(padding, padding)
    x, kernel, bias = (RNG.normal(size=s) for s in (shape, (3, 3, shape[3], 66), (66,)))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # [b r s c 3 3]
    expected = np.einsum("brscij,ijcd->brsd", windows, kernel, optimize=True) + bias
    dy = RNG.normal(size=expected.shape)
    dx = np.zeros(padded.shape)
    for i in range(3):
        for j in range(3):
            dx[:, i : i + dy.shape[1], j : j + dy.shape[2]] += dy @ kernel[i, j].T
    dx = dx[:, pad : pad + shape[1], pad : pad + shape[2]]
    dk = np.einsum("brscij,brsd->ijcd", windows, dy, optimize=True)

    mesh = make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        x, kernel, bias, dy = (jnp.asarray(a, jnp.float32) for a in (x, kernel, bias, dy))
        if shape[0] % devices == 0:
            x = jax.device_put(x, batch_sharding(mesh))
        apply = fast_in_training(lambda x, k, b: conv.apply({"params": {"kernel": k, "bias": b}}, x))
        found = with_gradients(apply)(dy, x, kernel, bias)
    assert set(calls) == {shape}
    for one, other in zip(found, (expected, dx, dk, dy.sum((0, 1, 2))), strict=True):
        assert one.shape == other.shape and np.abs(one - other).max() < 5e-6 * np.abs(other).max()


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Dense(160), (8, 3, 128)),
        (nn.Dense(96, use_bias=False), (8, 40, 400)),
        (nn.DenseGeneral((4, 40)), (8, 5, 128)),
        (nn.DenseGeneral(160, axis=(-2, -1)), (8, 5, 4, 32)),
        (nn.Conv(160, (1, 1)), (8, 3, 2, 128)),
        (nn.Conv(160, (1, 1), 2), (8, 3, 5, 128)),
    ],
)
def test_products_in_training(layer, shape, monkeypatch):
    """Values and gradients as without, on one device and on eight."""
    calls = spy(monkeypatch, "product")
    x = jnp.asarray(RNG.normal(size=shape), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    dy = jnp.asarray(RNG.normal(size=layer.apply(variables, x).shape), jnp.float32)
    expected = with_gradients(layer.apply)(dy, variables, x)
    mesh = make_mesh()
    for rows in (x, jax.device_put(x, batch_sharding(mesh))):
        with jax.set_mesh(mesh):
            found = with_gradients(fast_in_training(layer.apply))(dy, variables, rows)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.shape == other.shape and np.abs(one - other).max() < 2e-6 * np.abs(other).max()
    assert calls


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(127),
        nn.Dense(128, dtype=jnp.bfloat16),
        nn.DenseGeneral(160, axis=-2),
        nn.DenseGeneral(160, batch_dims=0),
        nn.Conv(127, (1, 1)),
    ],
)
def test_no_products_in_training(layer, monkeypatch):
    """Of small kernels, other types and other axes."""
    calls = spy(monkeypatch, "product")
    x = jax.ShapeDtypeStruct((2, 3, 128, 128), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    jax.eval_shape(fast_in_training(layer.apply), variables, x)
    assert not calls


def test_only_large_convolutions_in_training(monkeypatch):
    calls = [spy(monkeypatch, name) for name in ("winograd", "depthwise")]
    for conv in (nn.Conv(64, (3, 3)), nn.Conv(64, (3, 3), feature_group_count=64), nn.Conv(64, (1, 1))):
        x = jax.ShapeDtypeStruct((1, 9, 9, 64), jnp.float32)
        variables = jax.eval_shape(conv.init, jax.random.key(0), x)
        jax.eval_shape(fast_in_training(conv.apply), variables, x)
    assert calls == [[], []]


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", 1])
def test_depthwise(size, stride, padding, monkeypatch):
    calls = spy(monkeypatch, "depthwise")
    conv = nn.Conv(6, (size, size), stride, padding, feature_group_count=6, use_bias=False)
    expected, found = run(conv, (2, 11, 14, 6))
    assert calls and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv(5, (1, 1)),
        nn.Conv(5, (1, 1), 2),
        nn.Conv(5, (1, 1), padding=1),
        nn.Conv(6, (3, 3), feature_group_count=2),
        nn.Conv(66, (3, 3), 2),
        nn.Conv(66, (3, 3), kernel_dilation=2),
        nn.Conv(66, (3, 3), padding=((1, 2), (0, 1))),
        nn.Conv(66, (3, 3), padding="CIRCULAR"),
        nn.Conv(66, (3, 3), dtype=jnp.bfloat16),
        nn.Conv(6, (3,)),
    ],
)
def test_all_others(conv, monkeypatch):
    monkeypatch.setattr(cpu_convs, "WINOGRAD_PRODUCTS", 0)
    calls = [spy(monkeypatch, name) for name in ("winograd", "depthwise")]
    channels = 64 if conv.features == 66 else 6
    shape = (2, 9, channels) if len(conv.kernel_size) == 1 else (2, 9, 12, channels)
    expected, found = run(conv, shape)
    assert calls == [[], []] and found.shape == expected.shape and found.dtype == expected.dtype
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("width", [113, 114])
def test_winograd_only_for_large_convolutions(width, monkeypatch):
    calls = spy(monkeypatch, "winograd")
    x = jax.ShapeDtypeStruct((2, 60, width, 64), jnp.float32)
    conv = nn.Conv(64, (3, 3))
    variables = jax.eval_shape(conv.init, jax.random.key(0), x)
    jax.eval_shape(fast_on_cpu(conv.apply), variables, x)
    assert calls == ([x.shape] if width == 114 else [])


def test_only_for_a_cpu(monkeypatch):
    """That of the mesh; the planner compiles on a CPU for others."""
    calls = spy(monkeypatch, "depthwise")
    x, conv = jax.ShapeDtypeStruct((1, 5, 5, 6), jnp.float32), nn.Conv(6, (3, 3), feature_group_count=6)
    variables = jax.eval_shape(conv.init, jax.random.key(0), x)
    compute = lambda: jax.eval_shape(fast_on_cpu(conv.apply), variables, x)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",))):
        compute()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compute()
    assert not calls
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        compute()
    assert calls == [x.shape]


def with_gradients(apply):
    @jax.jit
    def compute(dy, *args):
        y, backward = jax.vjp(apply, *args)
        return y, *backward(dy)

    return compute


def spy(monkeypatch, name):
    calls, real = [], getattr(cpu_convs, name)
    monkeypatch.setattr(cpu_convs, name, lambda x, *rest: calls.append(x.shape) or real(x, *rest))
    return calls
