"""Backbones by name, with a common interface.

`module(x: Float[Array, "b h w 3"], train) -> {"c2": ..., "c3": ..., "c4": ..., "c5": ...}`: maps at strides
4, 8, 16, 32, of size ceil(h/stride) x ceil(w/stride). A module with fewer levels leaves out the coarse ones; further
outputs, such as CLIP's pooled embedding, have other names. ViT and EVA are wrapped in a `TowerPyramid`, a ViT with
`taps` in a `TapPyramid`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.models import clip_resnet, convnext, eva, resnet, swin, vit
from ovseg_jax.models.clip_resnet import ClipResNet
from ovseg_jax.models.convnext import ConvNeXt
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.efficientnet_scaling import LITE, SCALING
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.hooks import HOOKS
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.models.tower_pyramid import TowerPyramid
from ovseg_jax.models.vit import ViT

# Name -> (module, the attributes that the name implies).
BACKBONES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "small": (SmallBackbone, {}),
    **{name: (ResNet, {"stage_sizes": sizes}) for name, sizes in resnet.STAGES.items()},
    **{name: (EfficientNet, {"width": w, "depth": d}) for name, (w, d) in SCALING.items()},
    **{name: (EfficientNet, {"width": w, "depth": d, "lite": True}) for name, (w, d) in LITE.items()},
    **{name: (ClipResNet, fields) for name, fields in clip_resnet.PRESETS.items()},
    **{name: (ConvNeXt, fields) for name, fields in convnext.PRESETS.items()},
    **{name: (Swin, fields) for name, fields in swin.PRESETS.items()},
    "vit": (ViT, {}),
    **{name: (ViT, fields) for name, fields in vit.PRESETS.items()},
    **{name: (Eva, fields) for name, fields in eva.PRESETS.items()},
}


def build_backbone(cfg: ConfigDict | Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """Creates a backbone.

    Args:
      cfg: `name`, and attributes of the module that the name does not imply, such as `norm` of a ResNet, `remat`, or
        `width` of "small". `init`, the weights that a method starts from, is ignored.
      dtype: compute type; parameters are float32.

    Raises:
      UserError: the name or an attribute is unknown.
    """
    # JSON turns tuples into lists.
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
    options.pop("init", None)
    name = options.pop("name", None)
    if name not in BACKBONES:
        raise UserError(f"backbone.name={name!r} is not one of {', '.join(BACKBONES)}.")
    module, implied = BACKBONES[name]
    # Weights of a tower with patches of 14 pixels may be loaded for 16, see `pretrained.load.resize_patches`, and
    # libraries resize the positions of the same tower in different ways.
    implied = {key: x for key, x in implied.items() if key not in ("patch", "resize") or key not in options}
    known = {f.name for f in dataclasses.fields(module)} - {"parent", "name", "dtype", *HOOKS, *implied}
    unknown = options.keys() - known
    if unknown:
        wrong = ", ".join(sorted(map(repr, unknown)))
        raise UserError(f"backbone {name!r} has no {wrong}; known attributes: {', '.join(sorted(known))}.")
    built = module(**implied, **options, dtype=dtype)
    if isinstance(built, ViT) and built.taps:
        return TapPyramid(built, dtype=dtype)
    return TowerPyramid(built, dtype) if module in (ViT, Eva) else built


def build_vit(cfg: ConfigDict | Mapping[str, Any], dtype: Any, what: str) -> ViT:
    """Creates a backbone that is a Vision Transformer, without a pyramid.

    Args:
      cfg: see `build_backbone`.
      dtype: compute type.
      what: the owner of the backbone, for the error.

    Raises:
      UserError: see `build_backbone`; or the backbone is another, or has taps.
    """
    built = build_backbone(cfg, dtype)
    if not (isinstance(built, TowerPyramid) and isinstance(built.tower, ViT)):
        raise UserError(f"backbone {cfg['name']!r} of {what} is no Vision Transformer, or has taps")
    return built.tower
