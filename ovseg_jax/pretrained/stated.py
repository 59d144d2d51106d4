"""Checks of a module against the files beside published weights, where names and shapes are not sufficient.

A checkpoint does not show activations, epsilons, the number of heads, padding and which convolution has the stride.
The files beside it do: `config.json` of transformers (`model_type`), of timm (`architecture`) or of ours (`kind`), and
`open_clip_config.json` (`model_cfg`). Values that a library leaves out of its file have that library's default.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.files import verify
from ovseg_jax.models.convnext import ConvNeXt
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.groupvit import GroupVitImage, GroupVitText
from ovseg_jax.models.mask2former import Mask2FormerNet
from ovseg_jax.models.maskformer import MaskFormer
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.models.text_towers import Bert, CLIPText, SiglipText, TextTower, TipsText
from ovseg_jax.models.upernet import UPerNet
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained.hf_clip import HF_ACTIVATIONS
from ovseg_jax.pretrained.published import Channels, Pixels
from ovseg_jax.pretrained.tips import TORCH as TIPS
from ovseg_jax.pretrained.to_torch import describe
from ovseg_jax.reading import number, numbers, parse_json, read_text, reading

_LOG = logging.getLogger(__name__)

Facts = dict[str, Any]

# transformers: format -> (the model types whose weights have these names, the defaults by our names of the facts).
_BERT_SIZED: Facts = dict(activation="gelu", heads=12, epsilon=1e-12)
_MASKFORMER, _MASK2FORMER = "transformers' MaskFormer", "transformers' Mask2Former"
_SWIN = (("swin", "maskformer-swin"), dict(activation="gelu", epsilon=1e-5))
_HF: dict[str, tuple[tuple[str, ...], Facts]] = {
    "transformers' ResNet": (("resnet",), dict(activation="relu", stride_in_first_convolution=False)),
    "transformers' EfficientNet": (("efficientnet",), dict(activation="swish", epsilon=1e-3)),
    "transformers' Swin": _SWIN,
    "transformers' SwinBackbone": _SWIN,
    "transformers' ViT": (("vit", "vit_mae", "vit_msn"), _BERT_SIZED),
    "transformers' BERT": (("bert",), _BERT_SIZED),
    "transformers' CLIP": (
        ("clip", "clip_vision_model", "clip_text_model"),
        dict(activation="quick_gelu", heads={"vision": 12, "text": 8}, epsilon=1e-5),
    ),
    "transformers' GroupViT": (
        ("groupvit",),
        dict(
            activation={"vision": "gelu", "text": "quick_gelu"},
            heads={"vision": 6, "text": 4},
            epsilon=1e-5,
            assign_epsilon=1.0,
        ),
    ),
    "transformers' SigLIP": (
        ("siglip", "siglip_vision_model", "siglip_text_model"),
        dict(activation="gelu_pytorch_tanh", heads=12, epsilon=1e-6),
    ),
    TIPS: (
        ("tipsv2", "tipsv2_vision_model", "tipsv2_text_model"),
        dict(
            activation={"vision": "gelu", "text": "relu"},
            heads=12,
            epsilon={"vision": 1e-6, "text": 1e-5},
        ),
    ),
}
_FILES = ("config.json", "open_clip_config.json")
_HF_NAMES = (
    ("activation", "hidden_act"),
    ("heads", "num_attention_heads"),
    ("epsilon", "layer_norm_eps"),
    ("epsilon", "batch_norm_eps"),
    ("assign_epsilon", "assign_eps"),
    ("stride_in_first_convolution", "downsample_in_bottleneck"),
)
_OF_HF = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()} | {"silu": "swish"}
# timm: the supported architectures of a format. Others have the same names but compute something else: an
# `efficientnet_b0` without `tf_` pads on both sides and has another epsilon, a `resnetaa50` pools in other places.
_TIMM = {
    "timm's EfficientNet": r"tf_efficientnet_(b[0-8]|lite[0-4])",
    "torchvision's or timm's ResNet": r"(tv_|gluon_|ssl_|swsl_)?resnet(50|101|152)(_v1b)?",
    "timm's CLIP ResNet": r"resnet(50|101|50x4|50x16|50x64)_clip",
    "timm's CLIP ConvNeXt": r"convnext_(base|large_mlp|xxlarge)",
    "open_clip's ConvNeXt": r"convnext_(base|large|xxlarge)",
    "timm's Swin": r"swin_(tiny|small|base|large)_patch4_window\d+_\d+",
    "timm's ViT": r"(vit|deit)_(?!.*(?:rope|relpos)).*_patch\d+.*",
    "timm's EVA": r"eva(02)?_.*_patch\d+_(clip_)?\d+",
}
_OF_ONE_ARCHITECTURE = ("timm's EfficientNet",)  # without a config.json these are refused
_WINDOW_RULES = {  # others: "axis"
    "the authors' Swin": "both",
    "transformers' Swin": "both",
    "transformers' SwinBackbone": "always",
    _MASKFORMER: "always",
    _MASK2FORMER: "always",
    "the authors' Mask2Former": "always",
}
_TIMM_16_HEADS = ("huge", "giant", "giantopt", "gigantic", "so400m")  # others have 64 channels a head


def check(path: Path, module: nn.Module, format_: str, names: Collection[str]) -> None:
    """Compares a module with the description of its weights in the files beside them.

    Args:
      path: the path of the weights.
      module: the module to load them into.
      format_: a key of `load.formats(module)`, or "ours".
      names: the names of the arrays.

    Raises:
      UserError: config.json describes another model, cannot be read, or is missing where it is required.
    """
    # A folder of the hub may hold a model in several libraries' formats, each with its own file.
    order = _FILES[::-1] if "open_clip" in format_ else _FILES
    config, source = read_config(path.parent, order)
    with reading(source or path):
        theirs = _stated(config, module, format_)
    own = facts(module)
    if "input_resolution" in names:  # OpenAI's own archives
        theirs |= {"activation": "quick_gelu"} if "activation" in own else {}
    if refused := theirs.pop("refused", ""):
        raise UserError(f"{source or path}: {refused}")
    if format_ == "ours":
        own = json.loads(json.dumps(describe(module)))
    for fact, value in theirs.items():
        if fact in own and not _equal(fact, value, own[fact]):
            raise UserError(f"{source or path}: its {fact} is {value!r}, but this model's is {own[fact]!r}")
    rule = "always" if "norm0.weight" in names else _WINDOW_RULES.get(format_, "axis")
    module = module.net.backbone if isinstance(module, MaskFormer) else module
    if isinstance(module, Swin) and rule != module.window_rule:
        _LOG.info(
            "%s: where one window covers a side of the map, %s uses window_rule=%r, but this model uses %r",
            path,
            format_,
            rule,
            module.window_rule,
        )
    if not theirs and format_ == "OpenAI's or open_clip's CLIP" and "activation" in own:
        _LOG.warning(
            "%s does not state its activation, and there is no open_clip_config.json beside it: assuming %s",
            path,
            own["activation"],
        )


def check_pixels(path: Path, mean: Sequence[float], std: Sequence[float]) -> None:
    """Compares the normalisation of pixels with the files beside the weights.

    Raises:
      UserError: they differ, or a file cannot be read.
    """
    for source, given in _stated_pixels(path.parent):
        for fact, published, own in zip(("mean", "std"), given, (mean, std), strict=True):
            if published is not None and not np.allclose(published, own, atol=2e-3):
                raise UserError(
                    f"{source}: the {fact} of pixels is {list(published)}, but this config has {list(own)}: set mean "
                    "and std to the published values"
                )


def stated_pixels(folder: Path) -> Pixels | None:
    """Returns the normalisation of pixels in [0, 1] that the files of a published model state; None without one.

    Raises:
      UserError: a file cannot be read, or it does not scale pixels.
    """
    for _, (mean, std) in _stated_pixels(folder):
        if mean is not None and std is not None:
            return Pixels(mean, std)
    return None


def _stated_pixels(folder: Path) -> Iterator[tuple[str, tuple[Channels | None, Channels | None]]]:
    """Yields each file, and the mean and the standard deviation that it states."""
    for name in ("preprocessor_config.json", *_FILES):
        config, source = read_config(folder, (name,))
        with reading(source or folder):
            given = config.get("pretrained_cfg") or config.get("preprocess_cfg") or {}
            mean, std = (config.get(f"image_{fact}", given.get(fact)) for fact in ("mean", "std"))
            if not config.get("do_rescale", True):
                raise ValueError("do_rescale is false, but its towers take pixels in [0, 1]")
            if config.get("do_normalize") is False:
                mean, std = [0.0] * 3, [1.0] * 3
            # Libraries scale pixels by this factor, we by 1/255.
            scale = 255 * number(config.get("rescale_factor", 1 / 255), "rescale_factor")
            both = _channels(mean, "mean", scale), _channels(std, "std", scale)
            if scale <= 0 or (both[1] is not None and min(both[1]) <= 0):
                raise ValueError("its rescale_factor or a standard deviation of its pixels is not positive")
        yield source, both


def _channels(values: Any, name: str, scale: float) -> Channels | None:
    if values is None:
        return None
    red, green, blue = (x / scale for x in numbers(values, name, 3))
    return red, green, blue


def read_config(folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Reads the first of these files in a folder; returns its content and path, ({}, "") without one.

    Raises:
      UserError: the file is damaged.
    """
    for name in names:
        path = folder / name
        if path.exists():
            with reading(path):
                verify(path)
                found = parse_json(read_text(path))
                if not isinstance(found, dict):
                    raise ValueError("it is not a JSON object")
                return found, str(path)
    return {}, ""


def facts(module: nn.Module) -> Facts:
    """Returns the properties of a module that its parameters do not show."""
    match module:
        case ViT():
            return dict(activation=module.activation, heads=module.heads, epsilon=module.epsilon)
        case Eva():
            rope = module.rope_grid
            return dict(heads=module.heads, epsilon=1e-6, post_norm=module.post_norm, rope_grid=rope)
        case CLIPText():
            return dict(
                activation=module.activation, heads=module.heads, epsilon=1e-5, causal=True, pool="argmax"
            )
        case GroupVitImage():
            names = ("activation", "heads", "epsilon", "assign_epsilon")
            return {name: getattr(module, name) for name in names}
        case GroupVitText():
            return facts(module.tower)
        case SiglipText():
            return dict(activation="gelu_tanh", heads=module.heads, epsilon=1e-6, causal=False, pool="last")
        case TipsText():
            return dict(activation="relu", heads=module.heads, epsilon=module.epsilon)
        case Bert():
            return dict(activation="gelu", heads=module.heads, epsilon=1e-12)
        case ConvNeXt():
            return dict(epsilon=module.epsilon)
        case Swin():
            return dict(activation="gelu", epsilon=1e-5)
        case ResNet():
            return dict(activation="relu", stride_in_first_convolution=False)
        case EfficientNet():
            return dict(activation="swish", epsilon=1e-3)
        case UPerNet(backbone=TapPyramid(tower=tower)):
            return dict(pools=list(module.pools), **facts(tower), taps=[i + 1 for i in tower.taps])
        case UPerNet():
            return dict(pools=list(module.pools))
        case MaskFormer(net=Mask2FormerNet() as net):
            return dict(facts(net.backbone), decoder_heads=net.head.heads, decoder_activation="relu")
        case MaskFormer(net=net):
            return dict(facts(net.backbone), decoder_heads=net.heads, decoder_activation="relu")
    return {}


def _stated(config: Mapping[str, Any], module: nn.Module, format_: str) -> Facts:
    """Returns the properties in a file of the tower that is loaded, as in `facts`, or `refused` with the reason."""
    side = "text" if isinstance(module, TextTower | GroupVitText) else "vision"
    if format_ == "ours":
        same_kind = config.get("kind") == type(module).__name__
        return {k: v for k, v in config.items() if k != "taps"} if same_kind else {}
    if "model_cfg" in config:
        return _of_open_clip(config["model_cfg"], side, format_)
    if "architecture" in config or format_ in _OF_ONE_ARCHITECTURE:
        return _of_timm(config.get("architecture"), config, format_)
    if format_ in (_MASKFORMER, _MASK2FORMER) and "model_type" in config:
        return _of_maskformer(config, module, format_)
    if "model_type" in config:
        return _of_transformers(config, side, format_)
    return {}


def _of_transformers(config: Mapping[str, Any], side: str, format_: str) -> Facts:
    if format_ == "transformers' UPerNet" and config["model_type"] == "upernet":
        return _of_upernet(config)
    if format_ not in _HF:
        return {}
    types, stated = _HF[format_]
    if config["model_type"] not in types:
        return {
            "refused": f"its model_type is {config['model_type']!r}, but {format_} has {' or '.join(types)}"
        }
    stated = {fact: value[side] if isinstance(value, dict) else value for fact, value in stated.items()}
    section = config.get(f"{side}_config", config)
    for fact, theirs in _HF_NAMES:
        if fact in stated and theirs in section:
            stated[fact] = section[theirs]
    if "activation" in stated:
        stated["activation"] = _OF_HF.get(stated["activation"], stated["activation"])
    if section.get("use_swiglu_ffn"):
        stated["activation"] = "swiglu"
    return stated


def _of_upernet(config: Mapping[str, Any]) -> Facts:
    tower = config.get("backbone_config") or {}
    stated: Facts = dict(pools=list(config.get("pool_scales", (1, 2, 3, 6))))
    if tower.get("model_type") == "beit":
        biased = ("use_relative_position_bias", "use_shared_relative_position_bias")
        if used := [key for key in biased if tower.get(key)]:
            return {"refused": f"its BEiT has {used[0]}, which this ViT lacks"}
        names = [f"stage{i}" for i in range(tower.get("num_hidden_layers", 12) + 1)]
        stated |= dict(
            heads=tower.get("num_attention_heads", 12),
            epsilon=tower.get("layer_norm_eps", 1e-12),
            activation=_OF_HF.get(tower.get("hidden_act", "gelu"), tower.get("hidden_act")),
            taps=tower.get("out_indices") or [names.index(name) for name in tower.get("out_features", ())],
        )
    return stated


def _of_maskformer(config: Mapping[str, Any], module: nn.Module, format_: str) -> Facts:
    """Returns the properties of the decoder and of the backbone."""
    kind = "maskformer" if format_ == _MASKFORMER else "mask2former"
    if config["model_type"] != kind:
        return {"refused": f"its model_type is {config['model_type']!r}, but {format_} has {kind}"}
    second = kind == "mask2former"
    if second and (used := [key for key in ("pre_norm", "enforce_input_projection") if config.get(key)]):
        return {"refused": f"it has {used[0]}, which this decoder lacks"}
    decoder = config if second else config.get("decoder_config") or {}
    backbone = config.get("backbone_config") or {}
    resnet = isinstance(module, MaskFormer) and isinstance(module.net.backbone, ResNet)
    tower = "ResNet" if resnet else "SwinBackbone"
    stated = {
        "decoder_heads": decoder.get("num_attention_heads" if second else "decoder_attention_heads", 8),
        "decoder_activation": decoder.get("activation_function", "relu"),
    }
    default = {"model_type": "resnet" if resnet else "swin"}
    return stated | _of_transformers({**default, **backbone}, "vision", f"transformers' {tower}")


def _of_timm(architecture: Any, config: Mapping[str, Any], format_: str) -> Facts:
    if format_ not in _TIMM:
        return {}
    if architecture is None:
        return {
            "refused": f"it is unclear which of timm's models it is, since several have these names: add a config.json "
            f'beside it with {{"architecture": ...}}, which must match {_TIMM[format_]}'
        }
    name = re.sub(r"(_ns|_ap|_in22k|_in22ft1k|_in21k)$", "", architecture.partition(".")[0])
    if not re.fullmatch(_TIMM[format_], name):
        return {"refused": f"its architecture {architecture!r} is not supported ({_TIMM[format_]} are)"}
    if "ConvNeXt" in format_:
        return dict(epsilon=1e-5 if "xxlarge" in name else 1e-6)
    if format_ == "timm's EVA":
        rotary = re.match(r"eva02_(tiny|small|base|large)", name)
        return dict(post_norm="enormous" in name, rope_grid=16 if rotary else None)
    if format_ != "timm's ViT":
        return {}
    stated: Facts = {"epsilon": 1e-5 if "_clip_" in name else 1e-6}
    if isinstance(width := config.get("num_features"), int):
        size = name.split("_")[1]
        stated["heads"] = 16 if size in _TIMM_16_HEADS else width // 64
    # timm builds SigLIP's towers with another GELU than the one of their training.
    return stated if "siglip" in name else stated | {"activation": _gelu("quickgelu" in name, {})}


def _of_open_clip(model: Mapping[str, Any], side: str, format_: str) -> Facts:
    tower = model.get(f"{side}_cfg") or {}
    if side == "vision" and tower.get("timm_model_name"):
        return _of_timm(tower["timm_model_name"], {}, format_)
    if side == "text" and tower.get("hf_model_name"):
        return {"refused": f"its text tower is {tower['hf_model_name']!r} of transformers"}
    stated: Facts = {
        "activation": _gelu(bool(model.get("quick_gelu")), tower.get("act_kwargs") or {}),
        "epsilon": (tower.get("norm_kwargs") or {}).get("eps", 1e-5),
    }
    if side == "vision":
        return stated | {"heads": tower.get("width", 768) // tower.get("head_width", 64)}
    if format_ == "open_clip's SigLIP" and stated["activation"] == "gelu":
        del stated["activation"]  # As with timm's image towers, training used the tanh approximation.
    return stated | {
        "heads": tower.get("heads", 8),
        "causal": not tower.get("no_causal_mask", False),
        "pool": tower.get("pool_type", "argmax"),
    }


def _gelu(quick: bool, options: Mapping[str, Any]) -> str:
    return "quick_gelu" if quick else "gelu_tanh" if options.get("approximate") == "tanh" else "gelu"


def _equal(fact: str, theirs: Any, own: Any) -> bool:
    if fact == "epsilon" and isinstance(theirs, int | float):
        # Variances of activations are far above 1e-6, so 1e-12 in a library equals the authors' 1e-6.
        return math.isclose(max(theirs, 1e-6), max(own, 1e-6), rel_tol=1e-3)
    return theirs == own
