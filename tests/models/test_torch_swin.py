from typing import Any

import jax
import pytest

from ovseg_jax.models.swin import PRESETS, Swin
from tests import reference
from tests.extras import require
from tests.models import twin
from tests.reference import images

TINY: dict[str, Any] = dict(width=16, depths=(2, 1, 1, 2), heads=(1, 2, 4, 8), window=3)


# Maps of several windows that are padded and shifted along both axes or one, of odd sides, or smaller than a window.
@pytest.mark.parametrize(
    "size,change",
    [
        ((96, 96), {}),
        ((75, 46), {"window": 4}),
        ((61, 90), {"window": 7, "out_norms": (5,)}),
        ((30, 6), {"window": 2, "out_norms": ()}),
        ((40, 130), {"window": 4, "window_rule": "both"}),
        ((40, 130), {"window": 4, "window_rule": "always"}),
    ],
    ids=str,
)
def test_equals_flax(size, change):
    torch = require("torch")
    from ovseg_jax.torch.swin import Swin as TorchSwin

    x, model = images(2, *size), Swin(**TINY | change)
    variables = twin.draw(model, x)
    ours = twin.load(TorchSwin(**TINY | change), variables)
    expected = jax.jit(model.apply)(variables, x)
    with torch.no_grad():
        found = ours(reference.torch_images(x))
    assert list(expected) == list(found) == list(ours.channels)
    for name, value in expected.items():
        assert ours.channels[name] == value.shape[-1]
        error = reference.relative_error(found[name].permute(0, 2, 3, 1).numpy(), value)
        print(f"Swin {size} {change} {name} {value.shape} max relative error {error:.1e}")
        assert error < 1e-4


def test_bfloat16():
    torch = require("torch")
    from ovseg_jax.torch.swin import Swin as TorchSwin

    x, fields = images(1, 40, 56), TINY | {"depths": (2, 2), "heads": (1, 2)}
    ours = twin.load(TorchSwin(**fields), twin.draw(Swin(**fields), x))
    with torch.no_grad():
        expected = ours(reference.torch_images(x))
        found = ours.bfloat16()(reference.torch_images(x).bfloat16())
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        error = reference.relative_error(value.float().numpy(), expected[name].numpy())
        print(f"Swin bfloat16 {name} max relative error {error:.1e}")
        assert 0 < error < 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_shapes_of_flax(name):
    torch = require("torch")
    from ovseg_jax.torch.swin import Swin as TorchSwin

    with torch.device("meta"):
        ours = TorchSwin(**PRESETS[name])
    twin.assert_same_shapes(Swin(**PRESETS[name]), ours, images(1, 32, 32))


def test_exports():
    require("torch")
    from ovseg_jax.torch.swin import Swin as TorchSwin

    x = reference.torch_images(images(2, 40, 56))
    twin.assert_exports(TorchSwin(**TINY | {"depths": (2, 2), "heads": (1, 2)}), x)
