"""A small CLIP of open_clip in float64, its weights as a method has them, and prompts put into it the plain way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ovseg_jax.pretrained import text as text_names
from ovseg_jax.pretrained import vit as vit_names
from ovseg_jax.pretrained.rename import fit, rename
from ovseg_jax.towers.clip import MEAN, STD
from ovseg_jax.towers.packed_text import stacked
from tests.extras import require

SIZE, PATCH, D, SCALE = 16, 8, 32, 9.0
IMAGE = dict(
    width=32, depth=3, heads=2, mlp_dim=128, patch=PATCH, grid=(SIZE // PATCH, SIZE // PATCH), embed_dim=D
)
TEXT = dict(width=24, layers=3, heads=2, embed_dim=D, length=20)


def config(method, prompt, **changes):
    """Of a run with these towers."""
    towers = dict(
        image=dict(name="clip_vitb32", **IMAGE),
        text=dict(name="clip", **TEXT),
        init="",
        tokenizer="words",
        image_size=SIZE,
        logit_scale=SCALE,
    )
    base = ConfigDict(
        dict(
            method=method,
            batch_size=8,
            accumulate=1,
            towers=towers,
            prompt=prompt,
            loss=dict(sample=0, correction="log10", proposal="uniform", per_device=False, chunk=4),
            data=dict(image_size=SIZE),
        )
    )
    base.update_from_flattened_dict(changes)
    return base


def draw(method, seed=0):
    """Variables like those of `method.init`, drawn by NumPy: compiling initialisers takes long."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        mean = float(path[-1].key == "scale")
        return jnp.asarray(rng.normal(mean, (x.shape[-2] if x.ndim > 1 else 50) ** -0.5, x.shape), x.dtype)

    variables = jax.tree.map_with_path(leaf, jax.eval_shape(method.init, jax.random.key(0)))
    return {**variables, "towers": {**variables["towers"], "scale": jnp.log(jnp.float32(SCALE))}}


def make(clip, seed=0):
    """An open_clip model as large as the towers of `clip`, random, and `towers` with its weights."""
    torch, open_clip = require("torch"), require("open_clip")
    heads = IMAGE["heads"]
    vision = dict(
        image_size=SIZE,
        patch_size=PATCH,
        width=IMAGE["width"],
        layers=IMAGE["depth"],
        head_width=IMAGE["width"] // heads,
    )
    text = dict(
        context_length=TEXT["length"],
        vocab_size=clip.text.vocab_size,
        width=TEXT["width"],
        heads=TEXT["heads"],
        layers=TEXT["layers"],
    )
    model = open_clip.CLIP(D, vision, text, quick_gelu=True)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.normal_(0, std, generator=generator)
        if "ln_" in name and name.endswith("weight"):
            parameter.data += 1
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    shape = jax.eval_shape(clip.init, jax.random.key(0))
    plain = jax.eval_shape(lambda: clip.text.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    image = fit(rename(arrays, vit_names.from_openai_clip(heads)), shape["image"])
    words = fit(rename(arrays, text_names.from_openai_clip_text(TEXT["heads"])), plain)
    towers = {"image": image, "text": stacked(words["params"]), "scale": np.log(np.float32(SCALE))}
    return model.double().eval().requires_grad_(False), jax.tree.map(jnp.asarray, towers)


def batch(classes, seed=0):
    """Eight images, of which one is padding."""
    rng = np.random.default_rng(seed)
    arrays = {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8),
        "label": rng.integers(0, classes, 8).astype(np.int32),
        "example_mask": np.arange(8) != 3,
    }
    return jax.tree.map(jnp.asarray, arrays)


def value_and_grad(method, variables, batch):
    """Of the loss, with respect to all parameters."""
    return loss_of(method, variables, batch)(variables["params"])


def loss_of(method, variables, batch):
    run = lambda params: method.loss({**variables, "params": params}, batch, jax.random.key(0))[0]
    return jax.jit(jax.value_and_grad(run))


def losses(method, variables, steps=12, rate=0.02):
    """Of Adam's steps on images that differ in colour by class."""
    colour = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)] * 2, np.uint8)
    clean = np.broadcast_to(colour[:, None, None], (8, SIZE, SIZE, 3))
    separable = batch(4) | {"image": jnp.asarray(clean), "label": jnp.arange(8, dtype=jnp.int32) % 4}
    run, rule, params = loss_of(method, variables, separable), optax.adam(rate), variables["params"]
    state, seen = rule.init(params), []
    for _ in range(steps):
        loss, grads = run(params)
        updates, state = rule.update(grads, state)
        params = optax.apply_updates(params, updates)
        seen.append(float(loss))
    return seen


def see(model, images, prompts=()):
    """Unit features of images; prompts[i], [n d], stand behind the tokens before block i, the first before a norm."""
    torch, visual = require("torch"), model.visual
    x = (torch.tensor(np.asarray(images) / 255.0) - torch.tensor(MEAN)) / torch.tensor(STD)
    x = visual.conv1(x.permute(0, 3, 1, 2)).flatten(2).permute(0, 2, 1)
    first = visual.class_embedding.expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + visual.positional_embedding
    count = x.shape[1]
    behind = lambda tokens: torch.cat([x[:, :count], tokens.expand(len(x), -1, -1)], 1)
    x = visual.ln_pre(behind(prompts[0]) if len(prompts) else x)
    for i, block in enumerate(visual.transformer.resblocks):
        x = block(behind(prompts[i]) if 1 <= i < len(prompts) else x)
    return unit(visual.ln_post(x[:, 0]) @ visual.proj)


def read(model, embeddings, ends, deep=()):
    """Unit features of texts [k l d] that end at `ends`; deep[i], [m d], is in places 1 to m before block i + 1."""
    torch = require("torch")
    length = embeddings.shape[1]
    x = embeddings + model.positional_embedding[:length]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
    for i, block in enumerate(model.transformer.resblocks):
        if 0 < i <= len(deep):
            own = deep[i - 1]
            x = torch.cat([x[:, :1], own.expand(len(x), -1, -1), x[:, 1 + len(own) :]], 1)
        x = block(x, attn_mask=mask)
    return unit(model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def tensor(x):
    """In float64, with a gradient."""
    return require("torch").tensor(np.asarray(x), dtype=require("torch").float64, requires_grad=True)


def cross_entropy(logits, batch):
    """The mean over images that are no padding."""
    torch = require("torch")
    label, mask = (torch.tensor(np.asarray(batch[key])) for key in ("label", "example_mask"))
    return torch.nn.functional.cross_entropy(logits[mask], label[mask].long())


def close(ours, theirs, rtol=1e-5):
    """Up to `rtol` of the largest number."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * np.abs(theirs).max())
