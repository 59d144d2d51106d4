"""Published protocols of evaluation by name: how images are cut, and the decision with its settings.

Those not named otherwise are of NVlabs/GroupViT (segmentation/configs): shorter side 448, at most 2048, windows of 448
by steps of 224. Background is a score below a threshold, never a text. Our data sets keep their own class names, some
of which GroupViT's code changes.
"""

from collections.abc import Mapping
from typing import Any

from ovseg_jax.errors import UserError

SIZE, WINDOWS = 448, {"stride": 224, "short": 448, "longest": 2048}

_GROUPVIT: dict[str, float] = {
    "voc": 0.95,
    "context": 0.35,
    "coco_object": 0.95,
    # papers/002 evaluates on these and states no threshold: that of COCO (ours).
    "lvis": 0.95,
    "imagenet_s": 0.95,
}

DECISIONS: dict[str, Mapping[str, Any]] = {
    **{name: {"type": "groupvit", "threshold": least} for name, least in _GROUPVIT.items()},
    # Without background: the classes of every pixel.
    **{f"{name}_foreground": {"type": "groupvit", "threshold": 0.0} for name in _GROUPVIT},
    # Papers/002, C.1: VOC with MaskFormer's semantic inference. The threshold is not stated: ours.
    "pseg_voc": {"type": "semantic", "threshold": 0.5},
    "pseg_voc_foreground": {"type": "semantic", "threshold": 0.0},
    # The best name of every pixel, for methods without masks (CLIP, MaskCLIP).
    "pixels": {"type": "argmax"},
    "sclip": {"type": "argmax"},
    "clearclip": {"type": "argmax"},
    "tipsv2": {"type": "softmax"},
}
"""The decision of each protocol; those that end in "_foreground" have no background."""


_CUTS: dict[str, tuple[int, Mapping[str, Any]]] = {
    # wangf3014/SCLIP, configs/cfg_ade20k.py and clip_segmentor.py.
    "sclip": (224, {"stride": 112, "short": 336, "longest": 2048}),
    # mc-lan/ClearCLIP, configs/ and clearclip_segmentor.py.
    "clearclip": (448, WINDOWS),
    # google-deepmind/tips, pytorch/TIPS_zeroshot_segmentation.ipynb. There the longer side has no bound: ours.
    "tipsv2": (448, {"stride": 336, "short": 448, "longest": 4096, "resample": "bicubic"}),
}


def protocol(name: Any) -> dict[str, Any]:
    """Returns `image_size`, `windows` and `decision` of a protocol.

    Raises:
      UserError: there is no such protocol.
    """
    if name not in DECISIONS:
        raise UserError(f"the protocol {name!r} is not one of {', '.join(DECISIONS)}")
    size, windows = _CUTS.get(name, (SIZE, WINDOWS))
    return {"image_size": size, "windows": dict(windows), "decision": dict(DECISIONS[name])}
