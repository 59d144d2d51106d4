from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.swin import PRESETS, Swin, SwinBlock, regions, relative_positions
from ovseg_jax.models.windows import window_and_shift
from ovseg_jax.pretrained.rename import fit, rename
from ovseg_jax.pretrained.swin import from_hf_swin, from_microsoft_swin, from_timm_swin
from tests import reference
from tests.extras import require
from tests.reference import images

HEADS = (1, 2, 4, 8)
TINY: dict[str, Any] = dict(width=16, depths=(2, 2, 2, 2), heads=HEADS, window=3)
SMALL: dict[str, Any] = dict(width=16, depths=(1, 2), heads=(1, 2), window=3)  # c2 and c3 alone


def randomise(model):
    """Tables of positions matter too."""
    import torch

    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data.normal_(0, 1, generator=generator)
    return reference.randomise(model)


def hf_config(transformers, **kwargs):
    return transformers.SwinConfig(
        embed_dim=16, depths=[2, 2, 2, 2], num_heads=list(HEADS), attn_implementation="eager", **kwargs
    )


# Maps larger than the window at each stage; odd sides and padded windows. Then maps that one window covers along one
# side, along both, and maps smaller than it: the detectors shift and fill whole windows all the same.
@pytest.mark.parametrize("window,size", [(3, (150, 213)), (4, (161, 130)), (4, (96, 160)), (5, (64, 130))])
def test_detector_equals_hugging_face(window, size):
    torch, transformers = require("torch"), require("transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    original = randomise(
        transformers.SwinBackbone(hf_config(transformers, window_size=window, out_features=stages))
    )
    x = images(2, *size)
    model = Swin(**{**TINY, "window": window}, window_rule="always")
    variables = reference.load(model, original, from_hf_swin(HEADS, backbone=True), x)
    with torch.no_grad():
        expected = original(reference.torch_images(x)).feature_maps
    reference.assert_maps_agree(jax.jit(model.apply)(variables, x), expected, f"HF backbone {window} {size}")


# c5 is one window, or two along one side: then neither side is shifted.
@pytest.mark.parametrize("window,size", [(3, (96, 96)), (7, (224, 224)), (3, (96, 160)), (3, (160, 96))])
def test_classifier_equals_hugging_face(window, size):
    torch, transformers = require("torch"), require("transformers")
    original = randomise(transformers.SwinModel(hf_config(transformers, window_size=window, image_size=size)))
    x = images(2, *size)
    model = Swin(**{**TINY, "window": window}, out_norms=(5,), window_rule="both")
    variables = reference.load(model, original, from_hf_swin(HEADS), x)
    with torch.no_grad():
        expected = original(reference.torch_images(x), interpolate_pos_encoding=True)
    c5 = jax.jit(model.apply)(variables, x)["c5"]
    last = expected.last_hidden_state.reshape(2, *c5.shape[1:]).permute(0, 3, 1, 2)
    reference.assert_maps_agree({"c5": c5}, [last], f"HF classifier {window} {size}")
    pooled = reference.relative_error(c5.mean((1, 2)), expected.pooler_output.numpy())
    print(f"HF classifier {window} {size} pooled max relative error {pooled:.1e}")
    assert pooled < 1e-4


def timm_swin(timm, size, window):
    return timm.models.swin_transformer.SwinTransformer(
        img_size=size, embed_dim=16, depths=(2, 2, 2, 2), num_heads=HEADS, window_size=window
    )


# timm pads behind the shift, we before it as the authors do: the same where windows fit. 192 x 96 leaves a c5 of 6 x 3.
@pytest.mark.parametrize("window,size", [(3, (192, 96)), (6, (192, 192))])
def test_equals_timm(window, size):
    torch, timm = require("torch"), require("timm")
    original = randomise(timm_swin(timm, size, window))
    x = images(2, *size)
    model = Swin(**{**TINY, "window": window}, out_norms=(5,))
    variables = reference.load(model, original, from_timm_swin(HEADS), x)
    with torch.no_grad():
        last, expected = original.forward_intermediates(reference.torch_images(x))
    expected[-1] = last.permute(0, 3, 1, 2)
    maps = jax.jit(model.apply)(variables, x)
    reference.assert_maps_agree(maps, expected, f"timm {window} {size}")
    # The same arrays by the authors' names: merging ends a stage.
    theirs = {
        name.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample"): value.detach().numpy()
        for name, value in original.state_dict().items()
        for i in [int(name.split(".")[1]) if name.startswith("layers") else 0]
    }
    theirs |= {"layers.0.blocks.1.attn_mask": np.zeros((4, 9, 9)), "head.weight": np.zeros((3, 128))}
    again = fit(rename(theirs, from_microsoft_swin(HEADS)), variables)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, variables)))


def test_maps_smaller_than_the_window_use_the_middle_of_the_table():
    """timm's model for such a size has smaller tables; its c5 is 2 x 3 and its c4 4 x 6."""
    torch, timm = require("torch"), require("timm")
    size, window = (64, 96), 8
    original = randomise(timm_swin(timm, size, window))
    x = images(2, *size)
    model = Swin(**{**TINY, "window": window}, out_norms=(5,))
    arrays = rename({k: v.detach().numpy() for k, v in original.state_dict().items()}, from_timm_swin(HEADS))
    rng = np.random.default_rng(0)
    cropped = 0
    for stage, h, w in ((1, 8, 8), (2, 8, 8), (3, 4, 6), (4, 2, 3)):
        for path in [p for p in arrays if f"/stage{stage}_" in p and p.endswith("position_bias")]:
            whole = rng.normal(size=(15, 15, HEADS[stage - 1])).astype(np.float32)
            middle = arrays[path].reshape(2 * h - 1, 2 * w - 1, -1)
            whole[8 - h : 7 + h, 8 - w : 7 + w] = middle
            arrays[path] = whole.reshape(225, -1)
            cropped += (h, w) != (8, 8)
    assert cropped == 4
    variables = fit(arrays, jax.eval_shape(model.init, jax.random.key(0), x))
    with torch.no_grad():
        last, expected = original.forward_intermediates(reference.torch_images(x))
    expected[-1] = last.permute(0, 3, 1, 2)
    maps = jax.jit(model.apply)(variables, x)
    reference.assert_maps_agree(maps, expected, f"timm {window} {size}")


@pytest.mark.parametrize(
    "name,theirs",
    [
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("swin_small", "swin_small_patch4_window7_224"),
        ("swin_base", "swin_base_patch4_window7_224"),
        ("swin_base_384", "swin_base_patch4_window12_384"),
        ("swin_large", "swin_large_patch4_window7_224"),
        ("swin_large_384", "swin_large_patch4_window12_384"),
    ],
)
def test_presets_have_the_shapes_of_timm(name, theirs):
    torch, timm = require("torch"), require("timm")
    with torch.device("meta"):
        original = timm.create_model(theirs, pretrained=False, num_classes=0)
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in original.state_dict().items()}
    model = Swin(**PRESETS[name], out_norms=(5,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(1, 64, 64))
    fit(rename(state, from_timm_swin(PRESETS[name]["heads"])), shapes)
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert ours == sum(p.numel() for p in original.parameters())


def hub_name(name):
    """Of a module of transformers 5: what stands in the files on the hub."""
    for now, then in (
        *((f"attention.{x[0]}_proj", f"attention.self.{x}") for x in ("query", "key", "value")),
        ("attention.relative_position_bias.", "attention.self."),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ):
        name = name.replace(now, then)
    return name


def test_names_of_files_on_the_hub():
    require("torch")
    transformers = require("transformers")
    original = transformers.SwinForImageClassification(hf_config(transformers, window_size=3))
    state = {k: v.detach().numpy() for k, v in original.state_dict().items()}
    hub = {hub_name(k): v for k, v in state.items()}
    assert "swin.encoder.layers.0.blocks.1.attention.self.query.weight" in hub
    assert "swin.encoder.layers.2.blocks.0.attention.output.dense.bias" in hub
    hub["swin.encoder.layers.0.blocks.1.attention.self.relative_position_index"] = np.zeros((9, 9))
    ours, expected = rename(hub, from_hf_swin(HEADS)), rename(state, from_hf_swin(HEADS))
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[k], expected[k]) for k in ours)


def test_names_of_detectors():
    model, x = Swin(**TINY), images(1, 32, 32)
    theirs = {"backbone.layers.0.downsample.norm.weight": np.zeros(64)}
    theirs |= {f"backbone.norm{i}.weight": np.full(3, i) for i in range(4)}
    ours = rename(theirs, from_microsoft_swin(HEADS, "backbone."))
    assert [ours[f"params/out_norm{i}/scale"][0] for i in (2, 3, 4, 5)] == [0, 1, 2, 3]
    assert "params/merge2/norm/scale" in ours
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert {f"out_norm{i}" for i in (2, 3, 4, 5)} <= shapes.keys()


def test_relative_positions():
    table = relative_positions(2, 3, 4).reshape(2, 3, 2, 3)
    for y, x, v, u in np.ndindex(table.shape):
        assert table[y, x, v, u] == (y - v + 3) * 7 + (x - u + 3)


def test_regions_separate_what_went_round():
    """On a map of 4 x 8 that moved by 1 down and 2 right, windows of 4 x 4."""
    left, right = regions(4, 8, (4, 4), (1, 2)).reshape(2, 4, 4)
    np.testing.assert_array_equal(left, np.repeat([[0], [0], [0], [2]], 4, axis=1))
    np.testing.assert_array_equal(right, [[0, 0, 1, 1]] * 3 + [[2, 2, 3, 3]])


@pytest.mark.parametrize("size", [(64, 96), (37, 70), (3, 5)])
def test_strides_and_channels(size):
    model = Swin(**TINY)
    out = jax.eval_shape(lambda k, x: model.init_with_output(k, x)[0], jax.random.key(0), images(1, *size))
    assert list(out) == ["c2", "c3", "c4", "c5"]
    for i, value in enumerate(out.values()):
        stride = 4 * 2**i
        assert value.shape == (1, -(-size[0] // stride), -(-size[1] // stride), 16 * 2**i)


def test_norms_of_the_maps():
    x = images(2, 64, 64)
    every, last, none = (Swin(**SMALL, out_norms=levels) for levels in ((2, 3), (3,), ()))
    variables = reference.init(every, x)
    params = variables["params"]
    bare = {k: v for k, v in params.items() if not k.startswith("out_norm")}
    maps = jax.jit(every.apply)(variables, x)
    raw = jax.jit(none.apply)({"params": bare}, x)
    one = jax.jit(last.apply)({"params": {**bare, "out_norm3": params["out_norm3"]}}, x)
    for key in maps:
        assert (
            np.abs(np.asarray(maps[key]).mean(-1)).max() < 1e-4 < np.abs(np.asarray(raw[key]).mean(-1)).max()
        )
    np.testing.assert_allclose(one["c3"], maps["c3"], atol=1e-5)
    np.testing.assert_allclose(one["c2"], raw["c2"], atol=1e-5)


def test_stochastic_depth_drops_branches_by_example():
    block, x = SwinBlock(heads=2, window=3, shifted=False, drop_rate=0.5), images(64, 3, 3).repeat(4, axis=-1)
    shapes = jax.eval_shape(lambda key: block.init(key, x, False), jax.random.key(0))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    out = jax.jit(lambda: block.apply(variables, x, True, rngs={"dropout": jax.random.key(0)}))()
    kept = np.all(out == x, axis=(1, 2, 3)).mean()
    assert 0.1 < kept < 0.4  # a quarter, where both branches drop


def test_evaluation_and_training_without_stochastic_depth_need_no_rng():
    x = images(3, 32, 32)
    model, plain = Swin(**SMALL, drop_rate=0.9), Swin(**SMALL, drop_rate=0.0)
    variables = reference.init(model, x)
    expected = jax.jit(model.apply)(variables, x)["c3"]
    trained = jax.jit(lambda v, x: plain.apply(v, x, True))(variables, x)["c3"]
    np.testing.assert_allclose(trained, expected, atol=1e-5)
    dropped = jax.jit(lambda: model.apply(variables, x, True, rngs={"dropout": jax.random.key(1)}))()["c3"]
    assert not np.allclose(dropped, expected, atol=1e-2)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(2, 64, 96)
    full, half = Swin(**SMALL), Swin(**SMALL, dtype=jnp.bfloat16)
    variables = reference.init(half, x)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for key in expected:
        assert out[key].dtype == jnp.bfloat16
        assert 0 < reference.relative_error(out[key].astype(jnp.float32), expected[key]) < 0.1


def test_remat_changes_nothing_but_memory():
    x, rngs = images(2, 20, 20), {"dropout": jax.random.key(3)}
    block: dict[str, Any] = dict(width=8, depths=(2,), heads=(2,), window=3, out_norms=(), drop_rate=0.5)
    variables = reference.init(Swin(**block), x)

    def gradient(policy):
        model = Swin(**block, remat=policy)
        apply = jax.jit(model.apply, static_argnums=2)
        return jax.jit(jax.grad(lambda v: jnp.mean(apply(v, x, True, rngs=rngs)["c2"] ** 2)))(variables)

    expected = gradient("none")
    for policy in ("dots", "all"):
        reference.assert_trees_agree(gradient(policy), expected)


@pytest.mark.parametrize(
    "rule,expected", [("axis", ((3, 4), (0, 2))), ("both", ((3, 3), (0, 0))), ("always", ((4, 4), (2, 2)))]
)
def test_window_rules_differ_where_a_window_covers_a_side(rule, expected):
    assert window_and_shift(3, 9, 4, True, rule) == expected
    assert window_and_shift(8, 9, 4, True, rule) == ((4, 4), (2, 2))
    assert window_and_shift(8, 9, 4, False, rule) == ((4, 4), (0, 0))


def test_errors():
    x = images(1, 32, 32)
    with pytest.raises(UserError, match="3 heads do not divide the 32 channels of Swin stage 2"):
        reference.init(Swin(**{**TINY, "heads": (1, 3, 4, 8)}), x)
    with pytest.raises(UserError, match="window_rule='none' of the Swin is not one of axis, both, always"):
        reference.init(Swin(**TINY, window_rule="none"), x)
    with pytest.raises(UserError, match=r"\[6\], which are not levels"):
        reference.init(Swin(**TINY, out_norms=(5, 6)), x)
