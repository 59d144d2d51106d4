import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.resnet import STAGES, ResNet
from ovseg_jax.pretrained.resnet import from_hf_resnet
from tests import reference
from tests.extras import require
from tests.reference import count, images

TINY = dict(stage_sizes=(1, 2, 1, 1), width=32)


# torchvision's 25,557,032 and 44,549,160 without the classifier of 2048 x 1000 + 1000.
@pytest.mark.parametrize("name,expected", [("resnet50", 23_508_032), ("resnet101", 42_500_160)])
def test_number_of_parameters(name, expected):
    model = ResNet(stage_sizes=STAGES[name])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert count(shapes["params"]) == expected


@pytest.mark.parametrize(
    "name,size", [("resnet50", (64, 64)), ("resnet50", (75, 109)), ("resnet101", (96, 64))]
)
def test_equals_hugging_face(name, size):
    torch, transformers = require("torch"), require("transformers")
    config = transformers.ResNetConfig(
        depths=list(STAGES[name]), layer_type="bottleneck", downsample_in_bottleneck=False
    )
    original = reference.randomise(transformers.ResNetModel(config))
    x = images(2, *size)
    with torch.no_grad():
        expected = original(reference.torch_images(x), output_hidden_states=True).hidden_states[1:]
    model = ResNet(stage_sizes=STAGES[name])
    variables = reference.load(model, original, from_hf_resnet(), x)
    reference.assert_maps_agree(jax.jit(model.apply)(variables, x), expected, f"{name} {size}")


@pytest.mark.parametrize("size", [(64, 96), (37, 70)])
def test_strides_and_channels(size):
    model = ResNet(**TINY)
    out = jax.eval_shape(lambda k, x: model.init_with_output(k, x)[0], jax.random.key(0), images(1, *size))
    for i, key in enumerate(("c2", "c3", "c4", "c5")):
        stride = 4 * 2**i
        assert out[key].shape == (1, -(-size[0] // stride), -(-size[1] // stride), 128 * 2**i)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_statistics(norm):
    """Only "batch" in training moves the statistics, and only then does an example depend on the others."""
    model = ResNet(**TINY, norm=norm)
    x = images(2, 32, 32)
    variables = reference.init(model, x)
    assert ("batch_stats" in variables) == (norm != "group")
    apply = jax.jit(lambda v, x, train: model.apply(v, x, train, mutable=["batch_stats"]), static_argnums=2)
    for train in (False, True):
        both, mutated = apply(variables, x, train)
        alone, _ = apply(variables, x[:1], train)
        depends = not np.allclose(both["c4"][:1], alone["c4"], atol=1e-4)
        assert depends == (norm == "batch" and train)
        old = jax.tree.leaves(variables.get("batch_stats", {}))
        new = jax.tree.leaves(mutated.get("batch_stats", {}))
        moved = [not np.array_equal(a, b) for a, b in zip(old, new, strict=True)]
        assert all(moved) if norm == "batch" and train else not any(moved)


def test_running_statistics_have_pytorch_momentum():
    model = ResNet(**TINY)
    x = images(2, 32, 32)
    variables = reference.init(model, x)
    _, mutated = jax.jit(lambda v: model.apply(v, x, True, mutable=["batch_stats"]))(variables)
    kernel = variables["params"]["conv1"]["kernel"]
    dims = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=dims)
    stats = mutated["batch_stats"]["norm1"]
    np.testing.assert_allclose(stats["mean"], 0.1 * y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-4)


def test_unknown_norm():
    with pytest.raises(UserError, match="'layer'"):
        reference.init(ResNet(**TINY, norm="layer"), images(1, 32, 32))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(2, 64, 64)
    full, half = ResNet(**TINY), ResNet(**TINY, dtype=jnp.bfloat16)
    variables = reference.init(half, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for key in expected:
        assert out[key].dtype == jnp.bfloat16
        assert 0 < reference.relative_error(out[key].astype(jnp.float32), expected[key]) < 0.05


@pytest.mark.parametrize("policy", ["dots", "all"])
def test_remat_changes_nothing_but_memory(policy):
    x = images(2, 32, 32)
    plain, remat = ResNet(**TINY), ResNet(**TINY, remat=policy)
    variables = reference.init(plain, x)
    shapes = jax.eval_shape(remat.init, jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)

    def gradient(model):
        def loss(params):
            out, mutated = model.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.mean(out["c5"] ** 2), mutated

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    (grads, mutated), (expected, expected_mutated) = gradient(remat), gradient(plain)
    reference.assert_trees_agree(grads, expected)
    reference.assert_trees_agree(mutated, expected_mutated)
