"""Our towers saved for transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.models.vit import ViT
from ovseg_jax.parallel.sharding import path_name
from ovseg_jax.pretrained.hf_clip import is_clip, write_hf_clip
from ovseg_jax.pretrained.load import load
from tests import reference
from tests.extras import require

VISION = ViT(
    patch=8, width=32, depth=2, heads=2, mlp_dim=64, grid=(4, 4), pre_norm=True, activation="quick_gelu", epsilon=1e-5,
    embed_dim=24, head_bias=False,
)  # fmt: skip
TEXT = CLIPText(vocab_size=60, length=12, width=16, layers=2, heads=2, embed_dim=24)


def by_path(params):
    return {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_loads_it_and_so_do_we(tmp_path, activation):
    torch, transformers = require("torch"), require("transformers")
    vision, text = (
        VISION.clone(activation=activation),
        TEXT.clone(activation=activation),
    )
    assert is_clip(vision, text)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    ids = np.array([[58, 3, 7, 59, 0, 0], [58, 3, 9, 11, 2, 59]], np.int32)
    noise = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)
    seen = jax.tree.map(noise, reference.init(vision, jnp.asarray(image)))
    read = jax.tree.map(noise, reference.init(text, jnp.asarray(ids)))
    write_hf_clip(tmp_path, vision, text, by_path(seen["params"]), by_path(read["params"]), temperature=0.05)

    model, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        out = model.eval()(
            input_ids=torch.from_numpy(ids).long(), pixel_values=torch.from_numpy(image).permute(0, 3, 1, 2)
        )
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    ours = unit(np.asarray(vision.apply(seen, jnp.asarray(image)).pooled))
    words = unit(np.asarray(text.apply(read, jnp.asarray(ids)).pooled))
    assert reference.relative_error(out.image_embeds.numpy(), ours) < 1e-5
    assert reference.relative_error(out.text_embeds.numpy(), words) < 1e-5
    assert reference.relative_error(out.logits_per_image.numpy(), 20 * ours @ words.T) < 1e-5

    for module, variables in ((vision, seen), (text, read)):
        jax.tree.map(np.testing.assert_array_equal, load(str(tmp_path), module, variables), variables)


def test_what_is_no_clip():
    assert not is_clip(VISION, TEXT.clone(embed_dim=25))
    assert not is_clip(VISION.clone(pre_norm=False), TEXT)
    assert not is_clip(None, TEXT)
