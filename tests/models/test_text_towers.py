from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.text_towers import PRESETS, Bert, CLIPText, SiglipText, TipsText, text_tower
from ovseg_jax.pretrained import text as names
from ovseg_jax.pretrained.rename import fit, rename
from tests import reference
from tests.extras import require
from tests.models.published_tips import published_tips

HEADS = 2
SIZES: dict[str, Any] = dict(vocab_size=60, width=32, layers=2, heads=HEADS)
HF_SIZES: dict[str, Any] = dict(
    vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=128
)
END = 59


def clip_ids(batch, length, seed=0):
    """Texts of several lengths, the longest without padding; padded with a token that also stands within them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, END, (batch, length))
    for row in range(1, batch):
        end = rng.integers(1, length)
        ids[row, end:] = 0
        ids[row, end] = END
    ids[0, -1] = END
    return ids


def fill(model, seed=0):
    """Draws each parameter so that it matters: of norms too, of tables and of biases."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "embed" in name and parameter.ndim > 1:
            # As small as published ones, so that the first norm's epsilon matters.
            parameter.data.normal_(0, 0.005, generator=generator)
        elif parameter.ndim > 1:
            parameter.data.normal_(0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.data.normal_(0, 0.5, generator=generator)
            if "norm" in name.lower() or "ln_" in name:
                parameter.data += name.endswith("weight")
    return model.eval()


def arrays(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def load(module, renames, source, length=4):
    ids = jnp.zeros((1, length), jnp.int32)
    return fit(rename(source, renames), jax.eval_shape(module.init, jax.random.key(0), ids))


def check(label, module, variables, ids, valid, expected):
    """Compares pooled and tokens; of tokens, only those that are valid."""
    out = jax.jit(module.apply)(variables, jnp.asarray(ids, jnp.int32), valid)
    for part, value in expected.items():
        ours, theirs = np.asarray(getattr(out, part)), value.detach().numpy()
        if part == "tokens" and valid is not None:
            ours, theirs = ours[np.asarray(valid)], theirs[np.asarray(valid)]
        error = reference.relative_error(ours, theirs)
        print(f"{label} {ids.shape} {part} max relative error {error:.1e}")
        assert error < 1e-4


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("length", [11, 6])
def test_clip_equals_hugging_face(activation, length):
    torch, transformers = require("torch"), require("transformers")
    config = transformers.CLIPTextConfig(
        **HF_SIZES,
        max_position_embeddings=11,
        projection_dim=24,
        hidden_act=activation,
        bos_token_id=1,
        eos_token_id=END,
    )
    original = fill(transformers.CLIPTextModelWithProjection(config))
    module = CLIPText(**SIZES, length=11, embed_dim=24, activation=activation)
    variables = load(module, names.from_hf_clip_text(HEADS), arrays(original))
    ids = clip_ids(4, length)
    expected = original(torch.from_numpy(ids))
    expected = {"pooled": expected.text_embeds, "tokens": expected.last_hidden_state}
    check(f"CLIP {activation}", module, variables, ids, None, expected)


def test_clip_names_of_the_whole_model():
    require("torch")
    transformers = require("transformers")
    vision = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32
    )
    text = HF_SIZES | dict(max_position_embeddings=11, bos_token_id=1, eos_token_id=END)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    source = arrays(transformers.CLIPModel(config))
    source["text_model.embeddings.position_ids"] = np.arange(11)[None]  # Checkpoints of before 2023 have it.
    variables = load(CLIPText(**SIZES, length=11, embed_dim=24), names.from_hf_clip_text(HEADS), source)
    kernel = source["text_model.encoder.layers.1.self_attn.k_proj.weight"]
    ours = variables["params"]["Encoder_0"]["encoderblock_1"]["MultiHeadDotProductAttention_0"]["key"][
        "kernel"
    ]
    np.testing.assert_array_equal(ours[:, 1], kernel[16:].T)


def openai_source(activation, custom_text):
    """The state dict of a small open_clip model, whose names are OpenAI's, or EVA-CLIP's with `custom_text`."""
    open_clip = require("open_clip")
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    text = dict(context_length=11, vocab_size=60, width=32, heads=HEADS, layers=2)
    vision = dict(image_size=32, patch_size=16, width=64, layers=1)
    return fill(kind(24, vision, text, quick_gelu=activation == "quick_gelu"))


@pytest.mark.parametrize("activation,custom_text", [("quick_gelu", False), ("gelu", True)])
def test_clip_equals_open_clip(activation, custom_text):
    torch = require("torch")
    original = openai_source(activation, custom_text)
    source = arrays(original)
    if not custom_text:
        # OpenAI's archives are half precision and hold these too.
        source = {k: v.astype(np.float16).astype(np.float32) for k, v in source.items()}
        original.load_state_dict({k: torch.from_numpy(v) for k, v in source.items()})
        source = {k: v.astype(np.float16) for k, v in source.items()}
        source |= {k: np.array(1) for k in ("input_resolution", "context_length", "vocab_size")}
    module = CLIPText(**SIZES, length=11, embed_dim=24, activation=activation)
    variables = load(module, names.from_openai_clip_text(HEADS), source)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(variables))
    for length in (11,) if not custom_text else (11, 7):
        ids = clip_ids(4, length)
        # A shorter text is cut out of a padded one: behind the end nothing matters.
        padded = np.pad(ids, ((0, 0), (0, 11 - length)))
        expected = {"pooled": original.encode_text(torch.from_numpy(padded))}
        check(f"open_clip {activation}", module, variables, ids, None, expected)


def test_siglip_equals_open_clip():
    torch, open_clip = require("torch"), require("open_clip")
    text = dict(
        context_length=9,
        vocab_size=60,
        width=32,
        heads=HEADS,
        layers=2,
        mlp_ratio=3.7362,
        no_causal_mask=True,
        proj_bias=True,
        pool_type="last",
        norm_kwargs=dict(eps=1e-6),
        act_kwargs=dict(approximate="tanh"),
    )
    vision = dict(image_size=32, patch_size=16, width=64, layers=1)
    original = fill(open_clip.CustomTextCLIP(24, vision, text, init_logit_bias=-10.0))
    module = SiglipText(**SIZES, length=9, embed_dim=24, mlp_dim=int(32 * 3.7362))
    variables = load(module, names.from_openai_clip_text(HEADS), arrays(original))
    ids = np.random.default_rng(0).integers(0, 60, (3, 9))
    expected = {"pooled": original.encode_text(torch.from_numpy(ids))}
    check("SigLIP in open_clip", module, variables, ids, None, expected)


@pytest.mark.parametrize("whole,length", [(False, 9), (True, 9), (False, 5)])
def test_siglip_equals_hugging_face(whole, length):
    torch, transformers = require("torch"), require("transformers")
    text = HF_SIZES | dict(
        max_position_embeddings=9, projection_size=24, intermediate_size=100, bos_token_id=1, eos_token_id=1
    )
    if whole:
        vision = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        original = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text, vision_config=vision | dict(image_size=32))
        )
        source, original = arrays(fill(original)), original.text_model
    else:
        original = fill(transformers.SiglipTextModel(transformers.SiglipTextConfig(**text)))
        source = arrays(original)
    module = SiglipText(**SIZES, length=9, embed_dim=24, mlp_dim=100)
    variables = load(module, names.from_hf_siglip_text(HEADS), source)
    ids = np.random.default_rng(0).integers(0, 60, (3, length))
    expected = original(torch.from_numpy(ids))
    expected = {"pooled": expected.pooler_output, "tokens": expected.last_hidden_state}
    check("SigLIP", module, variables, ids, None, expected)


@pytest.mark.parametrize("pool", ["cls", "pooler", "mean"])
@pytest.mark.parametrize("length", [12, 7])
def test_bert_equals_hugging_face(pool, length):
    torch, transformers = require("torch"), require("transformers")
    config = transformers.BertConfig(**HF_SIZES, max_position_embeddings=12)
    original = fill(transformers.BertModel(config))
    module = Bert(**SIZES, length=12, pool=pool)
    variables = load(module, names.from_hf_bert(HEADS, pooler=pool == "pooler"), arrays(original))
    ids = np.random.default_rng(0).integers(0, 60, (3, length))
    valid = np.arange(length) < np.array([[length], [3], [length - 1]])
    expected = original(torch.from_numpy(ids), torch.from_numpy(valid))
    tokens = expected.last_hidden_state
    weights = torch.from_numpy(valid)[..., None]
    pooled = {
        "cls": tokens[:, 0],
        "pooler": expected.pooler_output,
        "mean": (tokens * weights).sum(1) / weights.sum(1),
    }
    expected = {"pooled": pooled[pool], "tokens": tokens}
    check(f"BERT {pool}", module, variables, ids, jnp.asarray(valid), expected)


def test_bert_names_of_a_pretraining_checkpoint():
    """bert-base-uncased as it is published: `bert.`, gamma and beta, heads of pretraining, position_ids."""
    require("torch")
    transformers = require("transformers")
    config = transformers.BertConfig(**HF_SIZES, max_position_embeddings=12)
    plain = fill(transformers.BertForPreTraining(config))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    source = {}
    for name, value in arrays(plain).items():
        for new, former in old.items():
            name = name.replace(new, former)
        source[name] = value
    assert any("gamma" in name for name in source)
    source["bert.embeddings.position_ids"] = np.arange(12)[None]
    module = Bert(**SIZES, length=12, pool="pooler")
    variables = load(module, names.from_hf_bert(HEADS, pooler=True), source)
    expected = load(module, names.from_hf_bert(HEADS, pooler=True), arrays(plain.bert))
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def published_count(name):
    """Parameters of the reference's text tower of the published shape, never allocated."""
    import torch

    transformers = require("transformers")
    with torch.device("meta"):
        if name.startswith("tipsv2"):
            model = transformers.Tipsv2TextModel(published_tips(name).text_config)
        elif name.startswith("bert"):
            large = dict(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            )
            model = transformers.BertModel(transformers.BertConfig(**(large if name == "bert_large" else {})))
        else:
            open_clip = require("open_clip")
            config = open_clip.get_model_config(OPEN_CLIP[name])
            vision = dict(image_size=32, patch_size=16, width=64, layers=1)
            whole = open_clip.CustomTextCLIP(config["embed_dim"], vision, config["text_cfg"])
            model = whole.text
    return sum(p.numel() for p in model.parameters())


OPEN_CLIP = {
    "clip_vitb32": "ViT-B-32",
    "clip_vitb16": "ViT-B-16",
    "clip_vitl14": "ViT-L-14",
    "clip_vitl14_336": "ViT-L-14-336",
    "clip_rn50": "RN50",
    "clip_rn101": "RN101",
    "clip_rn50x4": "RN50x4",
    "clip_rn50x16": "RN50x16",
    "clip_rn50x64": "RN50x64",
    "openclip_vitb16": "ViT-B-16",
    "openclip_vitl14": "ViT-L-14",
    "openclip_vith14": "ViT-H-14",
    "eva01_clip_g14": "EVA01-g-14",
    "eva02_clip_b16": "EVA02-B-16",
    "eva02_clip_l14": "EVA02-L-14",
    "eva02_clip_l14_336": "EVA02-L-14-336",
    "eva02_clip_e14": "EVA02-E-14",
    "eva02_clip_e14_plus": "EVA02-E-14-plus",
    "clip_convnext_base": "convnext_base",
    "clip_convnext_base_w": "convnext_base_w",
    "clip_convnext_base_w_320": "convnext_base_w_320",
    "clip_convnext_large_d": "convnext_large_d",
    "clip_convnext_large_d_320": "convnext_large_d_320",
    "clip_convnext_xxlarge": "convnext_xxlarge",
    "siglip_base": "ViT-B-16-SigLIP",
    "siglip_large": "ViT-L-16-SigLIP-256",
    "siglip_so400m": "ViT-SO400M-14-SigLIP-384",
    "siglip_so400m_224": "ViT-SO400M-14-SigLIP",
    "siglip2_base": "ViT-B-16-SigLIP2",
    "siglip2_large": "ViT-L-16-SigLIP2-256",
    "siglip2_so400m": "ViT-SO400M-14-SigLIP2",
    "siglip2_giant": "ViT-gopt-16-SigLIP2-256",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_number_of_parameters(name):
    require("torch")
    # Of our BERT, the pooler is a choice; the published one has it.
    tower = text_tower(name, pool="pooler") if name.startswith("bert") else text_tower(name)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == published_count(name)


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_presets_have_the_published_heads_and_activation(name):
    """What no count of parameters can tell."""
    open_clip = require("open_clip")
    config = open_clip.get_model_config(OPEN_CLIP[name])
    tower = text_tower(name)
    assert tower.heads == config["text_cfg"]["heads"]
    assert tower.length == config["text_cfg"]["context_length"]
    if name.startswith(("clip_vit", "clip_rn")):
        # OpenAI's weights are published there under names of their own.
        assert open_clip.get_model_config(f"{OPEN_CLIP[name]}-quickgelu")["quick_gelu"]
        assert tower.activation == "quick_gelu"
    elif isinstance(tower, CLIPText):
        assert not config.get("quick_gelu") and tower.activation == "gelu"


def tiny(kind, **fields):
    return kind(**(SIZES | fields))


TOWERS = [CLIPText, SiglipText, TipsText, Bert]


def variables_of(module, length=6):
    variables = reference.init(module, jnp.zeros((1, length), jnp.int32))
    rng = np.random.default_rng(1)
    draw = lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype)
    return jax.tree.map(draw, variables)


@pytest.mark.parametrize("kind", TOWERS)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(kind):
    full, half = tiny(kind), tiny(kind, dtype=jnp.bfloat16)
    ids = jnp.asarray(clip_ids(3, 6), jnp.int32)
    shapes = jax.eval_shape(half.init, jax.random.key(0), ids)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))
    variables = variables_of(full)
    expected, out = jax.jit(full.apply)(variables, ids), jax.jit(half.apply)(variables, ids)
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert 0 < reference.relative_error(ours.astype(jnp.float32), theirs) < 0.05


@pytest.mark.parametrize(
    "kind,policy", [(CLIPText, "dots"), (CLIPText, "all"), (SiglipText, "all"), (Bert, "dots")]
)
def test_remat_changes_nothing_but_memory(kind, policy):
    plain, remat = tiny(kind, layers=1), tiny(kind, layers=1, remat=policy)
    ids = jnp.asarray(clip_ids(3, 6), jnp.int32)
    valid = jnp.arange(6) < jnp.array([[6], [3], [4]])
    variables = variables_of(plain)
    shapes = jax.eval_shape(remat.init, jax.random.key(0), ids)
    assert str(jax.tree.structure(variables)) == str(jax.tree.structure(shapes))

    def gradient(module):
        loss = lambda v: jnp.sum(jnp.sin(module.apply(v, ids, valid).pooled))
        text = str(jax.make_jaxpr(jax.grad(loss))(variables))
        return jax.jit(jax.grad(loss))(variables), text

    (grads, text), (expected, plain_text) = gradient(remat), gradient(plain)
    reference.assert_trees_agree(grads, expected)
    assert "remat" in text and "remat" not in plain_text


@pytest.mark.parametrize(("kind", "policy"), [(CLIPText, "all"), (SiglipText, "none"), (Bert, "none")])
def test_a_loop_over_the_blocks_of_a_text_tower_changes_nothing(kind, policy):
    plain, looped = tiny(kind, layers=3), tiny(kind, layers=3, scan=True, remat=policy)
    ids = jnp.asarray(clip_ids(3, 6), jnp.int32)
    valid = jnp.arange(6) < jnp.array([[6], [3], [4]])
    variables = variables_of(plain)
    gradient = lambda module: jax.jit(
        jax.grad(lambda v: jnp.sum(jnp.sin(module.apply(v, ids, valid).pooled)))
    )
    reference.assert_trees_agree(gradient(looped)(variables), gradient(plain)(variables))
    program = lambda module: str(gradient(module).trace(variables).jaxpr)
    assert "scan[" in program(looped) and "scan[" not in program(plain)
    doubled = dict(between=lambda i, x: 2 * x)
    assert "scan[" not in program(looped.clone(**doubled))


def test_what_stands_behind_the_end_changes_nothing():
    module = tiny(CLIPText, layers=1)
    variables = variables_of(module)
    apply = jax.jit(module.apply)
    ids = jnp.array([[3, 7, END, 1, 2, 5], [3, 7, END, END, 0, 9]])
    pooled = apply(variables, ids).pooled
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-6)
    other = apply(variables, ids.at[0, 1].set(8)).pooled
    assert np.abs(other[0] - pooled[0]).max() > 1e-3


def test_bert_does_not_see_padding():
    module = tiny(Bert, pool="mean", layers=1)
    variables = variables_of(module)
    apply = jax.jit(module.apply)
    ids = jnp.array([[3, 7, 9, 1, 2, 5], [3, 7, 9, 8, 8, 8]])
    valid = jnp.broadcast_to(jnp.arange(6) < 3, (2, 6))
    pooled = apply(variables, ids, valid).pooled
    np.testing.assert_allclose(pooled[0], pooled[1], atol=1e-6)
    unmasked = apply(variables, ids).pooled
    assert np.abs(unmasked[0] - unmasked[1]).max() > 1e-3


def test_embeddings_in_place_of_ids():
    """Token vectors give what their ids give, wherever the end is known from; learned ones have a gradient."""
    module = tiny(CLIPText, layers=1)
    variables = variables_of(module)
    apply = jax.jit(module.apply, static_argnames="method")
    ids = jnp.asarray(clip_ids(4, 6), jnp.int32)
    valid = jnp.arange(6) <= jnp.argmax(ids, -1)[:, None]
    expected = apply(variables, ids)
    vectors = apply(variables, ids, method="embed")
    for given in (ids, None):
        # Where both are given, the ids only say where the end is.
        out = apply(variables, given, valid, vectors)
        np.testing.assert_allclose(out.pooled, expected.pooled, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, None, valid, x).pooled.sum()))(vectors)
    moved = jnp.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(moved, valid)


def test_mistakes():
    ids = jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(UserError, match="'clip_vit'"):
        text_tower("clip_vit")
    with pytest.raises(UserError, match=r"5 tokens.* 4"):
        reference.init(tiny(CLIPText, length=4), ids)
    with pytest.raises(UserError, match=r"3 heads.* 32"):
        reference.init(tiny(CLIPText, heads=3), ids)
    with pytest.raises(UserError, match="'selu'"):
        reference.init(tiny(CLIPText, activation="selu"), ids)
    with pytest.raises(UserError, match="'max'"):
        reference.init(tiny(Bert, pool="max"), ids)
    for embeddings in (None, jnp.zeros((1, 5, 32))):
        with pytest.raises(UserError, match="ids"):
            reference.init(tiny(CLIPText), None, None, embeddings)
    with pytest.raises(UserError, match="does not have"):
        rename({"text_model.surprise": np.zeros(1)}, names.from_hf_clip_text(HEADS))


def test_a_checkpoint_of_another_shape_is_refused():
    module = tiny(CLIPText, length=6)
    flat = {"params/pos_embedding": np.zeros((1, 7, 32), np.float32)}
    with pytest.raises(UserError, match="pos_embedding"):
        fit(flat, jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))
