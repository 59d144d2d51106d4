"""TIPSv2 against transformers' Tipsv2Model, from each format that it is published in, with random weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.models.text_towers import TipsText
from ovseg_jax.models.vit import PRESETS, ViT
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.load import load
from tests import reference
from tests.extras import require
from tests.methods.test_openseg import batch, make

WIDTH, DEPTH, HEADS, PATCH = 32, 3, 2, 14
# The published table of positions, a larger image, and one that is not square.
SIZES = [(56, 56), (84, 84), (42, 98)]
TEXT: dict[str, Any] = dict(vocab_size=60, length=11, width=WIDTH, layers=2, heads=HEADS, mlp_dim=48)


def image_tower(swiglu, **fields):
    options = PRESETS["tipsv2_g14" if swiglu else "tipsv2_b14"] | dict(
        width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=48, grid=(4, 4)
    )
    return ViT(**options | fields)


def original(swiglu=False, length=11, jax_code=False):
    """A small Tipsv2Model in which each parameter matters; `jax_code` has the GELU and epsilon of the JAX code."""
    torch, transformers = require("torch"), require("transformers")
    vision = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=PATCH,
        mlp_ratio=2.25 if swiglu else 1.5,  # SwiGLU's hidden width is two thirds of this, 48
        use_swiglu_ffn=swiglu,
        hidden_act="gelu_pytorch_tanh" if jax_code else "gelu",
    )
    text = dict(
        vocab_size=60,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        layer_norm_eps=1e-6 if jax_code else 1e-5,
    )
    model = transformers.Tipsv2Model(transformers.Tipsv2Config(vision_config=vision, text_config=text))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.shape[0] > 1:
            std = parameter[0].numel() ** -0.5
        else:
            std = 0.5
        parameter.data.normal_(0, std, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model.eval()


def torch_names(model):
    """The names of the published PyTorch files, by tower."""
    out: dict[str, dict[str, np.ndarray]] = {"vision": {}, "text": {}}
    arrays = {name: value.detach().numpy() for name, value in model.named_parameters()}
    joint: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if name == "temperature":
            continue
        side, _, rest = name.partition("_model.")
        rest = rest.removeprefix("embeddings.")
        if side == "vision":
            pairs = [
                ("patch_embeddings.projection", "patch_embed.proj"),
                ("position_embeddings", "pos_embed"),
                ("encoder.layer.", "blocks."),
                ("attention.o_proj", "attn.proj"),
                ("layer_scale1.lambda1", "ls1.gamma"),
                ("layer_scale2.lambda1", "ls2.gamma"),
                ("layernorm.", "norm."),
                ("mlp.down_proj", "mlp.w3"),
            ]
        else:
            pairs = [
                ("final_layer_norm", "ln_final"),
                ("encoder.layers.", "transformer.resblocks."),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn", "attn"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ]
        for ours, theirs in pairs:
            rest = rest.replace(ours, theirs)
        for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            if f".{part}." in rest:
                rest = rest.replace("attention.", "attn.")
                whole = rest.replace(part, "w12" if part in ("gate_proj", "up_proj") else "qkv")
                joint.setdefault(f"{side} {whole}", {})[part] = array
                break
        else:
            out[side][rest] = array
    for key, parts in joint.items():
        side, name = key.split(" ")
        order = [p for p in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if p in parts]
        if side == "text":
            name = name.replace("qkv.", "in_proj_")
        out[side][name] = np.concatenate([parts[p] for p in order])
    return out


def jax_names(model, swiglu):
    """The names of the published JAX files, by tower, without layer scale and with the class token's position in it."""
    plain = {name: np.array(x.detach().numpy()) for name, x in model.named_parameters()}
    vision: dict[str, np.ndarray] = {}
    v, table = "vision_model.", plain["vision_model.embeddings.position_embeddings"]
    tokens = "encoder/ToTokenSequence_0/"
    vision[tokens + "posembed_input"] = table[:, 1:].reshape(1, 4, 4, WIDTH)
    first = plain[v + "embeddings.cls_token"] + table[:, :1]
    vision[tokens + "cls"] = np.concatenate([first, plain[v + "embeddings.register_tokens"]], 1)
    kernel = plain[v + "embeddings.patch_embeddings.projection.weight"]
    vision[tokens + "embedding/kernel"] = kernel.transpose(2, 3, 1, 0)
    vision[tokens + "embedding/bias"] = plain[v + "embeddings.patch_embeddings.projection.bias"]
    text: dict[str, np.ndarray] = {
        "token_emb/emb_var": plain["text_model.embeddings.token_embedding.weight"],
        "temperature_contrastive": np.array(0.01, np.float32),
    }

    def put(out, target, source, norm=False, heads=None, scale=None):
        weight, bias = plain[source + ".weight"], plain[source + ".bias"]
        if norm:
            out[target + "/scale"], out[target + "/bias"] = weight, bias
            return
        scale = 1 if scale is None else plain[scale]
        weight, bias = weight.T * scale, bias * scale
        if heads == "in":
            weight, bias = weight.reshape(WIDTH, HEADS, -1), bias.reshape(HEADS, -1)
        if heads == "out":
            weight = weight.reshape(HEADS, -1, WIDTH)
        out[target + "/kernel"], out[target + "/bias"] = weight, bias

    for out, side, depth in ((vision, "vision", DEPTH), (text, "text", 2)):
        for i in range(depth):
            block = ("encoder/" if side == "vision" else "") + f"transformer/encoderblock_{i}/"
            layer = f"{side}_model.encoder.layer{'s' if side == 'text' else ''}.{i}."
            norms = ("norm1", "norm2") if side == "vision" else ("layer_norm1", "layer_norm2")
            for k, norm in enumerate(norms):
                put(out, block + f"LayerNorm_{k}", layer + norm, norm=True)
            attention = "attention." if side == "vision" else "self_attn."
            own = block + "MultiHeadDotProductAttention_0/"
            for name in ("query", "key", "value"):
                put(out, own + name, layer + attention + f"{name[0]}_proj", heads="in")
            last = "o_proj" if side == "vision" else "out_proj"
            scales = [layer + f"layer_scale{k}.lambda1" if side == "vision" else None for k in (1, 2)]
            put(out, own + "out", layer + attention + last, heads="out", scale=scales[0])
            if swiglu and side == "vision":
                for k, name in enumerate(("gate_proj", "up_proj", "down_proj")):
                    target = block + f"FFNSwiGluFused_0/Dense_{k}"
                    put(out, target, layer + "mlp." + name, scale=scales[1] if k == 2 else None)
            else:
                put(out, block + "MlpBlock_0/Dense_0", layer + "mlp.fc1")
                put(out, block + "MlpBlock_0/Dense_1", layer + "mlp.fc2", scale=scales[1])
    put(vision, "encoder/encoder_norm", "vision_model.layernorm", norm=True)
    put(text, "text_encoder_norm", "text_model.final_layer_norm", norm=True)
    return {"vision": vision, "text": text}


def save(model, form, folder, swiglu):
    """Saves a model in a form that it is published in."""
    if form == "transformers":
        model.save_pretrained(folder)
    elif form == "joint":  # as on the hub: PyTorch's names in one file
        names = torch_names(model)
        arrays = {f"{side}_encoder.{name}": x for side in names for name, x in names[side].items()}
        write_safetensors(folder / "model.safetensors", arrays)
        model.config.save_pretrained(folder)
    else:
        towers = torch_names(model) if form == "torch" else jax_names(model, swiglu)
        for side, arrays in towers.items():
            np.savez(folder / f"tips_v2_{form}_{side}.npz", **arrays)


def values_of(model, x):
    """The tokens of the published evaluation (google-deepmind/tips, pytorch/TIPS_zeroshot_segmentation.ipynb)."""
    with require("torch").no_grad():
        tokens = value_tokens(model, reference.torch_images(x))
    return tokens.numpy().reshape(len(x), x.shape[1] // PATCH, x.shape[2] // PATCH, WIDTH)


def value_tokens(model, pixels):
    vision = model.vision_model
    tokens = vision.embeddings(pixels)
    for layer in vision.encoder.layer[:-1]:
        tokens = layer(tokens)
    last = vision.encoder.layer[-1]
    value = last.attention.o_proj(last.attention.v_proj(last.norm1(tokens)))
    tokens = tokens + last.layer_scale1(value)
    tokens = tokens + last.layer_scale2(last.mlp(last.norm2(tokens)))
    return vision.layernorm(tokens)[:, 2:]


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("form", ["transformers", "joint", "torch", "jax"])
def test_tips_features_equal_hugging_face(form, swiglu, tmp_path):
    torch = require("torch")
    model = original(swiglu)
    save(model, form, tmp_path, swiglu)
    tower = image_tower(swiglu)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), np.zeros((1, 56, 56, 3), np.float32))
    variables = load(str(tmp_path), tower, shapes)
    rng = np.random.default_rng(0)
    for size in SIZES if form in ("joint", "jax") else SIZES[2:]:
        x = jnp.asarray(rng.uniform(0, 1, (2, *size, 3)), jnp.float32)
        with torch.no_grad():
            expected = model.vision_model(reference.torch_images(x))
        plain, values = (jax.jit(tower.clone(last=last).apply)(variables, x) for last in ("", "value"))
        tokens = expected.last_hidden_state[:, 2:].numpy().reshape(plain.tokens.shape)
        errors = [
            reference.relative_error(plain.pooled, expected.pooler_output.numpy()),
            reference.relative_error(plain.tokens, tokens),
            reference.relative_error(values.tokens, values_of(model, x)),
        ]
        print(f"TIPSv2 {form} swiglu={swiglu} {size}: at most {max(errors):.1e}")
        assert max(errors) < 1e-4
    text = TipsText(**TEXT)
    shapes = jax.eval_shape(text.init, jax.random.key(0), np.zeros((1, 4), np.int32))
    variables = load(str(tmp_path), text, shapes)
    for length in (11, 6):
        ids = rng.integers(1, 60, (4, length))
        valid = np.arange(length) < np.array([length, 1, 4, 5])[:, None]
        with torch.no_grad():
            want = model.text_model(torch.tensor(ids), attention_mask=torch.tensor(valid).long())
        found = jax.jit(text.apply)(variables, jnp.asarray(ids, jnp.int32), jnp.asarray(valid))
        error = reference.relative_error(found.pooled, want.pooler_output.numpy())
        print(f"TIPSv2 {form} texts of {length}: {error:.1e}")
        assert error < 1e-4


def test_openseg_trains_on_a_tips_tower(tmp_path):
    """In patches of 8 pixels, to which the published kernel is resized; a step changes the tower itself."""
    require("torch")
    save(original(), "joint", tmp_path, False)
    fields = PRESETS["tipsv2_b14"] | dict(
        patch=8, width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=48, grid=(4, 4)
    )
    method = make(backbone=dict(fields, name="vit", init=str(tmp_path)))
    tower = lambda params: params["image"]["backbone"]["tower"]
    variables, found = jax.device_get(method.init(jax.random.key(0))), method.pretrained()["params"]
    params = variables["params"]
    params["image"]["backbone"]["tower"] = tower(found)
    run = lambda params, data: method.loss({**variables, "params": params}, data, jax.random.key(1))[0]
    step = jax.jit(jax.value_and_grad(run))
    loss, grads = step(params, batch())
    moved = jax.tree.map(np.any, tower(grads))
    assert moved["embedding"]["kernel"] and moved["Transformer"]["encoderblock_0"]["LayerNorm_0"]["scale"]
    after, _ = step(jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), batch())
    assert after < loss


def test_a_tips_of_another_activation_or_shape_is_refused(tmp_path):
    model = original()
    save(model, "joint", tmp_path, False)
    x = np.zeros((1, 56, 56, 3), np.float32)
    shapes = lambda tower: jax.eval_shape(tower.init, jax.random.key(0), x)
    tanh = image_tower(False, activation="gelu_tanh")
    with pytest.raises(UserError, match="its activation is 'gelu', but this model's is 'gelu_tanh'"):
        load(str(tmp_path), tanh, shapes(tanh))
    one = image_tower(False, front=1)
    with pytest.raises(UserError, match=r"params/cls is \(1, 2, 32\), not \(1, 1, 32\)"):
        load(str(tmp_path), one, shapes(one))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load(str(tmp_path), image_tower(False), shapes(image_tower(False)))
