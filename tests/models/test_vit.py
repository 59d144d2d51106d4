from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.vit import PRESETS, ViT
from ovseg_jax.pretrained import vit as formats
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require
from tests.models.published_tips import SIZES_OF_TIPS, published_tips

TINY: dict[str, Any] = dict(patch=8, width=32, depth=3, heads=2, mlp_dim=48, grid=(4, 4))
HF = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
TIMM = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=1.5, num_classes=0)
# So large that it matters; the presets' own are compared with the originals below.
EPSILON = 0.1
# The size of the table; others, not square, larger in one direction and smaller in the other.
SIZES = [(32, 32), (56, 24)]


def images(height, width, batch=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width, 3)), jnp.float32)


def pixels(x):
    return require("torch").from_numpy(np.array(x).transpose(0, 3, 1, 2))


def tiny(preset, **fields):
    """A small tower with the options of a published one."""
    return ViT(**PRESETS[preset] | TINY | fields)


def randomise(model, seed=0):
    """Fills a PyTorch model so that each parameter matters and tokens keep their scale."""
    torch = require("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            matrix = parameter.ndim > 1 and parameter.shape[0] > 1
            std = parameter[0].numel() ** -0.5 if matrix else 0.5
            parameter.normal_(0, std, generator=generator)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def arrays(model, prefix=""):
    return {prefix + name: value.numpy() for name, value in model.state_dict().items()}


def load(model, source, renames):
    """Strict in both directions: no name of the source is unknown, none of ours is missing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images(32, 32))
    return fit(rename(source, renames), shapes)


def check(label, variables, model, x, expected):
    """`expected` has the fields of TowerOutput as tensors; sequences become places."""
    out = jax.jit(model.apply)(variables, x)
    h, w = x.shape[1] // 8, x.shape[2] // 8
    ours = {"pooled": out.pooled, "tokens": out.tokens, **{f"tap {i}": v for i, v in out.taps.items()}}
    assert ours.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        value = value.detach().numpy()
        value = value if name == "pooled" else value.reshape(len(x), h, w, -1)
        errors[name] = reference.relative_error(ours[name], value)
    print(label, x.shape[1:3], f"max relative error {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-4, errors


def published(model, folder):
    """The names of a file as it stands on the hub, which transformers 5 renames when it reads one."""
    model.save_pretrained(folder)
    return require("safetensors.numpy").load_file(folder / "model.safetensors")


@pytest.mark.parametrize("preset", ["clip_vitb32", "openclip_vith14"])
@pytest.mark.parametrize("size", SIZES)
def test_clip_equals_hugging_face(preset, size):
    torch, transformers = require("torch"), require("transformers")
    act = {"clip_vitb32": "quick_gelu", "openclip_vith14": "gelu"}[preset]
    config = transformers.CLIPVisionConfig(**HF, projection_dim=16, hidden_act=act, layer_norm_eps=EPSILON)
    original = randomise(transformers.CLIPVisionModelWithProjection(config))
    model = tiny(preset, embed_dim=16, taps=(0, 2), epsilon=EPSILON)
    variables = load(model, arrays(original), formats.from_hf_clip(2))
    x = images(*size)
    with torch.no_grad():
        out = original(pixels(x), output_hidden_states=True, interpolate_pos_encoding=True)
        expected = {
            "pooled": out.image_embeds,
            "tokens": original.vision_model.post_layernorm(out.last_hidden_state[:, 1:]),
            "tap 0": out.hidden_states[1][:, 1:],
            "tap 2": out.hidden_states[3][:, 1:],
        }
    check(f"{preset}, transformers", variables, model, x, expected)


def test_both_halves_of_clip_are_known():
    transformers = require("transformers")
    text = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
        eos_token_id=2,
    )
    config = transformers.CLIPConfig(vision_config=HF, text_config=text, projection_dim=16)
    source = arrays(transformers.CLIPModel(config))
    source["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    source["text_model.embeddings.position_ids"] = np.arange(77)[None]
    variables = load(tiny("clip_vitb32", embed_dim=16), source, formats.from_hf_clip(2))
    expected = source["visual_projection.weight"]
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"].T, expected)


@pytest.mark.parametrize("size", SIZES)
def test_clip_equals_open_clip(size):
    torch, open_clip = require("torch"), require("open_clip")
    vision = dict(image_size=32, patch_size=8, width=32, layers=3, head_width=16, mlp_ratio=1.5)
    text = dict(context_length=7, vocab_size=9, width=32, heads=2, layers=1)
    original = randomise(open_clip.CLIP(16, vision, text, quick_gelu=True))
    source = arrays(original)
    # What OpenAI's traced models carry beside that.
    source |= {name: np.array(1) for name in ("input_resolution", "context_length", "vocab_size")}
    model = tiny("clip_vitb16", embed_dim=16, resize="antialias")
    variables = load(model, source, formats.from_openai_clip(2))
    state = {"visual.positional_embedding": original.visual.positional_embedding.detach().clone()}
    resized = open_clip.CLIP(16, vision | dict(image_size=size), text, quick_gelu=True).visual.eval()
    open_clip.model.resize_pos_embed(state, type("Model", (), dict(visual=resized)), antialias=True)
    weights = original.visual.state_dict() | {"positional_embedding": state["visual.positional_embedding"]}
    resized.load_state_dict(weights)
    resized.output_tokens = True
    with torch.no_grad():
        pooled, tokens = resized(pixels(images(*size)))
    expected = {"pooled": pooled, "tokens": tokens}
    check("clip_vitb16, open_clip", variables, model, images(*size), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names,resize", [("of the hub", "dino"), ("of transformers 5", "bicubic")])
def test_dino_equals_hugging_face(size, names, resize, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    original = randomise(transformers.ViTModel(transformers.ViTConfig(**HF, layer_norm_eps=EPSILON)))
    source = arrays(original) if names == "of transformers 5" else published(original, tmp_path)
    model = tiny("dino_vits8", resize=resize, taps=(1,), epsilon=EPSILON)
    variables = load(model, source, formats.from_hf_vit(2))
    if resize == "dino" and size != (32, 32):
        # What DINO's own vision_transformer.py puts in this place: sizes and a tenth, as factors.
        table = original.embeddings.position_embeddings
        factors = [(side // 8 + 0.1) / 4 for side in size]
        grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        table = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        original.embeddings.interpolate_pos_encoding = lambda *_: table
    with torch.no_grad():
        out = original(pixels(images(*size)), output_hidden_states=True, interpolate_pos_encoding=True)
    tokens = out.last_hidden_state
    expected = {"pooled": tokens[:, 0], "tokens": tokens[:, 1:], "tap 1": out.hidden_states[2][:, 1:]}
    check(f"dino_vits8, transformers, names {names}, {resize}", variables, model, images(*size), expected)


@pytest.mark.parametrize("size", SIZES)
def test_siglip_equals_hugging_face(size):
    torch, transformers = require("torch"), require("transformers")
    original = randomise(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF, layer_norm_eps=EPSILON))
    )
    model = tiny("siglip_vitb16", resize="bicubic", taps=(0,), epsilon=EPSILON)
    source = {f"vision_model.{name}": value for name, value in arrays(original).items()}
    source["text_model.head.weight"] = source["logit_bias"] = np.zeros(1)
    variables = load(model, source, formats.from_hf_siglip(2))
    with torch.no_grad():
        out = original(pixels(images(*size)), output_hidden_states=True, interpolate_pos_encoding=True)
    expected = {"pooled": out.pooler_output, "tokens": out.last_hidden_state, "tap 0": out.hidden_states[1]}
    check("siglip_vitb16, transformers", variables, model, images(*size), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options,fields",
    [
        (dict(), dict()),
        (dict(no_embed_class=True), dict(cls="plain")),
        (dict(global_pool="avg", fc_norm=False), dict(pool="mean")),
        (
            dict(global_pool="map", class_token=False, act_layer="gelu_tanh"),
            dict(pool="map", cls="none", activation="gelu_tanh"),
        ),
    ],
    ids=["mae", "plain class token", "mean", "map"],
)
def test_mae_and_others_equal_timm(size, options, fields):
    torch, timm = require("torch"), require("timm")
    kind = timm.models.vision_transformer.VisionTransformer
    original = randomise(kind(**TIMM, dynamic_img_size=True, **options))
    model = tiny("mae_vitb16", resize="antialias", taps=(0, 1), **fields)
    # As open_clip calls SigLIP's.
    source = arrays(original, "visual.trunk." if model.pool == "map" else "")
    # MAE's own files have a decoder, others a classifier.
    source |= {
        "decoder_blocks.0.norm1.weight": np.zeros(2),
        "mask_token": np.zeros(2),
        "head.bias": np.zeros(2),
    }
    variables = load(model, source, formats.from_timm_vit(2))
    with torch.no_grad():
        x = pixels(images(*size))
        tokens, taps = original.forward_intermediates(x, indices=[0, 1], output_fmt="NLC")
        pooled = original(x)
    prefix = original.num_prefix_tokens
    expected = {"pooled": pooled, "tokens": tokens[:, prefix:], "tap 0": taps[0], "tap 1": taps[1]}
    check(f"timm {options}", variables, model, images(*size), expected)


def test_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match=r"fc_norm\.weight"):
        rename({"fc_norm.weight": np.zeros(2)}, formats.from_timm_vit(2))


def number_of_parameters(preset):
    model = ViT(**PRESETS[preset])
    side = model.patch
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "preset,name",
    [
        ("dino_vits8", "vit_small_patch8_224"),
        ("dino_vits16", "vit_small_patch16_224"),
        ("dino_vitb8", "vit_base_patch8_224"),
        ("dino_vitb16", "vit_base_patch16_224"),
        ("mae_vitb16", "vit_base_patch16_224"),
        ("mae_vitl16", "vit_large_patch16_224"),
        ("mae_vith14", "vit_huge_patch14_224"),
        ("siglip_vitb16", "vit_base_patch16_siglip_224"),
        ("siglip_vitb16_256", "vit_base_patch16_siglip_256"),
        ("siglip_vitb16_384", "vit_base_patch16_siglip_384"),
        ("siglip_vitb16_512", "vit_base_patch16_siglip_512"),
        ("siglip_vitl16_256", "vit_large_patch16_siglip_256"),
        ("siglip_vitl16_384", "vit_large_patch16_siglip_384"),
        ("siglip_so400m14", "vit_so400m_patch14_siglip_224"),
        ("siglip_so400m14_384", "vit_so400m_patch14_siglip_384"),
    ],
)
def test_presets_are_as_large_as_timms(preset, name):
    torch, timm = require("torch"), require("timm")
    with torch.device("meta"):
        original = timm.create_model(name, num_classes=0)
    assert number_of_parameters(preset) == sum(p.numel() for p in original.parameters())
    model = ViT(**PRESETS[preset])
    assert model.heads == original.blocks[0].attn.num_heads
    assert model.grid == tuple(original.patch_embed.grid_size)
    assert model.epsilon == original.norm.eps


@pytest.mark.parametrize(
    "preset,name",
    [
        ("clip_vitb32", "ViT-B-32-quickgelu"),
        ("clip_vitb16", "ViT-B-16-quickgelu"),
        ("clip_vitl14", "ViT-L-14-quickgelu"),
        ("clip_vitl14_336", "ViT-L-14-336-quickgelu"),
        ("openclip_vitb32", "ViT-B-32"),
        ("openclip_vitb16", "ViT-B-16"),
        ("openclip_vitl14", "ViT-L-14"),
        ("openclip_vith14", "ViT-H-14"),
    ],
)
def test_presets_are_as_large_as_open_clips(preset, name):
    torch, open_clip = require("torch"), require("open_clip")
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        original = open_clip.CLIP(**config).visual
    assert number_of_parameters(preset) == sum(p.numel() for p in original.parameters())
    model = ViT(**PRESETS[preset])
    assert model.heads == original.transformer.resblocks[0].attn.num_heads
    assert model.grid == original.grid_size
    assert model.epsilon == original.ln_post.eps
    assert model.activation == ("quick_gelu" if config.get("quick_gelu") else "gelu")


@pytest.mark.parametrize("preset,name", [(name, name) for name in SIZES_OF_TIPS])
def test_presets_are_as_large_as_tips(preset, name):
    torch, transformers = require("torch"), require("transformers")
    config = published_tips(name).vision_config
    with torch.device("meta"):
        original = transformers.Tipsv2VisionModel(config)
    model = ViT(**PRESETS[preset])
    # Layer scale, the mask token and the position of the class token are not ours, see `pretrained.tips`.
    rest = (2 * model.depth + 2) * model.width
    assert number_of_parameters(preset) == sum(p.numel() for p in original.parameters()) - rest
    assert model.heads == config.num_attention_heads and model.epsilon == config.layer_norm_eps


def test_every_preset_is_compared():
    """The lists above, so that a new preset cannot be forgotten."""
    marks = [
        *test_presets_are_as_large_as_timms.pytestmark,
        *test_presets_are_as_large_as_open_clips.pytestmark,
        *test_presets_are_as_large_as_tips.pytestmark,
    ]
    assert {preset for mark in marks for preset, _ in mark.args[1]} == PRESETS.keys()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    x = images(32, 48)
    full, half = (tiny("siglip_vitb16", taps=(1,), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = reference.init(half, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    expected, out = jax.jit(full.apply)(variables, x), jax.jit(half.apply)(variables, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert 0 < reference.relative_error(a.astype(jnp.float32), b) < 0.05


def test_remat_changes_nothing_but_memory():
    x = images(16, 24)
    plain, *others = (
        tiny("clip_vitb16", depth=2, taps=(1,), remat=policy) for policy in ("none", "dots", "all")
    )
    variables = reference.init(plain, x)

    def loss(model, variables):
        out = model.apply(variables, x)
        return sum(jnp.mean(leaf**2) for leaf in (out.pooled, out.tokens, out.taps[1]))

    def kept(model):
        pullback = jax.eval_shape(lambda v: jax.vjp(lambda v: loss(model, v), v)[1], variables)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    gradient = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    expected, sizes = gradient(plain, variables), [kept(plain)]
    for model in others:
        sizes.append(kept(model))
        reference.assert_trees_agree(gradient(model, variables), expected)
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize(
    "fields,match",
    [
        (dict(cls="first"), "cls='first' of the ViT is not one of"),
        (dict(pool="max"), "pool='max' of the ViT is not one of"),
        (dict(activation="sigmoid"), "activation='sigmoid' of the ViT is not one of"),
        (dict(resize="nearest"), "resize='nearest' of a position table is not one of"),
        (dict(cls="none", pool="cls"), "pool='cls' of the ViT cannot be combined with cls='none'"),
        (dict(cls="placed", pool="map"), "pool='map' of the ViT cannot be combined with cls='placed'"),
        (dict(heads=3), "width 32 is not a multiple of its 3 heads"),
        (dict(taps=(1, 3)), r"taps=\[3\] do not exist in the ViT, which has blocks 0 to 2"),
        (dict(remat="some"), "remat='some' is not one of"),
    ],
)
def test_fields_that_do_not_fit(fields, match):
    with pytest.raises(UserError, match=match):
        jax.eval_shape(ViT(**TINY | fields).init, jax.random.key(0), images(32, 32))


@pytest.mark.parametrize("size", [(30, 32), (32, 36)])
def test_sides_that_are_no_multiples_of_the_patch(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels cannot be cut into patches of 8 x 8"):
        jax.eval_shape(ViT(**TINY).init, jax.random.key(0), images(*size))
