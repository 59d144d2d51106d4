"""Convpass against PyTorch's float64, and beside the branches of timm's EVA."""

import re
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models.convpass import Convpass, all_but_adapters, with_convpass
from ovseg_jax.models.eva import PRESETS, Eva
from ovseg_jax.models.transformer import Places
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.eva import from_timm_eva
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.rename import rename
from ovseg_jax.train.optimizer import freezer, make_optimizer
from tests import reference
from tests.extras import require
from tests.models.test_eva import HEADS, KINDS, TINY, images, original, state

ROWS, COLUMNS, D = 3, 4, 10
WITHOUT_GRID = {key: value for key, value in KINDS["eva02"][0].items() if key != "rope_grid"}


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), dict(shapes))


def by_torch(x, p, rows, columns, activation):
    """The adapter in PyTorch, in the dtype of x: [b 1+rows*columns d]."""
    torch = require("torch")
    functional = torch.nn.functional
    p = jax.tree.map(lambda value: torch.as_tensor(np.array(value)).to(x.dtype), p)
    act = {"gelu": functional.gelu, "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y)}[activation]
    kernel = p["conv"]["kernel"].permute(3, 2, 0, 1)
    conv = lambda y: functional.conv2d(y, kernel, p["conv"]["bias"], padding=1)
    y = act(x @ p["down"]["kernel"] + p["down"]["bias"]).transpose(1, 2)
    patches = conv(y[..., 1:].unflatten(2, (rows, columns))).flatten(2)
    cls = conv(y[..., :1].unsqueeze(3)).flatten(2)
    y = act(torch.cat([cls, patches], 2)).transpose(1, 2)
    return y @ p["up"]["kernel"] + p["up"]["bias"]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_values_and_gradients_equal_pytorchs(activation):
    torch = require("torch")
    module, places = Convpass(width=5, activation=activation), Places((ROWS, COLUMNS), 1)
    x = np.random.default_rng(1).normal(size=(2, 1 + ROWS * COLUMNS, D)).astype(np.float32)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), x, places))
    loss = lambda v, x: (module.apply(v, x, places) ** 3).sum()
    ours = jax.jit(lambda x: module.apply(variables, x, places))(x)
    given = torch.from_numpy(x).double().requires_grad_()
    theirs = by_torch(given, variables["params"], ROWS, COLUMNS, activation)
    assert reference.relative_error(ours, theirs.detach().numpy()) < 1e-5
    (theirs**3).sum().backward()
    gradient = jax.jit(jax.grad(loss, argnums=1))(variables, x)
    assert reference.relative_error(gradient, given.grad.numpy()) < 1e-5


def test_a_new_adapter_adds_nothing_and_its_convolution_is_the_identity():
    module, places = Convpass(), Places((ROWS, COLUMNS), 1)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1 + ROWS * COLUMNS, D)), jnp.float32)
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(0), x, places)
    assert not np.asarray(module.apply(variables, x, places)).any()
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    np.testing.assert_array_equal(kernel[1, 1], np.eye(8))
    assert kernel.sum() == 8 and variables["params"]["down"]["kernel"].any()


def test_clustered_tokens_and_prompts():
    """The grid has each place's token; a prompt is an image of one pixel, as the class token."""
    module, rng = Convpass(width=4), np.random.default_rng(2)
    kept = jnp.array([[2, 5, 9], [0, 4, 11]])
    owner = (
        jnp.asarray(rng.integers(0, 3, (2, ROWS * COLUMNS)))
        .at[jnp.arange(2)[:, None], kept]
        .set(jnp.arange(3))
    )
    places = Places((ROWS, COLUMNS), 1, kept, owner)
    x = jnp.asarray(rng.normal(size=(2, 1 + 3 + 2, D)), jnp.float32)
    variables = drawn(jax.eval_shape(module.init, jax.random.key(0), x, places))
    out = module.apply(variables, x, places)
    full = places.unfold(x)
    whole = module.apply(variables, full, Places((ROWS, COLUMNS), 1))
    np.testing.assert_allclose(out[:, 0], whole[:, 0], atol=1e-5)
    at = jnp.take_along_axis(whole[:, 1:], kept[..., None], 1)
    np.testing.assert_allclose(out[:, 1:4], at, atol=1e-5)
    as_cls = module.apply(variables, full.at[:, 0].set(x[:, 5]), Places((ROWS, COLUMNS), 1))
    np.testing.assert_allclose(out[:, 5], as_cls[:, 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["eva02", "e14"])
def test_beside_the_branches_of_timms_eva(kind):
    """Pre-norm: the adapter sees the norm's output; post-norm: the block's input."""
    torch = require("torch")
    tower = with_convpass(Eva(**TINY, **KINDS[kind][0]))
    x = images(2, 32, 32)
    flat = flax.traverse_util.flatten_dict(jax.eval_shape(tower.init, jax.random.key(0), x), sep="/")
    arrays = rename(state(original(kind)), from_timm_eva(HEADS))
    arrays |= drawn({path: leaf for path, leaf in flat.items() if path not in arrays})
    variables = flax.traverse_util.unflatten_dict(arrays, sep="/")
    out = jax.jit(tower.apply)(variables, x)
    model = original(kind)

    def forward(block, adapters, y, rope=None, **_):
        attention = lambda z: block.attn(z, rope=rope)
        for norm, branch, name in (
            (block.norm1, attention, "adapter_attention"),
            (block.norm2, block.mlp, "adapter_mlp"),
        ):
            z = y if kind == "e14" else norm(y)
            whole = norm(branch(z)) if kind == "e14" else branch(z)
            y = y + whole + 0.1 * by_torch(z, adapters[name], 4, 4, "gelu")
        return y

    for i, block in enumerate(model.blocks):
        block.forward = partial(forward, block, variables["params"][f"blocks_{i}"])
    try:
        with torch.no_grad():
            tokens = model.forward_features(reference.torch_images(x))
            pooled = model.forward_head(tokens).numpy()
    finally:
        for block in model.blocks:
            del block.forward
    assert reference.relative_error(out.pooled, pooled) < 1e-4
    assert reference.relative_error(out.tokens.reshape(2, 16, -1), tokens[:, 1:].numpy()) < 1e-4


TOWERS = {
    "vit": ViT(patch=8, width=16, depth=2, heads=2, mlp_dim=24, grid=(4, 4), embed_dim=6),
    "eva": Eva(**{**TINY, "taps": ()}, **KINDS["eva02"][0]),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_only_adapters_are_trained(kind):
    tower, x = with_convpass(TOWERS[kind], train=True), images(2, 32, 32)
    params = reference.init(tower, x)["params"]
    config = ConfigDict(dict(learning_rate=0.1, multipliers=[(all_but_adapters(), None)]))
    optimizer = make_optimizer(config, params, 2)
    frozen = freezer(config, ())

    @jax.jit
    def step(params, state):
        rngs = {"dropout": jax.random.key(1)}
        gradient = jax.grad(lambda p: (tower.apply({"params": p}, x, True, rngs=rngs).pooled ** 2).sum())(
            params
        )
        updates, state = optimizer.transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    after, _ = step(params, optimizer.transform.init(params))
    flat, moved = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (params, after))
    for path in flat:
        of_adapter = re.search("adapter_(attention|mlp)/", path) is not None
        assert frozen(path) != of_adapter
        same = np.array_equal(flat[path], moved[path])
        assert same if not of_adapter else path.endswith("up/kernel") <= (not same), path


def test_the_share_of_trained_parameters():
    """0.28% of L/14's parameters with 8 channels, by hand from the shapes."""
    tower = with_convpass(Eva(**PRESETS["eva02_clip_l14"]))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))["params"]
    sizes = {path: leaf.size for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()}
    trained = sum(size for path, size in sizes.items() if not re.search(all_but_adapters(), path))
    assert not re.search(all_but_adapters("image/"), "decoder/kernel")
    assert not re.search(all_but_adapters("image/"), "image/blocks_0/adapter_mlp/up/kernel")
    assert re.search(all_but_adapters("image/"), "image/blocks_0/mlp/fc1/kernel")
    assert trained == 24 * 2 * (1024 * 8 + 8 + 9 * 8 * 8 + 8 + 8 * 1024 + 1024)
    assert 0.0028 < trained / sum(sizes.values()) < 0.0029


def test_dropout_is_on_in_training_alone():
    x = images(1, 32, 32)
    tower = with_convpass(TOWERS["vit"], dropout=0.5)
    variables = drawn(jax.eval_shape(tower.init, jax.random.key(0), x))
    train = with_convpass(TOWERS["vit"], dropout=0.5, train=True)
    variables = jax.tree.map(jnp.asarray, variables)
    apply = lambda tower, key: tower.apply(variables, x, rngs={"dropout": jax.random.key(key)}).pooled
    assert np.abs(apply(train, 0) - apply(train, 1)).max() > 1e-4
    np.testing.assert_array_equal(apply(tower, 0), apply(tower, 1))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(width=0), "adapter.width=0 is less than 1"),
        (dict(activation="silu"), "adapter.activation='silu' is not one of gelu, gelu_tanh, quick_gelu"),
        (dict(dropout=1.0), r"adapter.dropout=1.0 is not in \[0, 1\)"),
    ],
)
def test_mistakes(change, words):
    with pytest.raises(UserError, match=words):
        with_convpass(TOWERS["vit"], **change)


def test_published_weights_lack_adapters(tmp_path):
    weights = state(original("eva02"))
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text('{"architecture": "eva02_base_patch16_clip_224"}')
    tower = with_convpass(Eva(**{**TINY, "rope_grid": 16}, **WITHOUT_GRID))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images(1, 32, 32))
    found = flax.traverse_util.flatten_dict(load(str(tmp_path), tower, shapes)["params"], sep="/")
    own = flax.traverse_util.flatten_dict(shapes["params"], sep="/")
    assert own.keys() - found.keys() == {path for path in own if "/adapter_" in path}
