"""Names of published ResNets and EfficientNets, each against the library that gives the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.efficientnet_scaling import LITE, SCALING
from ovseg_jax.models.resnet import STAGES, ResNet
from ovseg_jax.pretrained.efficientnet import from_hf_efficientnet, from_timm_efficientnet
from ovseg_jax.pretrained.rename import fit, rename
from ovseg_jax.pretrained.resnet import from_hf_resnet, from_torchvision_resnet
from tests import reference
from tests.extras import require


def images(batch, height, width):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, height, width, 3)), jnp.float32)


def load_names(model, original, renames):
    """All names and shapes fit; the values are not computed (`original` is on the meta device)."""
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1, 64, 64))
    return fit(rename(state, renames), shapes)


@pytest.mark.parametrize("size", [(64, 64), (75, 109)])
def test_resnet_equals_timm(size):
    timm, torch = require("timm"), require("torch")
    blocks = (1, 2, 2, 1)
    original = reference.randomise(timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, blocks))
    x = images(2, *size)
    model = ResNet(stage_sizes=blocks)
    variables = reference.load(model, original, from_torchvision_resnet(), x)
    with torch.no_grad():
        expected = original.forward_intermediates(reference.torch_images(x), intermediates_only=True)[1:]
    reference.assert_maps_agree(jax.jit(model.apply)(variables, x), expected, f"timm {size}")


# Padding at odd sizes is TensorFlow's in timm's tf_ variants, so any size can be compared.
@pytest.mark.parametrize(
    "name,size",
    [("efficientnet_b0", (64, 64)), ("efficientnet_b0", (75, 109)), ("efficientnet_b3", (52, 80))],
)
def test_efficientnet_equals_timm(name, size):
    timm, torch = require("timm"), require("torch")
    original = reference.randomise(timm.create_model(f"tf_{name}", pretrained=False))
    width, depth = SCALING[name]
    model, x = EfficientNet(width, depth), images(2, *size)
    variables = reference.load(model, original, from_timm_efficientnet(depth), x)
    with torch.no_grad():
        expected = original.forward_intermediates(reference.torch_images(x), intermediates_only=True)[1:]
    reference.assert_maps_agree(jax.jit(model.apply)(variables, x), expected, f"timm {name} {size}")


@pytest.mark.parametrize("name", SCALING)
def test_names_of_every_efficientnet_of_timm(name):
    timm, torch = require("timm"), require("torch")
    width, depth = SCALING[name]
    with torch.device("meta"):
        original = timm.create_model(f"tf_{name}", pretrained=False)
    load_names(EfficientNet(width, depth), original, from_timm_efficientnet(depth))


@pytest.mark.parametrize("name", LITE)
def test_names_of_every_lite_of_timm(name):
    timm, torch = require("timm"), require("torch")
    width, depth = LITE[name]
    with torch.device("meta"):
        original = timm.create_model(f"tf_{name}", pretrained=False)
    load_names(EfficientNet(width, depth, lite=True), original, from_timm_efficientnet(depth, lite=True))


@pytest.mark.parametrize("name", STAGES)
def test_names_of_the_resnets_of_timm(name):
    timm, torch = require("timm"), require("torch")
    with torch.device("meta"):
        original = timm.create_model(name, pretrained=False)
    load_names(ResNet(stage_sizes=STAGES[name]), original, from_torchvision_resnet())


def test_names_of_classifiers_of_hugging_face():
    """Their names have a prefix, and heads which are not needed."""
    transformers, torch = require("transformers"), require("torch")
    with torch.device("meta"):
        resnet = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(depths=[3, 4, 6, 3], layer_type="bottleneck")
        )
        efficientnet = transformers.EfficientNetForImageClassification(
            transformers.EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280)
        )
    load_names(ResNet(), resnet, from_hf_resnet())
    load_names(EfficientNet(), efficientnet, from_hf_efficientnet())


def test_a_deeper_checkpoint_is_refused():
    timm, torch = require("timm"), require("torch")
    with torch.device("meta"):
        resnet = timm.create_model("resnet101", pretrained=False)
        efficientnet = timm.create_model("tf_efficientnet_b1", pretrained=False)
    with pytest.raises(UserError, match=r"layer3_6/conv1/kernel.* too many"):
        load_names(ResNet(), resnet, from_torchvision_resnet())
    with pytest.raises(UserError, match=r"blocks\.0\.1\..*does not have"):
        load_names(EfficientNet(), efficientnet, from_timm_efficientnet(1.0))
