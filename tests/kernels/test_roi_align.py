"""RoIAlign against torchvision's, and against a loop over samples by the rules of torchvision's own operator.

Without that operator, which a CPU build of PyTorch lacks, torchvision's Python form repeats the border without end and
takes no more adaptive samples than the map has rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from extras import require

from ovseg_jax.kernels.roi_align import roi_align

H, W, C = 9, 13, 3
FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(2, H, W, C)), jnp.float32)
INSIDE = [
    [0, 0, W, H],
    [1.3, 2.2, 7.9, 8.4],
    [3, 4, 4, 5],
    [5.25, 1.5, 5.5, 1.75],  # less than a cell
    [0.5, 0.5, 12.5, 3.5],
    [2, 3, 2, 6],  # without width
    [4, 4, 4, 4],  # a point
    [6, 7, 3, 2],  # corners swapped
]
# Samples between the map's border and its outermost centres.
BORDER = [[-0.41, -0.27, 4.1, 5.3], [8.3, 5.2, W - 0.03, H - 0.02]]
OUTSIDE = [
    [-0.33, -0.45, W + 0.11, H + 0.08],
    [-3.13, -2.57, 4.21, 5.53],
    [8.1, 5.3, W + 6.7, H + 2.9],
    [-9, -9, -4, -4],
    [W + 3, 2, W + 5, 4],
    [-1.47, -1.52, 0.23, 0.37],
    [-4.1, -3.3, W + 5.7, H + 4.9],
]
HUGE = [[-100.1, -60.5, 140.7, 90.3], [-1e4, -1e4, 1e4, 1e4], [3, -500.1, 4.5, 800.3]]


def boxes(rows):
    """The same boxes, smaller and in another order, for the second image."""
    rows = np.asarray(rows, np.float32)
    return np.stack([rows, rows[::-1] * np.float32(0.97)])


def by_samples(maps, box, size, sampling, aligned):
    """One box, a sample at a time; places are float32, as a number of samples or a border may hang on the last bit."""
    one = np.float32
    x0, y0, x1, y1 = one(box) - one(0.5 if aligned else 0.0)

    def axis(start, end, cells):
        length = end - start if aligned else max(end - start, one(1))
        step = length / one(size)
        count = sampling if sampling > 0 else int(np.ceil(step))
        weights = np.zeros((size, cells))
        for p in range(size):
            for i in range(count):
                at = start + one(p) * step + one(i + 0.5) * step / one(count)
                if not -1 <= at <= cells:
                    continue
                at = float(min(max(at, 0), cells - 1))
                low = int(at)
                weights[p, low] += 1 - (at - low)
                weights[p, min(low + 1, cells - 1)] += at - low
        return weights, count

    rows, down = axis(y0, y1, maps.shape[0])
    columns, across = axis(x0, x1, maps.shape[1])
    return np.einsum("ph,qw,hwc->pqc", rows, columns, np.float64(maps)) / max(down * across, 1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size, sampling", [(1, -1), (1, 2), (7, 0), (7, 3), (14, 2), (14, -1)])
def test_values_and_gradients_are_torchvisions(size, sampling, aligned):
    torch, ops = require("torch"), require("torchvision.ops")
    # Without boxes that have no samples: gradients of torchvision's Python form are then NaN.
    given = boxes(INSIDE[:5])
    given = np.concatenate([given, np.broadcast_to(np.float32(BORDER), (2, 2, 4))], axis=1)
    maps = torch.from_numpy(np.array(FEATURES).transpose(0, 3, 1, 2).copy()).requires_grad_()
    rois = [torch.from_numpy(4 * rows) for rows in given]
    # Without its own operators torchvision would compile its Python form, which takes far longer than to run it.
    with torch.compiler.set_stance("force_eager"):
        want = ops.roi_align(maps, rois, size, 0.25, sampling, aligned)
    weights = np.random.default_rng(1).normal(size=(*given.shape[:2], size, size, C)).astype(np.float32)
    (want * torch.from_numpy(weights).flatten(0, 1).permute(0, 3, 1, 2)).sum().backward()
    options = dict(scale=0.25, sampling=sampling, aligned=aligned)

    @jax.jit
    def ours(features, boxes):
        out = roi_align(features, boxes, size, **options)
        return (out * weights).sum(), out

    (_, out), gradients = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(
        FEATURES, jnp.asarray(4 * given)
    )
    want = want.detach().permute(0, 2, 3, 1).unflatten(0, given.shape[:2]).numpy()
    np.testing.assert_allclose(out, want, atol=2e-5)
    np.testing.assert_allclose(gradients[0], maps.grad.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    assert not np.asarray(gradients[1]).any()


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size, sampling", [(1, 0), (7, 0), (14, 0), (1, 4), (7, 1)])
def test_boxes_of_any_length_and_place(size, sampling, aligned):
    given = boxes([*INSIDE, *BORDER, *OUTSIDE, *HUGE])
    out = jax.jit(lambda f, b: roi_align(f, b, size, sampling=sampling, aligned=aligned))(FEATURES, given)
    maps = np.asarray(FEATURES)
    for i in range(2):
        for got, box in zip(np.asarray(out[i]), given[i], strict=True):
            want = by_samples(maps[i], box, size, sampling, aligned)
            np.testing.assert_allclose(got, want, atol=5e-3 if np.abs(box).max() > 1e3 else 1e-4)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size, sampling", [(1, 0), (7, 0), (14, 2)])
def test_boxes_outside_of_the_map_are_onnxruntimes(size, sampling, aligned):
    onnx, runtime = require("onnx"), require("onnxruntime")
    node = onnx.helper.make_node(
        "RoiAlign",
        ["x", "boxes", "image"],
        ["y"],
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=size,
        output_width=size,
        sampling_ratio=sampling,
    )
    kinds = [("x", 1, 4), ("boxes", 1, 2), ("image", 7, 1)]  # float32 and int64
    values = [onnx.helper.make_tensor_value_info(name, kind, [None] * ndim) for name, kind, ndim in kinds]
    out = onnx.helper.make_tensor_value_info("y", 1, [None] * 4)
    opset = [onnx.helper.make_opsetid("", 16)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values, [out]), opset_imports=opset, ir_version=10
    )
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = boxes([*INSIDE[:-1], *BORDER, *OUTSIDE, HUGE[0], HUGE[2]])
    (want,) = session.run(
        None,
        {
            "x": np.array(FEATURES).transpose(0, 3, 1, 2),
            "boxes": given.reshape(-1, 4),
            "image": np.repeat(np.arange(2), given.shape[1]),
        },
    )
    got = jax.jit(lambda f, b: roi_align(f, b, size, sampling=sampling, aligned=aligned))(FEATURES, given)
    want = want.transpose(0, 2, 3, 1).reshape(got.shape)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_every_number_of_samples():
    """Boxes of all lengths, whose samples are from two cells down to just over half a cell apart."""
    lengths = np.concatenate([np.linspace(0.0637, 12.0137, 120), np.arange(1, 12) + 1e-4, np.arange(1.0, 12)])
    given = np.stack([lengths * 0 + 0.4, lengths * 0 - 0.7, lengths + 0.4, lengths - 0.7], -1)[None]
    given, maps = given.astype(np.float32), np.asarray(FEATURES[0])
    for size in (1, 3):
        out = jax.jit(lambda f, b: roi_align(f, b, size))(FEATURES[:1], given)  # noqa: B023
        want = [by_samples(maps, box, size, 0, True) for box in given[0]]
        np.testing.assert_allclose(out[0], want, atol=1e-4)


def test_padding_has_no_influence():
    given, valid = jnp.asarray(boxes(INSIDE)), np.arange(2 * len(INSIDE)).reshape(2, -1) % 3 > 0
    given_nan = jnp.where(valid[..., None], given, jnp.nan)

    def loss(features, boxes, valid):
        out = roi_align(features, boxes, 2, valid=valid)
        return (out**2).sum(), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(FEATURES, given_nan, jnp.asarray(valid))
    whole = np.asarray(roi_align(FEATURES, given, 2))
    np.testing.assert_array_equal(np.asarray(out)[valid], whole[valid])
    assert not np.asarray(out)[~valid].any() and whole[~valid].any()
    of_valid = lambda f: (roi_align(f, given, 2)[valid] ** 2).sum()
    np.testing.assert_allclose(gradient, jax.grad(of_valid)(FEATURES), atol=1e-5)


def test_half_precision_keeps_its_dtype():
    half, given = jnp.asarray(FEATURES, jnp.bfloat16), jnp.asarray(boxes(INSIDE))
    out = roi_align(half, given, 7)
    assert out.dtype == jnp.bfloat16
    want = roi_align(half.astype(jnp.float32), given, 7)
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=2**-7, atol=1e-6)
