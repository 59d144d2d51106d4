"""GroupViT against transformers' GroupViTModel with random weights, from its own folder."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.groupvit import GroupVitImage, GroupVitText
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.pretrained.load import load
from tests.extras import require
from tests.models.test_text_towers import clip_ids

SIZE, LENGTH = 32, 9
IMAGE = GroupVitImage(
    patch=8,
    width=24,
    heads=2,
    mlp_dim=40,
    grid=(4, 4),
    depths=(2, 1, 1),
    tokens=(6, 3, 0),
    groups=(6, 3, 3),
    embed_dim=16,
    projection=32,
)
TEXT = GroupVitText(
    CLIPText(vocab_size=60, length=LENGTH, width=32, layers=2, heads=2, mlp_dim=64, embed_dim=0),
    embed_dim=16,
    projection=32,
)


def groupvit(transformers, torch, vocab=60):
    """A GroupViTModel of the sizes above, whose every parameter and statistic matters."""
    config = transformers.GroupViTConfig(
        text_config=dict(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
        ),
        vision_config=dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=4,
            depths=[2, 1, 1],
            num_group_tokens=[6, 3, 0],
            num_output_groups=[6, 3, 3],
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=8,
        ),
        projection_dim=16,
        projection_intermediate_dim=32,
    )
    torch.manual_seed(0)
    model = transformers.GroupViTModel(config).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked") or name == "logit_scale":
            continue
        elif value.ndim > 1:
            value.normal_(0, 0.5 if "token" in name or "position" in name else value.shape[-1] ** -0.5)
        else:
            one = name.endswith("weight")
            value.normal_(1.0 if one else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch, transformers = require("torch"), require("transformers")
    model, folder = groupvit(transformers, torch), tmp_path_factory.mktemp("groupvit")
    model.save_pretrained(folder)
    return model, folder


def variables_of(folder, image=IMAGE, text=TEXT):
    """The variables of both sides, read from a folder."""
    shapes = jax.eval_shape(image.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    words = jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    found = load(str(folder), image, shapes), load(str(folder), text, words)
    return jax.tree.map(jnp.asarray, found)


def close(got, want, bound=1e-5):
    """Compares relative to the largest value."""
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


def test_embeddings_logits_and_segmentation_are_transformers(published):
    torch = require("torch")
    model, folder = published
    image_variables, text_variables = variables_of(folder)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    ids = clip_ids(3, LENGTH)
    with torch.no_grad():
        want = model(
            input_ids=torch.tensor(ids),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)),
            output_segmentation=True,
        )
    out = jax.jit(IMAGE.apply)(image_variables, jnp.asarray(pixels))
    text = unit(jax.jit(TEXT.apply)(text_variables, jnp.asarray(ids)))
    image = unit(out.pooled)
    close(image, want.image_embeds)
    close(text, want.text_embeds)
    close(out.scale * image @ text.T, want.logits_per_image)
    soft = want.vision_model_output.attentions
    assert out.assignment.shape == (2, 3, 4, 4)
    close(out.assignment, (soft[1] @ soft[0]).reshape(2, 3, 4, 4))
    np.testing.assert_allclose(out.assignment.sum(1), 1, atol=1e-5)
    # Its segmentation: logits of groups, spread by the assignment at the image's size; transformers multiplies by the
    # scale twice.
    up = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(out.assignment)), (SIZE, SIZE), mode="bilinear"
    )
    scores = out.scale**2 * jnp.einsum("bge,te->btg", unit(out.groups), text)
    close(np.einsum("btg,bghw->bthw", scores, up), want.segmentation_logits)


def test_larger_images_have_resized_positions(published):
    torch = require("torch")
    model, folder = published
    pixels = np.random.default_rng(1).standard_normal((1, 48, 64, 3)).astype(np.float32)
    vision = model.vision_model
    plain = vision.embeddings.forward
    vision.embeddings.forward = partial(plain, interpolate_pos_encoding=True)
    with torch.no_grad():
        want = vision(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_attentions=True, return_dict=True)
        groups = model.visual_projection(want.last_hidden_state[0])[None]
    vision.embeddings.forward = plain
    out = jax.jit(IMAGE.apply)(variables_of(folder)[0], jnp.asarray(pixels))
    close(out.groups, groups)
    close(out.assignment, (want.attentions[1] @ want.attentions[0]).reshape(1, 3, 6, 8))


def test_training_draws_and_has_the_gradients_of_transformers(published, monkeypatch):
    """With the same Gumbel noise: groups, and straight-through gradients of parameters of both assignments."""
    torch = require("torch")
    model, folder = published
    rng = np.random.default_rng(2)
    noise = {n: rng.gumbel(size=(2, n, m)).astype(np.float32) for n, m in ((6, 16), (3, 6))}
    monkeypatch.setattr(
        torch.distributions.gumbel.Gumbel, "sample", lambda self, shape: torch.tensor(noise[shape[1]])
    )
    monkeypatch.setattr(jax.random, "gumbel", lambda key, shape: jnp.asarray(noise[shape[1]]))
    pixels = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    weight = rng.standard_normal((2, 3, 16)).astype(np.float32)
    model.train(), model.visual_projection.eval()
    try:
        hidden = model.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
        groups = model.visual_projection(hidden.reshape(6, -1)).reshape(2, 3, -1)
        model.zero_grad()
        (groups * torch.tensor(weight)).sum().backward()
    finally:
        model.eval()
    variables = variables_of(folder)[0]

    def total(params):
        own = {**variables, "params": params}
        out, _ = IMAGE.apply(
            own, jnp.asarray(pixels), train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )
        return (out.groups * weight).sum(), out.groups

    grad, found = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
    close(found, groups)
    plain = jax.jit(IMAGE.apply)(variables, jnp.asarray(pixels)).groups
    assert np.abs(plain - found).max() > 0.01  # the noise changes the assignment
    for k, stage in enumerate(model.vision_model.encoder.stages[:2]):
        own = grad[f"stage_{k}"]["assign"]
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            want = getattr(stage.downsample.assign, theirs).weight.grad.T
            assert np.abs(want.numpy()).max() > 1e-4
            close(own[ours]["kernel"], want, 1e-4)
        close(grad[f"stage_{k}"]["group_token"], stage.group_token.grad, 1e-4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 3, "its heads is 3, but this model's is 2"),
        ("hidden_act", "quick_gelu", "its activation is 'quick_gelu'"),
        ("assign_eps", 2.0, "its assign_epsilon is 2.0"),
    ],
)
def test_another_model_is_refused(published, tmp_path, key, value, message):
    config = json.loads((published[1] / "config.json").read_text())
    config["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(published[1] / "model.safetensors")
    with pytest.raises(UserError, match=message):
        variables_of(tmp_path)


def test_other_stages_are_refused(published):
    with pytest.raises(UserError, match=r"read as transformers' GroupViT: .*stage_0/encoderblock_1"):
        variables_of(published[1], IMAGE.clone(depths=(1, 1, 1)))
    with pytest.raises(UserError, match="must name as many stages"):
        variables_of(published[1], IMAGE.clone(depths=(1, 1)))
    with pytest.raises(UserError, match="33 x 32 pixels cannot be cut"):
        IMAGE.init(jax.random.key(0), jnp.zeros((1, 33, 32, 3)))


def test_the_published_sizes():
    image = jax.eval_shape(GroupVitImage().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    text = jax.eval_shape(GroupVitText().init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    # As transformers' GroupViTModel(GroupViTConfig()), and nvidia/groupvit-gcc-yfcc.
    assert sum(x.size for x in jax.tree.leaves((image["params"], text["params"]))) == 55_726_609
