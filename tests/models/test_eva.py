import copy
import functools
import re
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.convpass import Convpass, with_convpass
from ovseg_jax.models.eva import PRESETS, Eva, rotary_table
from ovseg_jax.models.text_towers import text_tower
from ovseg_jax.models.token_clusters import TokenClusters
from ovseg_jax.models.transformer import rotate
from ovseg_jax.parallel.sharding import batch_sharding, leaf_sharding, make_mesh, path_name
from ovseg_jax.pretrained.eva import from_eva_clip, from_timm_eva
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require
from tests.reference import images

HEADS, PATCH, GRID = 2, 8, 4
TINY: dict = dict(
    patch=PATCH, grid=GRID, width=32, depth=3, heads=HEADS, hidden=85, embed_dim=24, taps=(0, 2)
)
TINY_TIMM = dict(
    img_size=PATCH * GRID, patch_size=PATCH, embed_dim=32, depth=3, num_heads=HEADS, mlp_ratio=85 / 32,
    num_classes=24, global_pool="token",
)  # fmt: skip
ROTARY = dict(use_rot_pos_emb=True, ref_feat_shape=(3, 3))

# Options of the published models, by kind: ours and timm's. EVA-02 before CLIP has no norm inside attention.
KINDS: dict[str, tuple[dict, dict]] = {
    "eva02": (
        dict(rope_grid=3, swiglu=True, attn_norm=True, mlp_norm=True),
        dict(ROTARY, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False),
    ),
    "eva02_mim": (
        dict(rope_grid=3, swiglu=True, mlp_norm=True),
        dict(ROTARY, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    ),
    "e14": (dict(post_norm=True), dict(use_post_norm=True)),
    "g14": (dict(), dict()),
}
TIMM = {
    "eva02_clip_b16": "eva02_base_patch16_clip_224",
    "eva02_clip_l14": "eva02_large_patch14_clip_224",
    "eva02_clip_l14_336": "eva02_large_patch14_clip_336",
    "eva02_clip_e14": "eva02_enormous_patch14_clip_224",
    "eva01_clip_g14": "eva_giant_patch14_clip_224",
}
OPEN_CLIP = {
    "eva02_clip_b16": "EVA02-B-16",
    "eva02_clip_l14": "EVA02-L-14",
    "eva02_clip_l14_336": "EVA02-L-14-336",
    "eva02_clip_e14": "EVA02-E-14",
    "eva01_clip_g14": "EVA01-g-14",
}


@functools.cache
def original(kind):
    """timm's model with every parameter drawn so that it matters."""
    torch, timm = require("torch"), require("timm")
    model = timm.models.eva.Eva(**TINY_TIMM, **KINDS[kind][1])
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith("weight"):
            p.data.uniform_(0.5, 1.5, generator=generator)
        elif p.ndim == 1:
            p.data.normal_(0, 0.3, generator=generator)
        else:
            # Attention must be far from uniform, or positions would hardly matter.
            gain = 2 if re.search("q_proj|k_proj|qkv", name) and kind != "e14" else 1
            std = gain * p[0].numel() ** -0.5 if name.endswith("weight") else 1
            # Into a first norm so small that its epsilon shows.
            std *= 0.05 if re.match("patch_embed|cls|pos", name) and kind != "e14" else 1
            p.data.normal_(0, std, generator=generator)
    return model.eval()


def state(model):
    return {name: p.detach().numpy() for name, p in model.state_dict().items()}


def shapes(model, size=PATCH * GRID):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def at_size(model, height, width):
    """A copy for another size, whose positions PyTorch interpolates as BAAI did; timm itself would blur them."""
    torch = require("torch")
    model = copy.deepcopy(model)
    table = model.pos_embed
    rows, columns = height // PATCH, width // PATCH
    model.set_input_size((height, width))
    patches = table[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        patches, size=(rows, columns), mode="bicubic", align_corners=False
    )
    model.pos_embed.data = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    return model


def run(kind, height, width):
    """timm's pooled, tokens and taps for two images, in our layout, and the images."""
    torch = require("torch")
    x = images(2, height, width)
    grid = (2, height // PATCH, width // PATCH, -1)
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(x).transpose(0, 3, 1, 2))
        model = at_size(original(kind), height, width)
        last, taps = model.forward_intermediates(pixels, indices=TINY["taps"], output_fmt="NLC")
        pooled = model.forward_head(last)
    taps = dict(zip(TINY["taps"], (t.numpy().reshape(grid) for t in taps), strict=True))
    return x, pooled.numpy(), last[:, 1:].numpy().reshape(grid), taps


@pytest.mark.parametrize("size", [(32, 32), (24, 56), (72, 48)])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_timm(kind, size):
    x, pooled, tokens, taps = run(kind, *size)
    model = Eva(**TINY, **KINDS[kind][0])
    variables = fit(rename(state(original(kind)), from_timm_eva(HEADS)), shapes(model))
    out = jax.jit(model.apply)(variables, x)
    pairs = {"pooled": (out.pooled, pooled), "tokens": (out.tokens, tokens)}
    assert out.taps.keys() == taps.keys()
    for i, value in taps.items():
        pairs[f"tap {i}"] = (out.taps[i], value)
    for name, (ours, theirs) in pairs.items():
        error = reference.relative_error(ours, theirs)
        print(f"{kind} {size} {name} max relative error {error:.1e}")
        assert error < 1e-4


def baai_names(source, kind):
    """timm's names as BAAI's; what timm's own reader makes of them is checked below."""
    changes = [
        (r"attn\.norm\.", "attn.inner_attn_ln."),
        (r"mlp\.norm\.", "mlp.ffn_ln."),
        (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
        (r"mlp\.fc1_g\.", "mlp.w1."),
        (r"mlp\.fc1_x\.", "mlp.w2."),
    ]
    if KINDS[kind][0].get("swiglu"):
        changes.append((r"mlp\.fc2\.", "mlp.w3."))
    out = {}
    for name, array in source.items():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        out[f"visual.{name}"] = array
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_baai_names(kind):
    torch, timm = require("torch"), require("timm")
    source = state(original(kind))
    named = baai_names(source, kind)
    read = timm.models.eva.checkpoint_filter_fn(
        {name: torch.from_numpy(array) for name, array in named.items()}, original(kind)
    )
    assert read.keys() == source.keys() and all(np.array_equal(read[k], source[k]) for k in source)

    table = np.zeros((GRID**2, 16), np.float32)
    around = {
        "visual.rope.freqs_cos": table,
        "visual.blocks.0.attn.rope.freqs_sin": table,
        "text.transformer.resblocks.0.ln_1.weight": np.ones(8),
        "transformer.resblocks.0.ln_1.weight": np.ones(8),
        "token_embedding.weight": np.ones((4, 8)),
        "positional_embedding": np.ones((4, 8)),
        "ln_final.bias": np.ones(8),
        "text_projection": np.ones((8, 8)),
        "logit_scale": np.ones(()),
    }
    expected = rename(source, from_timm_eva(HEADS))
    bare = {name.removeprefix("visual."): array for name, array in named.items()}
    for checkpoint in (named | around, bare):
        arrays = rename(checkpoint, from_eva_clip(HEADS))
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[k], expected[k]) for k in expected)
        fit(arrays, shapes(Eva(**TINY, **KINDS[kind][0])))


def test_names_inside_open_clip_and_unknown_ones():
    source = {f"visual.trunk.{name}": array for name, array in state(original("eva02")).items()}
    source |= {"text.ln_final.weight": np.ones(8), "logit_scale": np.ones(())}
    fit(rename(source, from_timm_eva(HEADS)), shapes(Eva(**TINY, **KINDS["eva02"][0])))
    with pytest.raises(UserError, match=r"blocks\.0\.gamma_1"):
        rename({**source, "visual.trunk.blocks.0.gamma_1": np.ones(32)}, from_timm_eva(HEADS))


@pytest.mark.parametrize("name", PRESETS)
def test_published_shapes(name):
    torch, timm, open_clip = require("torch"), require("timm"), require("open_clip")
    preset, config = PRESETS[name], open_clip.get_model_config(OPEN_CLIP[name])
    with torch.device("meta"):
        published = timm.create_model(TIMM[name], num_classes=config["embed_dim"])
    ours = flax.traverse_util.flatten_dict(shapes(Eva(**preset), preset["patch"] * preset["grid"]), sep="/")
    count = sum(int(np.prod(x.shape)) for x in ours.values())
    print(f"{name}: {count:,} parameters")
    assert count == sum(p.numel() for p in published.parameters())
    # What a count does not show.
    block = published.blocks[0]
    assert preset["heads"] == block.attn.num_heads
    assert published.patch_embed.grid_size == (preset["grid"],) * 2
    assert published.patch_embed.patch_size == (preset["patch"],) * 2
    assert preset["patch"] * preset["grid"] == config["vision_cfg"]["image_size"]
    rope = published.rope.ref_feat_shape if published.rope else None
    assert rope == ((preset["rope_grid"],) * 2 if "rope_grid" in preset else None)
    assert preset.get("post_norm", False) == (type(block).__name__ == "EvaBlockPostNorm")
    assert preset.get("swiglu", False) == hasattr(block.mlp, "fc1_g")
    assert ours["params/blocks_0/mlp/fc2/kernel"].shape == block.mlp.fc2.weight.shape[::-1]
    assert ours["params/head/kernel"].shape == (preset["width"], config["embed_dim"])


@pytest.mark.parametrize(
    "name, image, text",
    [
        ("eva02_clip_b16", "86M", "63M"),
        ("eva02_clip_l14", "304M", "124M"),
        ("eva02_clip_l14_336", "304M", "124M"),
        ("eva01_clip_g14", "1.0B", "124M"),
        ("eva02_clip_e14", "4.4B", "354M"),
    ],
)
def test_parameters_of_umg_clip(name, image, text):
    """papers/003, Table 6."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    rounded = lambda n: f"{n / 1e6:.0f}M" if n < 5e8 else f"{n / 1e9:.1f}B"
    tower = Eva(**PRESETS[name])
    assert rounded(count(shapes(tower, tower.patch * tower.grid))) == image
    texts = jax.eval_shape(text_tower(name).init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    assert rounded(count(texts)) == text


def test_rotary_positions_are_relative_and_keep_their_range():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=16), jnp.float32) for _ in range(2))
    table = rotary_table(4, 4, 4, 16)

    def everywhere(vector):
        return rotate(jnp.broadcast_to(vector, (1, 17, 1, 16)), table)[0, :, 0]

    queries, keys = everywhere(query), everywhere(key)
    np.testing.assert_array_equal(queries[0], query)
    scores = (queries[1:] @ keys[1:].T).reshape(4, 4, 4, 4)
    # Two places down and one to the right, from anywhere; not the same as one down and two to the right.
    same = [scores[y, x, y + 2, x + 1] for y in range(2) for x in range(3)]
    np.testing.assert_allclose(same, same[0], rtol=1e-4)
    assert abs(scores[0, 0, 1, 2] - same[0]) > 1e-2
    # Twice as fine a grid has the same places, and others between.
    fine = rotary_table(8, 8, 4, 16)[:, 1:].reshape(2, 8, 8, 16)
    np.testing.assert_allclose(fine[:, ::2, ::2].reshape(2, 16, 16), table[:, 1:], atol=1e-6)


def variables_of(model):
    """Drawn without PyTorch; the tables, which have no kernel, too."""
    variables = reference.init(model, images(1, 32, 32))
    rng = np.random.default_rng(1)
    for name in ("cls", "pos_embedding"):
        table = variables["params"][name]
        variables["params"][name] = rng.normal(size=table.shape).astype(table.dtype)
    return variables


@pytest.mark.parametrize("kind", ["eva02", "e14"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind):
    x = images(2, 32, 48)
    full, half = (Eva(**TINY, **KINDS[kind][0], dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = variables_of(half)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    for ours, theirs in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert 0 < reference.relative_error(ours.astype(jnp.float32), theirs) < 0.05


@pytest.mark.parametrize("policy", ["dots", "all"])
def test_remat_changes_nothing_but_memory(policy):
    x = images(2, 32, 16)
    plain = Eva(**{**TINY, "depth": 2, "taps": ()}, **KINDS["eva02"][0])
    remat = plain.clone(remat=policy)
    variables = variables_of(plain)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda v: v.shape, shapes(remat))

    def gradient(model):
        def loss(params):
            out = model.apply({"params": params}, x, True)
            return jnp.mean(out.pooled**2) + jnp.mean(out.tokens**3)

        return jax.jit(jax.grad(loss))(variables["params"])

    reference.assert_trees_agree(gradient(remat), gradient(plain))


@pytest.mark.parametrize(
    ("kind", "remat", "own"),
    [
        ("eva02", "all", dict(between=TokenClusters(1, 0.5))),
        ("e14", "none", dict(last="value")),
        ("eva02", "all", dict(adapter=partial(Convpass, width=4), adapter_scale=0.5)),
    ],
)
def test_a_loop_changes_nothing_but_the_program(kind, remat, own):
    plain = Eva(**{**TINY, "depth": 4, "taps": ()}, **KINDS[kind][0], **own)
    looped = plain.clone(scan=1, remat=remat)
    x, variables = images(2, 32, 16), variables_of(plain)
    assert shapes(looped) == shapes(plain)

    def gradient(model):
        def loss(params):
            out = model.apply({"params": params}, x, True)
            return jnp.mean(out.pooled**2) + jnp.mean(out.tokens**3)

        traced = jax.jit(jax.grad(loss)).trace(variables["params"])
        return traced, "scan[" in str(traced.jaxpr)

    (found, scans), (expected, unrolled) = gradient(looped), gradient(plain)
    assert scans and not unrolled and not gradient(looped.clone(taps=(2,)))[1]
    found, expected = (each.lower().compile()(variables["params"]) for each in (found, expected))
    reference.assert_trees_agree(found, expected)


def test_dropout_of_adapters_in_a_loop_is_drawn_from_the_key():
    model = Eva(**{**TINY, "depth": 3, "taps": ()}, **KINDS["eva02"][0], scan=0)
    looped = with_convpass(model, width=4, dropout=0.5, scale=1.0, train=True)
    x, variables = images(2, 32, 16), variables_of(looped)
    apply = jax.jit(lambda variables, key: looped.apply(variables, x, rngs={"dropout": key}).tokens)
    run = lambda seed: apply(variables, jax.random.key(seed))
    one, again, other = run(0), run(0), run(1)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_a_loop_gathers_the_weights_of_a_block_and_never_the_batch():
    """Without its constraints the compiled loop has all-gathers of f32[64,17,32]."""
    mesh = make_mesh({"fsdp": 8})
    model = Eva(**{**TINY, "depth": 5, "hidden": 64, "taps": ()}, scan=1, remat="all")
    x = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32, sharding=batch_sharding(mesh))
    place = lambda path, w: leaf_sharding(path_name(path), w.shape, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    placed = jax.tree_util.tree_map_with_path(place, params)
    params = jax.tree.map(lambda w, p: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=p), params, placed)
    with jax.set_mesh(mesh):
        loss = lambda params, x: jnp.mean(model.apply({"params": params}, x).pooled ** 2)
        compiled = jax.jit(jax.grad(loss), out_shardings=placed).lower(params, x).compile()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather", compiled.as_text()))
    assert {"32,64", "64,32"} <= gathered and not any(shape.startswith("64,17") for shape in gathered)


@pytest.mark.parametrize(
    "change,size,words",
    [
        (dict(), (32, 36), "32 x 36 pixels.*multiples of 8"),
        (dict(taps=(1, 3, -1)), (32, 32), r"taps=\[3, -1\] do not exist in EVA, which has blocks 0 to 2"),
        (dict(width=36), (32, 32), "width 36.*2 heads"),
        (dict(remat="some"), (32, 32), "'some'"),
    ],
)
def test_mistakes(change, size, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(Eva(**{**TINY, **change}).init, jax.random.key(0), images(1, *size))
