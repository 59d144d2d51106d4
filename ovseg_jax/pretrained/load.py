"""Loading of published weights into our modules: found, recognised by their names, and checked against the module."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.clip_resnet import ClipResNet
from ovseg_jax.models.convnext import ConvNeXt
from ovseg_jax.models.convpass import ADAPTERS
from ovseg_jax.models.efficientnet import EfficientNet
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.groupvit import GroupVitImage, GroupVitText
from ovseg_jax.models.mask2former import Mask2FormerNet
from ovseg_jax.models.maskformer import MaskFormer
from ovseg_jax.models.position_weights import axis_weights
from ovseg_jax.models.pseudo_masks import TowerTokens
from ovseg_jax.models.resnet import ResNet
from ovseg_jax.models.swin import Swin
from ovseg_jax.models.tap_pyramid import TapPyramid
from ovseg_jax.models.text_towers import Bert, CLIPText, SiglipText, TextTower, TipsText
from ovseg_jax.models.tower_pyramid import TowerPyramid
from ovseg_jax.models.upernet import UPerNet
from ovseg_jax.models.vit import ViT
from ovseg_jax.pretrained import (
    clip_resnet,
    convnext,
    efficientnet,
    eva,
    groupvit,
    mask2former,
    maskformer,
    resnet,
    swin,
    text,
    tips,
    upernet,
    vit,
)
from ovseg_jax.pretrained.big_vision import read_big_vision
from ovseg_jax.pretrained.files import has_weights, read_arrays, weights_file
from ovseg_jax.pretrained.hub import find
from ovseg_jax.pretrained.rename import Rename, fit, rename
from ovseg_jax.pretrained.stated import check, check_pixels
from ovseg_jax.pretrained.to_torch import from_torch, torch_name

_LOG = logging.getLogger(__name__)

# The tower of a two-tower file of big_vision that belongs to a module.
TOWERS: dict[type[nn.Module], str] = {ViT: "img", SiglipText: "txt"}

# Parameters that published models lack: adapters beside the branches of blocks; the norms of a Swin's finer maps; in
# UPerNets, BEiT's keys have no bias, which has no effect under a softmax, and the final norm of its ViT is not used.
FRESH: dict[type[nn.Module], Sequence[str]] = {
    ViT: (ADAPTERS,),
    Eva: (ADAPTERS,),
    Swin: (r"out_norm[234]",),
    UPerNet: (r"tower/.*/key/bias$", r"tower/Transformer/encoder_norm/"),
}


def load(
    init: str,
    module: nn.Module,
    shapes: Mapping[str, Any],
    *,
    may_miss: Sequence[str] = (),
    pixels: tuple[Sequence[float], Sequence[float]] | None = None,
    copy: bool = True,
) -> dict[str, Any]:
    """Reads a module's variables from published weights; a ViT's or EVA's may have patches of another size.

    Args:
      init: see `hub.find`.
      module: the module to load the weights for.
      shapes: its variables, {"params": ..., "batch_stats": ...}, as arrays or shapes.
      may_miss: regexes of paths that the weights may lack; these are left out of the result. A ViT or EVA may always
        lack adapters, a Swin the norms of its finer maps, which published classifiers do not have, and a UPerNet the
        biases of keys and the final norm of its ViT.
      pixels: mean and standard deviation by which the caller normalises pixels, to compare with the published values
        if a file beside the weights states them.
      copy: whether to copy arrays; else they may be views of the file.

    Returns:
      NumPy arrays in a tree like `shapes`, in its dtypes.

    Raises:
      UserError: the weights are missing, cannot be read, or belong to another architecture or shape; or a file beside
        them describes another model than the module.
    """
    if isinstance(module, TowerPyramid | TapPyramid | TowerTokens):
        # Only the tower's weights are published; those of a pyramid are new.
        inner = {name: tree["tower"] for name, tree in shapes.items() if "tower" in tree}
        found = load(init, module.tower, inner, may_miss=may_miss, pixels=pixels)
        return {name: {"tower": tree} for name, tree in found.items()}
    path, format_ = find(init), "big_vision's"
    if path.is_dir() and not has_weights(path):
        path = tips.file_of(path, isinstance(module, TextTower)) or path
    if path.suffix == ".npz" and not tips.is_tips(path):
        arrays = read_big_vision(path, TOWERS.get(type(module), ""))
    else:
        path = weights_file(path)
        arrays = read_arrays(path)
        names = arrays.keys()
        if (own := from_ours(arrays, shapes)) is not None:
            format_, arrays = "ours", own
        else:
            if not isinstance(module, UPerNet | MaskFormer):
                arrays = without_wrapper(arrays)
            format_, renames = recognise(arrays, formats(module), path)
        check(path, module, format_, names)
        if pixels:
            check_pixels(path, *pixels)
    try:
        if format_ not in ("big_vision's", "ours"):
            arrays = rename(arrays, renames, copy=copy)
        if format_ == tips.TORCH:
            arrays = tips.joined(arrays)
        if isinstance(module, ViT | Eva):
            arrays = resize_patches(arrays, module.patch)
        return fit(arrays, shapes, may_miss=(*may_miss, *FRESH.get(type(module), ())), copy=copy)
    except UserError as error:
        raise UserError(f"init={init}, read as {format_}: {error}") from error


def without_wrapper(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes prefixes that training scripts add to names: `module.`, and `backbone.` beside a head's names.

    Full checkpoints of DINO and detectors with a Swin have them; from a file with `backbone.` only these arrays are
    kept.
    """
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): x for name, x in arrays.items()}
    own = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    return own or arrays


def resize_patches(arrays: dict[str, np.ndarray], patch: int) -> dict[str, np.ndarray]:
    """Resizes the kernel of a tower's patch embedding to `patch` x `patch` pixels, bicubically, and says so in the log.

    As EVA-CLIP's interpolate_patch_14to16.py, with PyTorch's `interpolate` without antialiasing. The table of positions
    keeps its grid, and the tower resizes it for each image.

    Args:
      arrays: arrays by our paths; those without a patch embedding are returned unchanged.
      patch: side of a patch in pixels.
    """
    path = "params/embedding/kernel"
    kernel = arrays.get(path)
    if kernel is None or kernel.ndim != 4 or kernel.shape[:2] == (patch, patch):
        return arrays
    rows, columns = kernel.shape[:2]
    _LOG.warning("resizing the patch embedding from %d x %d to %d x %d pixels", rows, columns, patch, patch)
    resized = np.einsum("pr,qc,rcio->pqio", axis_weights(rows, patch), axis_weights(columns, patch), kernel)
    return {**arrays, path: resized.astype(kernel.dtype)}


def from_ours(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Returns arrays that `to_torch` made of such variables, by path; None if the names differ.

    Raises:
      UserError: the names are the same, but the shapes differ.
    """
    flat = flax.traverse_util.flatten_dict(dict(shapes), sep="/")
    inner = {path.partition("/")[2]: path for path in flat}
    if arrays.keys() != {torch_name(path) for path in inner}:
        return None
    try:
        found = from_torch(arrays, {path: flat[whole].shape for path, whole in inner.items()})
    except ValueError as error:
        raise UserError(f"the checkpoint's arrays have other shapes than the model's: {error}") from error
    return {inner[path]: array for path, array in found.items()}


def formats(module: nn.Module) -> dict[str, list[Rename]]:
    """Returns the known formats of published weights of such a module: name -> renames.

    Raises:
      UserError: none is known.
    """
    match module:
        case ResNet():
            return {
                "torchvision's or timm's ResNet": resnet.from_torchvision_resnet(),
                "transformers' ResNet": resnet.from_hf_resnet(),
            }
        case EfficientNet():
            return {
                "timm's EfficientNet": efficientnet.from_timm_efficientnet(module.depth, module.lite),
                "transformers' EfficientNet": efficientnet.from_hf_efficientnet(),
                "EfficientNet-PyTorch": efficientnet.from_efficientnet_pytorch(),
            }
        case ClipResNet():
            return {
                "OpenAI's or open_clip's CLIP": clip_resnet.from_openai_clip_resnet(),
                "timm's CLIP ResNet": clip_resnet.from_timm_clip_resnet(),
            }
        case ConvNeXt(head_hidden=hidden):
            return {
                "open_clip's ConvNeXt": convnext.from_open_clip_convnext(),
                "timm's CLIP ConvNeXt": convnext.from_timm_clip_convnext(hidden),
            }
        case Swin():
            return {
                "timm's Swin": swin.from_timm_swin(module.heads),
                "the authors' Swin": swin.from_microsoft_swin(module.heads),
                "transformers' Swin": swin.from_hf_swin(module.heads),
                "transformers' SwinBackbone": swin.from_hf_swin(module.heads, backbone=True),
            }
        case UPerNet():
            return {"transformers' UPerNet": upernet.from_hf_upernet(module.backbone)}
        case ViT(heads=heads):
            return {
                "transformers' CLIP": vit.from_hf_clip(heads),
                "transformers' ViT": vit.from_hf_vit(heads),
                "transformers' SigLIP": vit.from_hf_siglip(heads),
                "OpenAI's or open_clip's CLIP": vit.from_openai_clip(heads),
                "timm's ViT": vit.from_timm_vit(heads),
                # Last, since it has all names of timm's.
                tips.TORCH: tips.from_tips_vision(heads),
                tips.JAX: tips.from_tips_jax(),
            }
        case Eva(heads=heads):
            return {"timm's EVA": eva.from_timm_eva(heads), "BAAI's EVA-CLIP": eva.from_eva_clip(heads)}
        case CLIPText(heads=heads):
            return {
                "transformers' CLIP": text.from_hf_clip_text(heads),
                "OpenAI's or open_clip's CLIP": text.from_openai_clip_text(heads),
            }
        case GroupVitImage(heads=heads):
            return {"transformers' GroupViT": groupvit.from_hf_groupvit_image(heads)}
        case GroupVitText(tower=tower):
            return {"transformers' GroupViT": groupvit.from_hf_groupvit_text(tower.heads)}
        case SiglipText(heads=heads):
            return {
                "transformers' SigLIP": text.from_hf_siglip_text(heads),
                "open_clip's SigLIP": text.from_openai_clip_text(heads),
            }
        case TipsText(heads=heads):
            return {tips.TORCH: tips.from_tips_text(heads), tips.JAX: tips.from_tips_jax()}
        case Bert(heads=heads):
            return {"transformers' BERT": text.from_hf_bert(heads, module.pool == "pooler")}
        case MaskFormer(net=Mask2FormerNet() as net):
            known = {"transformers' Mask2Former": mask2former.from_hf_mask2former(net)}
            if isinstance(net.backbone, Swin | ResNet):
                known["the authors' Mask2Former"] = mask2former.from_detectron2_mask2former(net)
            return known
        case MaskFormer(net=net):
            return {"transformers' MaskFormer": maskformer.from_hf_maskformer(net)}
    raise UserError(f"no format of published weights is known for a {type(module).__name__}")


def recognise(
    arrays: Mapping[str, np.ndarray], known: Mapping[str, list[Rename]], path: Path
) -> tuple[str, list[Rename]]:
    """Returns the format that matches most of the names.

    Raises:
      UserError: no format matches most of the names.
    """

    def count(renames: list[Rename]) -> int:
        patterns = [re.compile(r.pattern) for r in renames]
        return sum(any(p.fullmatch(name) for p in patterns) for name in arrays)

    wanted = {name: count([r for r in renames if r.target]) for name, renames in known.items()}
    best = max(wanted, key=lambda name: wanted[name])
    # In a file of two towers, the names of the other tower match too, and may be many more.
    if not wanted[best] or count(known[best]) < len(arrays) / 2:
        some = ", ".join(list(arrays)[:4])
        raise UserError(f"{path} is in none of the formats {', '.join(known)}: it holds {some}, ...")
    return best, known[best]
