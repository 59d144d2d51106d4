"""Blocks that the configs share; their arguments are the numbers that differ."""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError


def run(method: str, **own: Any) -> ConfigDict:
    """Returns a whole config: the keys that every run has, and those of `own`."""
    shared = dict(
        method=method,
        seed=0,
        accumulate=1,  # parts in which a batch goes through the network, where memory is short
        profile="",  # FIRST:STOP, steps to trace for XProf
        tensorboard=False,
        wandb="",  # a project of Weights & Biases, which gets the metrics, too
        mesh=dict(data=-1, fsdp=1),
        evals={},  # during training
        final_evals={},  # at the end
        log_every=20,
    )
    return ConfigDict({**shared, **own})


def adamw(learning_rate: float, **own: Any) -> dict[str, Any]:
    """Returns AdamW under a cosine."""
    return dict(dict(name="adamw", learning_rate=learning_rate, schedule="cosine", ema=0.0), **own)


def adamw_of_scenes(learning_rate: float = 2e-3, **own: Any) -> dict[str, Any]:
    """Returns AdamW for a few thousand steps on `scenes`. All numbers are ours."""
    numbers = dict(warmup_steps=100, final_fraction=0.02, weight_decay=1e-3, clip_norm=1.0, b1=0.9, b2=0.98)
    return adamw(learning_rate, **numbers, **own)


def masks_on_scenes(images: int, every: int) -> dict[str, Any]:
    """Returns data, evaluations and checkpoints of a run that learns masks on `scenes`. All numbers are ours.

    Args:
      images: number of training images.
      every: steps between two evaluations.
    """
    return dict(
        data=dict(
            train=[dict(scenes("train", images), cache=True)],
            image_size=64,
            mask_stride=1,
            max_masks=6,
            scale_jitter=(1.0, 1.0),
            flip=True,
            workers=0,
        ),
        evals=dict(validation=segmentation(scenes("validation", 200), 64, every=every)),
        final_evals=dict(test=segmentation(scenes("test", 500), 64)),
        checkpoint=checkpoint(every=500, keep=2),
    )


def sgd(learning_rate: float, **own: Any) -> dict[str, Any]:
    """Returns SGD with momentum 0.9 under a cosine."""
    return dict(name="sgd", learning_rate=learning_rate, schedule="cosine", momentum=0.9, ema=0.0, **own)


VIT_NAMES = ("(embedding/|pos_embedding$|cls$)", "Transformer/encoderblock_{}/")
"""The names of the embeddings and of a block of a tower, for `layer_decay`: of `models.vit.ViT`."""
EVA_NAMES = ("(embedding/|pos_embedding$|cls$)", "blocks_{}/")  # of models.eva.Eva
TEXT_NAMES = ("(Embed_0/|pos_embedding$)", "Encoder_0/encoderblock_{}/")  # of models.text_towers.CLIPText


def layer_decay(
    rate: float, depth: int, tower: str, names: tuple[str, str] = VIT_NAMES, factor: float = 1.0
) -> tuple[tuple[str, float], ...]:
    """Returns `optimizer.multipliers` of layer-wise decay for a tower, as BEiT and MAE are fine-tuned.

    With n blocks, block i has the factor rate^(n - i), the embeddings have rate^(n + 1), all other parameters 1.

    Args:
      rate: the factor from one block to the one before it.
      depth: n.
      tower: the path of the tower, such as "image/backbone/tower".
      names: regular expressions of its embeddings and of block {}.
      factor: multiplies all factors of the tower; other than 1, it is also that of its other parameters.
    """
    embeddings = (f"^{tower}/{names[0]}", factor * rate ** (depth + 1))
    blocks = ((f"^{tower}/{names[1].format(i)}", factor * rate ** (depth - i)) for i in range(depth))
    rest = ((f"^{tower}/", factor),) if factor != 1 else ()
    return (embeddings, *blocks, *rest)


def short_side(size: int, lowest: float = 0.5, highest: float = 2.0) -> dict[str, Any]:
    """Returns the crops of MaskFormer's and Mask2Former's ADE20K configs (MIN_SIZE_TRAIN, CROP, COLOR_AUG_SSD).

    Args:
      size: the side of the crops in pixels.
      lowest: the shortest shorter side of an image, in crops.
      highest: the longest.
    """
    return dict(ratio=(lowest, highest), long_side=4 * size, category_share=1.0, flip=True, colours=True)


def checkpoint(every: int, keep: int = 1) -> dict[str, Any]:
    """Returns how often to save, and how many checkpoints to keep."""
    return dict(every=every, keep=keep)


def scenes(split: str, count: int) -> dict[str, Any]:
    """Returns the embedded scenes of 64 px."""
    return dict(name="scenes", split=split, num_examples=count, image_size=64, size="small")


def colour_masks() -> dict[str, Any]:
    """Returns the pseudo-mask generator for `scenes`: k-means on colours and positions. All numbers are ours.

    Its oracle mIoU is 85, 86 and 93 on seen pairs, held out and on stuff, see tests/benchmarks/README.md.
    """
    return dict(
        features="colour", clusters=6, start="kmeans++", stride=2, mask_stride=1, blur=2.0, position=0.15
    )


def dino_masks(weights: str) -> dict[str, Any]:
    """Returns the pseudo-mask generator of papers/002, C.1, with DINO's weights from a folder or the hub."""
    return dict(
        features="tower",
        backbone=dict(name="dino_vits8", init=weights),  # C.1
        # 3.3.1 does not say which tokens: those after the final norm, as they are. keys: of the last attention.
        layer="tokens",
        normalise=False,
        clusters=8,  # K, C.1
        mask_stride=4,  # the stride of P-Seg's masks: ours
        start="farthest",  # ours, or kmeans++
        iterations=12,  # ours
    )


def without_shortcuts(channels: float = 0.65, blur: float = 0.25) -> list[dict[str, Any]]:
    """Returns augmentations of whole batches of scenes, for methods that learn words one by one.

    Whole batches lose their colour and the words for it; others lose their texture and the words for things. Otherwise
    the network learns which colours and nouns never occur together, and so never the held-out pairs.

    Args:
      channels: the share of the batches that lose their colour, which becomes 0.4 in the end. With more, the colours of
        held-out pairs are confused with similar ones of seen pairs.
      blur: the share of the others that lose their texture. With more, nouns are confused.
    """
    return [
        dict(name="channels", probability=channels, probability_end=0.4, drop=("lexicon:colour",)),
        dict(
            name="blur",
            probability=blur,
            factor=8,
            mask_weight=0.1,
            drop=("pos:noun",),
            spare=("lexicon:stuff",),
        ),
    ]


def segmentation(source: dict[str, Any], batch_size: int, **own: Any) -> dict[str, Any]:
    """Returns an evaluation of segmentation with the predicted masks."""
    return dict(type="segmentation", masks=("predicted",), source=source, batch_size=batch_size, **own)


def panoptic(like: Any) -> dict[str, dict[str, Any]]:
    """Returns evaluations of panoptic and instance segmentation on the images of another evaluation."""
    own = dict(source=like.source, batch_size=like.batch_size)
    return dict(panoptic=dict(type="panoptic", **own), instances=dict(type="instances", **own))


def classification(source: dict[str, Any], batch_size: int, **own: Any) -> dict[str, Any]:
    """Returns an evaluation of whole images."""
    return dict(type="classification", source=source, batch_size=batch_size, **own)


def train_stages(**stages: ConfigDict) -> list[dict]:
    """Returns `config.stages` of runs that come first, by their names."""
    return [dict(name=name, kind="train", config=config) for name, config in stages.items()]


# The sets of papers/002, Tables 2 to 4 and 7, by the folder's name: the protocol, and what is background.
BACKGROUND = {
    "VOC": ("voc", "background"),  # prepare voc_2012 --option=background=class
    "Context": ("context", "void"),  # prepare pascal_context_59
    "COCO-Object": ("coco_object", "void"),  # prepare coco_object
    "LVIS": ("lvis", "void"),  # prepare lvis_v1
    "ImageNet-S": ("imagenet_s", "void"),  # prepare imagenet_s
}


def by_protocol(
    folder: str, sets: str, sets_are: str, background: bool, batch_size: int, **own: Any
) -> dict[str, dict[str, Any]]:
    """Returns evaluations as GroupViT does them (`ovseg_jax.decisions.published`), with or without background.

    Args:
      folder: the folder of the sets.
      sets: names of `BACKGROUND`, separated by `;`.
      sets_are: "prepared", as `python -m ovseg_jax.prepare` writes them, or "folders" (kind=semantic).
      background: whether background pixels are scored.
      batch_size: images over all processes.
      **own: keys that replace those of the protocols, such as `decision`.

    Raises:
      UserError: a set is unknown, or none is named.
    """
    form = (
        dict(name="prepared", split="val") if sets_are == "prepared" else dict(name="folder", kind="semantic")
    )
    found = {}
    for name in filter(None, sets.split(";")):
        if name not in BACKGROUND:
            raise UserError(f"sets={name} is not one of {', '.join(BACKGROUND)}")
        protocol, void = BACKGROUND[name]
        rules = dict(protocol=protocol, background=void)
        if not background:
            rules = dict(protocol=f"{protocol}_foreground") | (dict(ignore=void) if void != "void" else {})
        found[name] = segmentation(dict(form, data_dir=f"{folder}/{name}"), batch_size, **{**rules, **own})
    if not found:
        raise UserError(f"sets is empty: name some of {', '.join(BACKGROUND)}")
    return found
