import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.efficientnet_scaling import SCALING, STAGES, round_blocks, round_channels
from ovseg_jax.pretrained.efficientnet import from_hf_efficientnet
from tests import reference
from tests.extras import require
from tests.reference import count, images

TINY = dict(width=0.25, depth=0.4)


def head_parameters(width):
    """Top convolution, its norm, and the classifier of 1000 classes: what our pyramid leaves out."""
    last, top = round_channels(320, width), round_channels(1280, width)
    return last * top + 2 * top + 1000 * top + 1000


# Published totals (Keras Applications, less the 7 numbers of its input normalisation; timm agrees).
@pytest.mark.parametrize(
    "name,total",
    [
        ("efficientnet_b0", 5_288_548),
        ("efficientnet_b1", 7_794_184),
        ("efficientnet_b2", 9_109_994),
        ("efficientnet_b3", 12_233_232),
        ("efficientnet_b4", 19_341_616),
        ("efficientnet_b5", 30_389_784),
        ("efficientnet_b6", 43_040_704),
        ("efficientnet_b7", 66_347_960),
    ],
)
def test_number_of_parameters(name, total):
    width, depth = SCALING[name]
    model = EfficientNet(width, depth)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert count(shapes["params"]) + head_parameters(width) == total


def test_rounding():
    assert [round_channels(c, 1.1) for c in (16, 24, 40, 112)] == [16, 24, 48, 120]
    assert round_channels(11, 1.0) == 16  # the nearest multiple, 8, is below 90%
    assert [round_blocks(n, 3.1) for n in (1, 2, 3, 4)] == [4, 7, 10, 13]


# Hugging Face pads a strided convolution as SAME does at even sizes only, hence multiples of 32.
@pytest.mark.parametrize(
    "name,size", [("efficientnet_b0", (64, 96)), ("efficientnet_b1", (64, 64)), ("efficientnet_b7", (32, 64))]
)
def test_equals_hugging_face(name, size):
    torch, transformers = require("torch"), require("transformers")
    width, depth = SCALING[name]
    config = transformers.EfficientNetConfig(
        width_coefficient=width, depth_coefficient=depth, hidden_dim=round_channels(1280, width)
    )
    original = reference.randomise(transformers.EfficientNetModel(config))
    x = images(2, *size)
    with torch.no_grad():
        hidden = original(reference.torch_images(x), output_hidden_states=True).hidden_states
    model = EfficientNet(width, depth)
    variables = reference.load(model, original, from_hf_efficientnet(), x)
    # hidden[0] is the stem's; the pyramid takes the last block of stages 2, 3, 5 and 7.
    ends = np.cumsum([round_blocks(stage.blocks, depth) for stage in STAGES])[[1, 2, 4, 6]]
    features = jax.jit(model.apply)(variables, x)
    reference.assert_maps_agree(features, [hidden[end] for end in ends], f"{name} {size}")


@pytest.mark.parametrize("size", [(64, 96), (37, 70)])
def test_strides_and_channels(size):
    model = EfficientNet()
    out = jax.eval_shape(lambda k, x: model.init_with_output(k, x)[0], jax.random.key(0), images(1, *size))
    assert list(out) == ["c2", "c3", "c4", "c5"]
    for key, stride, channels in zip(out, (4, 8, 16, 32), (24, 40, 112, 320), strict=True):
        assert out[key].shape == (1, -(-size[0] // stride), -(-size[1] // stride), channels)


def test_odd_sizes_pad_as_tensorflow():
    """SAME at an odd size pads both sides alike; at an even size, only the end: the stem shows it."""
    model = EfficientNet(**TINY)

    def is_stem(module, _):
        return module.name == "stem_conv"

    for size, before in ((32, 0), (33, 1)):
        x = images(1, size, size)
        variables = reference.init(model, x)
        _, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=is_stem))(variables, x)
        stem = state["intermediates"]["stem_conv"]["__call__"][0]
        kernel = variables["params"]["stem_conv"]["kernel"]
        window = np.zeros((3, 3, 3), np.float32)
        window[before:, before:] = np.asarray(x[0, : 3 - before, : 3 - before])
        np.testing.assert_allclose(stem[0, 0, 0], np.einsum("hwc,hwcd->d", window, kernel), atol=1e-5)


def test_training_moves_statistics_by_one_percent_and_drops_blocks():
    model = EfficientNet(width=0.25, depth=0.5, drop_rate=0.9)
    x = images(4, 32, 32)
    variables = reference.init(model, x)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, x, True, mutable=["batch_stats"], rngs=rngs)

    (first, mutated), (second, _) = train(1), train(2)
    assert not np.allclose(first["c4"], second["c4"])
    stats, old = mutated["batch_stats"]["stem_norm"]["var"], variables["batch_stats"]["stem_norm"]["var"]
    kernel, dims = variables["params"]["stem_conv"]["kernel"], ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(stats, 0.99 * old + 0.01 * y.var((0, 1, 2)), rtol=1e-4)
    # Evaluation needs no rng, and an example does not depend on the others of its batch.
    evaluate = jax.jit(model.apply)
    np.testing.assert_allclose(evaluate(variables, x)["c5"][:1], evaluate(variables, x[:1])["c5"], atol=1e-4)


def test_without_stochastic_depth_training_needs_no_rng():
    model = EfficientNet(**TINY, drop_rate=0.0)
    x = images(2, 32, 32)
    jax.eval_shape(lambda v: model.apply(v, x, True, mutable=["batch_stats"]), reference.init(model, x))


def test_initial_activations_keep_their_scale():
    """Catches a depthwise fan-out that counts the channels: the signal would die within a few blocks."""
    model = EfficientNet(drop_rate=0.0)
    x = images(4, 64, 64)
    out, variables = jax.jit(lambda k, x: model.init_with_output(k, x, True))(jax.random.key(0), x)
    kernel = variables["params"]["block_8"]["depthwise_conv"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), (2 / 25) ** 0.5, rtol=0.1)
    assert all(0.1 < float(jnp.std(value)) < 10 for value in out.values())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(2, 64, 64)
    full, half = EfficientNet(**TINY), EfficientNet(**TINY, dtype=jnp.bfloat16)
    variables = reference.init(half, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for key in expected:
        assert out[key].dtype == jnp.bfloat16
        assert 0 < reference.relative_error(out[key].astype(jnp.float32), expected[key]) < 0.1


@pytest.mark.parametrize("policy", ["dots", "all"])
def test_remat_changes_nothing_but_memory(policy):
    x = images(2, 32, 32)
    plain, remat = EfficientNet(**TINY, drop_rate=0.5), EfficientNet(**TINY, drop_rate=0.5, remat=policy)
    variables = reference.init(plain, x)

    def gradient(model):
        def loss(params):
            out, mutated = model.apply(
                {**variables, "params": params},
                x,
                True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(3)},
            )
            return jnp.mean(out["c5"] ** 2), mutated

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (grads, mutated), (expected, expected_mutated) = gradient(remat), gradient(plain)
    reference.assert_trees_agree(grads, expected)
    reference.assert_trees_agree(mutated, expected_mutated)
