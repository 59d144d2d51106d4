"""Published FC-CLIP checkpoints (bytedance/fc-clip, detectron2's names), as variables of `methods.fcclip`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.models.fcclip import FCClipHead
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.pretrained.files import read_arrays, weights_file
from ovseg_jax.pretrained.hub import find
from ovseg_jax.pretrained.load import formats
from ovseg_jax.pretrained.mask2former import from_detectron2_head
from ovseg_jax.pretrained.rename import Rename, fit, inside, linear, norm, rename
from ovseg_jax.pretrained.text import from_openai_clip_text

_CLIP = "backbone.clip_model."


def from_fcclip_head(head: FCClipHead) -> list[Rename]:
    """Returns the renames of everything but the CLIP inside of a checkpoint."""
    ours, theirs = "params/classifier", r"sem_seg_head\.predictor\."
    return [
        Rename(r"void_embedding\.weight", f"{ours}/void", lambda x: x[0]),
        Rename(rf"{theirs}logit_scale", f"{ours}/scale"),
        *norm(rf"{theirs}_mask_pooling_proj\.0", "params/classifier/pooled_norm"),
        *linear(rf"{theirs}_mask_pooling_proj\.1", "params/classifier/pooled"),
        *linear(rf"{theirs}class_embed\.layers\.(\d)", r"params/classifier/mlp_\1"),
        *inside(from_detectron2_head(head.masks.heads), r"sem_seg_head\.", "masks"),
        # The weights of the loss follow from the number of classes.
        Rename(r"criterion\.empty_weight", ""),
    ]


def load_fcclip(
    init: str, image: nn.Module, text: CLIPText, head: FCClipHead, shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads a whole FC-CLIP.

    Args:
      init: see `hub.find`.
      image: the image tower, a ConvNeXt.
      text: the text tower.
      head: everything behind the trunk.
      shapes: the variables of the three, {"image": ..., "text": ..., "head": ...}, as arrays or shapes.

    Returns:
      NumPy arrays in a tree like `shapes`, and "scale", CLIP's log(1/τ).

    Raises:
      UserError: the file is missing or damaged, or a name or shape is not that of this model.
    """
    path = weights_file(find(init))
    arrays = read_arrays(path)
    clip = {name.removeprefix(_CLIP): x for name, x in arrays.items() if name.startswith(_CLIP)}
    rest = {name: x for name, x in arrays.items() if not name.startswith(_CLIP)}
    if "logit_scale" not in clip:
        raise UserError(f"{path} is no checkpoint of FC-CLIP: it holds no {_CLIP}logit_scale")
    renames = {
        "image": (clip, formats(image)["open_clip's ConvNeXt"]),
        "text": (clip, from_openai_clip_text(text.heads)),
        "head": (rest, from_fcclip_head(head)),
    }
    found: dict[str, Any] = {"scale": np.asarray(clip["logit_scale"], np.float32)}
    for part, (own, names) in renames.items():
        try:
            found[part] = fit(rename(own, names), shapes[part])
        except UserError as error:
            raise UserError(f"{path}, read as FC-CLIP's {part}: {error}") from error
    return found
