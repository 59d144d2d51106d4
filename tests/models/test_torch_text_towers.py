"""The PyTorch text towers beside the Flax ones, with the same parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models import text_towers
from tests import reference
from tests.extras import require
from tests.models import twin

TINY: dict[str, Any] = dict(vocab_size=60, length=11, width=32, layers=2, heads=2)
TOWERS: dict[str, dict[str, Any]] = {
    "CLIPText": dict(embed_dim=12),
    "CLIPText gelu": dict(embed_dim=12, activation="gelu", mlp_dim=48),
    "SiglipText": dict(embed_dim=12, mlp_dim=48),
    "Bert": dict(),
    "Bert pooler": dict(pool="pooler"),
    "Bert mean": dict(pool="mean"),
}


def build(kind, **fields):
    """A small tower and its twin."""
    from ovseg_jax.torch import text_towers as twins

    name, options = kind.split()[0], TINY | TOWERS[kind] | fields
    return getattr(text_towers, name)(**options), getattr(twins, name)(**options)


def texts(length):
    """Tokens, and which are valid: those up to the first 59, the highest, which one text also has for padding."""
    rng = np.random.default_rng(length)
    ids, ends = rng.integers(0, 59, (4, length)), np.array([2, 3, length - 2, length - 1])
    ids[np.arange(4), ends] = 59
    ids[0, 3:] = 59
    return ids, np.arange(length) <= ends[:, None]


@pytest.mark.parametrize("kind", TOWERS)
def test_equals_flax(kind):
    torch = require("torch")
    module, theirs = build(kind)
    # Into a first norm so small that its epsilon shows.
    variables = twin.draw(module, np.zeros((1, 4), np.int32), small="(Embed_0|pos_embedding|type_embedding)")
    twin.load(theirs, variables)
    for length in (11, 6):
        ids, valid = texts(length)
        for texts_valid in ([], [valid]):
            expected = module.apply(variables, *map(jnp.asarray, [ids, *texts_valid])).pooled
            with torch.no_grad():
                found = theirs(*map(torch.from_numpy, [ids, *texts_valid]))
            error = reference.relative_error(found.numpy(), expected)
            print(f"{kind} {ids.shape}, {len(texts_valid)} masks: max relative error {error:.1e}")
            assert error < 1e-4


def test_the_defaults_and_published_models_have_the_same_shapes():
    torch = require("torch")
    from ovseg_jax.torch import text_towers as twins

    towers: list[Any] = [(getattr(text_towers, name), {}) for name in ("CLIPText", "SiglipText", "Bert")]
    towers += [(tower, fields | dict(vocab_size=60)) for tower, fields in text_towers.PRESETS.values()]
    for tower, fields in towers:
        fields = fields | dict(layers=1)  # All blocks are alike.
        with torch.device("meta"):
            theirs = getattr(twins, tower.__name__)(**fields)
        twin.assert_same_shapes(tower(**fields), theirs, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("kind", ["CLIPText", "SiglipText", "Bert mean"])
def test_bfloat16(kind):
    torch = require("torch")
    module, theirs = build(kind)
    ids, valid = (torch.from_numpy(x) for x in texts(7))
    twin.load(theirs, twin.draw(module, np.zeros((1, 4), np.int32)))
    with torch.no_grad():
        expected = theirs(ids, valid)
        found = theirs.bfloat16()(ids, valid)
    assert found.dtype == torch.bfloat16
    assert reference.relative_error(found.float().numpy(), expected.numpy()) < 0.05


def test_a_text_that_is_too_long_is_an_error():
    torch = require("torch")
    _, theirs = build("SiglipText")
    with pytest.raises(UserError, match="texts have 12 tokens, but this text tower takes at most 11"):
        theirs(torch.zeros(1, 12, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["CLIPText", "SiglipText", "Bert mean"])
def test_export(kind):
    torch = require("torch")
    twin.assert_exports(build(kind, layers=1)[1], torch.from_numpy(texts(7)[0]))
