from typing import Any

import jax
import pytest

from ovseg_jax.models.clip_resnet import PRESETS, ClipResNet
from tests import reference
from tests.extras import require
from tests.models import twin
from tests.reference import images

TINY: dict[str, Any] = dict(stage_sizes=(1, 2, 1, 1), width=8, embed=24, grid=3)


# The table of positions as it is, for a larger map, for one of odd sides, and for a single place.
@pytest.mark.parametrize(
    "size,change",
    [
        ((96, 96), {}),
        ((75, 173), {"norm": "frozen"}),
        ((20, 70), {"norm": "group", "width": 64, "stage_sizes": (1, 1), "grid": 14}),
        ((30, 20), {}),
    ],
    ids=str,
)
def test_equals_flax(size, change):
    torch = require("torch")
    from ovseg_jax.torch.clip_resnet import ClipResNet as TorchClipResNet

    x, model = images(2, *size), ClipResNet(**TINY | change)
    variables = twin.draw(model, x)
    ours = twin.load(TorchClipResNet(**TINY | change), variables)
    expected = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        found = ours(reference.torch_images(x))
    assert expected.keys() == found.keys() == {*ours.channels, "pooled", "dense"}
    assert ours.channels == {name: expected[name].shape[-1] for name in expected if name[0] == "c"}
    for name, value in expected.items():
        y = found[name].permute(0, 2, 3, 1) if value.ndim == 4 else found[name]
        error = reference.relative_error(y.numpy(), value)
        print(f"ClipResNet {size} {change} {name} {value.shape} max relative error {error:.1e}")
        assert error < 1e-4


def test_bfloat16():
    torch = require("torch")
    from ovseg_jax.torch.clip_resnet import ClipResNet as TorchClipResNet

    x, fields = images(1, 64, 90), TINY | {"stage_sizes": (1, 1)}
    ours = twin.load(TorchClipResNet(**fields), twin.draw(ClipResNet(**fields), x))
    with torch.no_grad():
        expected = ours(reference.torch_images(x))
        found = ours.bfloat16()(reference.torch_images(x).bfloat16())
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        error = reference.relative_error(value.float().numpy(), expected[name].numpy())
        print(f"ClipResNet bfloat16 {name} max relative error {error:.1e}")
        assert 0 < error < 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_flax(name):
    torch = require("torch")
    from ovseg_jax.torch.clip_resnet import ClipResNet as TorchClipResNet

    with torch.device("meta"):
        ours = TorchClipResNet(**PRESETS[name])
    twin.assert_same_shapes(ClipResNet(**PRESETS[name]), ours, images(1, 32, 32))


def test_exports():
    require("torch")
    from ovseg_jax.torch.clip_resnet import ClipResNet as TorchClipResNet

    x = reference.torch_images(images(2, 75, 90))
    twin.assert_exports(TorchClipResNet(**TINY | {"stage_sizes": (1, 1)}), x)
