"""Weights of patches of one size in a tower of another, against PyTorch's bicubic interpolation."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.eva import Eva
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.load import load, resize_patches
from tests import reference
from tests.extras import require
from tests.models.test_eva import KINDS, TINY, original, state

WITHOUT_GRID = {key: value for key, value in KINDS["eva02"][0].items() if key != "rope_grid"}


@pytest.mark.parametrize("old, new", [(14, 16), (16, 14), (8, 10)])
def test_a_kernel_is_resized_as_pytorch_does(old, new):
    torch = require("torch")
    kernel = np.random.default_rng(0).normal(size=(old, old, 3, 5)).astype(np.float32)
    found = resize_patches({"params/embedding/kernel": kernel, "params/cls": np.ones(1)}, new)
    given = torch.from_numpy(kernel).permute(3, 2, 0, 1)
    want = torch.nn.functional.interpolate(given, size=(new, new), mode="bicubic", align_corners=False)
    ours = found["params/embedding/kernel"]
    assert ours.dtype == np.float32
    assert reference.relative_error(ours, want.permute(2, 3, 1, 0).numpy()) < 1e-5
    assert found["params/cls"] == 1


def test_a_tower_reads_weights_of_smaller_patches(tmp_path, caplog):
    """14 to 16 as 8 to 10: the same features as timm's model of that patch with its kernel replaced."""
    torch, timm = require("torch"), require("timm")
    weights = state(original("eva02"))
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text('{"architecture": "eva02_base_patch16_clip_224"}')
    tower = Eva(**{**TINY, "patch": 10, "rope_grid": 16, "taps": ()}, **WITHOUT_GRID)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 40, 40, 3)), jnp.float32)
    with caplog.at_level(logging.WARNING):
        variables = load(str(tmp_path), tower, jax.eval_shape(tower.init, jax.random.key(0), x))
    assert "resizing the patch embedding from 8 x 8 to 10 x 10 pixels" in caplog.text
    model = timm.models.eva.Eva(
        **(
            dict(img_size=40, patch_size=10, embed_dim=32, depth=3, num_heads=2, mlp_ratio=85 / 32)
            | dict(num_classes=24, global_pool="token")
            | KINDS["eva02"][1]
            | dict(ref_feat_shape=(16, 16))
        )
    ).eval()
    name = "patch_embed.proj.weight"
    given = {key: torch.from_numpy(value) for key, value in weights.items()}
    given[name] = torch.nn.functional.interpolate(given[name], size=(10, 10), mode="bicubic")
    model.load_state_dict(given)
    with torch.no_grad():
        want = model(reference.torch_images(x)).numpy()
    assert reference.relative_error(jax.jit(tower.apply)(variables, x).pooled, want) < 1e-4


def test_a_published_backbone_takes_other_patches():
    assert build_backbone({"name": "eva02_clip_l14", "patch": 16}).tower.patch == 16
    assert build_backbone({"name": "eva02_clip_l14"}).tower.patch == 14
