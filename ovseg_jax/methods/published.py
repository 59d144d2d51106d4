"""Published models that segment by words without training here, by name, for `Segmenter.from_pretrained`.

All but FC-CLIP are towers of images and texts as `methods.clip_dense` uses them. Scores are those that their authors or
the authors of the features state; licences are those of the cards or files beside the weights, see below.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.methods.clip_dense import LAST, ClipDense
from ovseg_jax.methods.fcclip import published_fcclip
from ovseg_jax.models.eva import PRESETS as EVA
from ovseg_jax.models.vit import PRESETS as VIT
from ovseg_jax.pretrained import tips
from ovseg_jax.pretrained.files import has_weights
from ovseg_jax.pretrained.hub import find
from ovseg_jax.pretrained.published import pixels_of, weights_of
from ovseg_jax.pretrained.stated import stated_pixels
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

CANVAS = 448  # the side of the input, for patches of 14, 16 and 32 pixels; that of TIPSv2's and ClearCLIP's protocols


class Published(NamedTuple):
    """A published model.

    Attributes:
      millions: parameters of both towers.
      licence: of the weights.
      score: a published score, with its source.
      text: its text tower, a name of `models.text_towers.PRESETS`.
      scale: 1/τ of the training's softmax, where the files do not state it.
      prompt: the templates of class names, see `towers.templates.read_templates`.
      protocol: the published evaluation of `decisions.published.DECISIONS` that suits it.
      image: its image tower, if it has another name than the model.
    """

    millions: int
    licence: str
    score: str
    text: str
    scale: float = 100.0
    prompt: str = "imagenet"
    protocol: str = "clearclip"
    image: str = ""


# Sources of the licences: the cards on the Hugging Face hub of google/tipsv2-*, google/siglip2-*, laion/CLIP-ViT-* and
# timm/eva02_*_clip_*; LICENSE of openai/CLIP and of bytedance/fc-clip. For other towers we have found no score of their
# authors for segmentation without training.
_TIPS: dict[str, Any] = dict(
    licence="Apache-2.0",
    scale=1 / 0.005065968260169029,  # transformers, models/tipsv2/configuration_tipsv2.py
    prompt="tcl",
    protocol="tipsv2",
)
# The column ADE150-ZS.
_README = "ADE20K-150 {} mIoU (google-deepmind/tips, README)"
_SIGLIP: dict[str, Any] = dict(licence="Apache-2.0", score="")

PUBLISHED: dict[str, Published] = {
    "tipsv2_b14": Published(196, score=_README.format(17.4), text="tipsv2_b14", **_TIPS),
    "tipsv2_l14": Published(488, score=_README.format(24.7), text="tipsv2_l14", **_TIPS),
    "tipsv2_so400m14": Published(862, score=_README.format(23.3), text="tipsv2_so400m14", **_TIPS),
    "tipsv2_g14": Published(1525, score=_README.format(17.8), text="tipsv2_g14", **_TIPS),
    "clip_vitb32": Published(151, "MIT", "", "clip_vitb32"),
    "clip_vitb16": Published(
        150, "MIT", "ADE20K-150 16.45 mIoU by sclip (wangf3014/SCLIP, README)", "clip_vitb16"
    ),
    "clip_vitl14": Published(428, "MIT", "", "clip_vitl14"),
    "clip_vitl14_336": Published(428, "MIT", "", "clip_vitl14_336"),
    "openclip_vitb16": Published(150, "MIT", "", "openclip_vitb16"),
    "openclip_vitl14": Published(428, "MIT", "", "openclip_vitl14"),
    "openclip_vith14": Published(986, "MIT", "", "openclip_vith14"),
    "eva02_clip_b16": Published(150, "MIT", "", "eva02_clip_b16"),
    "eva02_clip_l14": Published(428, "MIT", "", "eva02_clip_l14"),
    "eva02_clip_l14_336": Published(428, "MIT", "", "eva02_clip_l14_336"),
    "siglip2_b16": Published(375, text="siglip2_base", image="siglip_vitb16", **_SIGLIP),
    "siglip2_b16_512": Published(376, text="siglip2_base", image="siglip_vitb16_512", **_SIGLIP),
    "siglip2_l16_384": Published(882, text="siglip2_large", image="siglip_vitl16_384", **_SIGLIP),
    "siglip2_so400m14_384": Published(1136, text="siglip2_so400m", image="siglip_so400m14_384", **_SIGLIP),
    "fcclip_convnext_l": Published(
        373,
        "Apache-2.0",
        "ADE20K-150 34.1 mIoU, 26.8 PQ (bytedance/fc-clip, README)",
        "clip_convnext_large_d_320",
        prompt="vild",
        protocol="",
    ),
}


# Parts of names that people ask for, and the reason why there is no such model.
LEFT_OUT = {
    "naflex": "only SigLIP 2's models of fixed sizes are supported, such as siglip2_b16_512",
    "dinotxt": "transformers has no class for dino.txt, to which its features could be compared",
}


def place_of(name: str) -> str:
    """Returns where the weights of a published model are, see `pretrained.hub`; for FC-CLIP the name of its file."""
    if name.startswith("fcclip"):
        return "a file: fcclip_cocopan.pth of bytedance/fc-clip"
    return weights_of(PUBLISHED[name].image or name)


def listed() -> str:
    """Returns a table of all models for people."""
    lines = [("model", "millions", "licence", "published score", "protocol", "weights")]
    for name, model in PUBLISHED.items():
        row = (name, str(model.millions), model.licence, model.score or "-", model.protocol or "-")
        lines.append((*row, place_of(name)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=False)] + [line[-1]] for line in lines]
    return "\n".join("  ".join(cells) for cells in padded)


def entry(name: str) -> Published:
    """Returns a published model.

    Raises:
      UserError: the name is unknown.
    """
    for part, reason in LEFT_OUT.items():
        if part in name.lower().replace(".", "").replace("_", ""):
            raise UserError(f"the model {name!r} is left out: {reason}")
    if name not in PUBLISHED:
        raise UserError(f"the model {name!r} is not one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def image_section(name: str) -> dict[str, Any]:
    """Returns the image tower of a published model, as `towers.clip.image_tower` and `build_backbone` take it.

    Positions are resized as where the weights are: in transformers and in open_clip.

    Args:
      name: a key of PUBLISHED, of towers; or the name of another tower, which is returned unchanged.
    """
    image: dict[str, Any] = dict(name=(PUBLISHED[name].image or name) if name in PUBLISHED else name)
    for prefix, resize in (("siglip", "bicubic"), ("openclip", "antialias")):
        if image["name"].startswith(prefix):
            image["resize"] = resize
    return image


def towers_section(name: str, weights: str = "", tokenizer: str = "") -> dict[str, Any]:
    """Returns the section `towers` of a config for a published model; nothing is downloaded.

    Mean and standard deviation of pixels are those of the files beside the weights, where there are some on this disk.

    Args:
      name: a key of PUBLISHED, of towers.
      weights: see `published_model`.
      tokenizer: see `published_model`.

    Raises:
      UserError: the name is unknown, or a file cannot be read.
    """
    model, init = entry(name), weights or place_of(name)
    image, text = image_section(name), dict[str, Any](name=model.text)
    pixels = pixels_of(image["name"])
    where = Path(init).expanduser()
    if where.exists():
        pixels = stated_pixels(_folder(where)) or pixels
        if _is_jax_tips(where):
            # The published JAX code has Flax's GELU, which is the approximation, and Flax's epsilon.
            text["epsilon"] = 1e-6
            if name != "tipsv2_g14":
                image["activation"] = "gelu_tanh"
    return dict(
        image=image,
        text=text,
        init=init,
        tokenizer=tokenizer,
        image_size=_native(image["name"]),
        mean=pixels.mean,
        std=pixels.std,
        logit_scale=model.scale,
        dtype="float32",
    )


def dense_config(name: str, weights: str = "", tokenizer: str = "", features: str = "") -> ConfigDict:
    """Returns the sections of a run of method "clip_dense" of 0 steps with published towers, after downloading them.

    Args:
      name: a key of PUBLISHED, of towers.
      weights: see `published_model`.
      tokenizer: see `published_model`.
      features: a key of `methods.clip_dense.LAST`; "" for "value".

    Raises:
      UserError: the name is unknown, or the weights or their files cannot be read.
    """
    entry(name)
    where = find(weights or place_of(name))
    return ConfigDict(
        dict(
            method="clip_dense",
            steps=0,
            towers=towers_section(name, str(where), tokenizer or str(_folder(where))),
            dense=dict(features=features or "value", prompt=PUBLISHED[name].prompt),
            data=dict(image_size=CANVAS),
        )
    )


def _folder(where: Path) -> Path:
    return where if where.is_dir() else where.parent


def _is_jax_tips(where: Path) -> bool:
    found = tips.file_of(where, True) if where.is_dir() and not has_weights(where) else None
    return found is not None and tips.is_tips(found) == tips.JAX


def _native(tower: str) -> int:
    fields = EVA.get(tower) or VIT[tower]
    grid = fields["grid"]
    return int(fields["patch"]) * (grid if isinstance(grid, int) else grid[0])


def published_model(
    name: str,
    weights: epath.PathLike = "",
    tokenizer: epath.PathLike = "",
    *,
    features: str = "",
    trust: float = 0.0,
    text: bool = True,
) -> tuple[Any, dict[str, Any], ClassList | None]:
    """Creates a published model for inference.

    Args:
      name: a key of PUBLISHED.
      weights: its folder or file, see `pretrained.hub`; by default it is downloaded from the hub.
      tokenizer: the folder of the text tower's tokeniser, if it is not with the weights.
      features: for towers, the features of patches, see `methods.clip_dense`; by default "value".
      trust: for FC-CLIP, see `methods.fcclip`.
      text: whether to read the text tower, for towers.

    Returns:
      The method, its variables, and its training classes or None.

    Raises:
      UserError: the name or a value is unknown or has no effect, or the weights are missing, damaged or of another
        model.
    """
    entry(name)
    weights, tokenizer = os.fspath(weights), os.fspath(tokenizer)
    if features and features not in LAST:
        raise UserError(f"features={features!r} is not one of {', '.join(LAST)}")
    if name.startswith("fcclip"):
        if features:
            raise UserError(f"features={features} has no effect on {name}, which has masks")
        method = published_fcclip(name, weights, tokenizer, trust)
        return method, method.pretrained(), method.classes
    if trust:
        raise UserError(f"trust={trust} has no effect on {name}, which has no masks")
    config = dense_config(name, weights, tokenizer, features)
    towers = ClipDense(config, WordList([]), ClassList())
    return towers, {"params": {}, **towers.pretrained(*(() if text else ("image",)))}, None
