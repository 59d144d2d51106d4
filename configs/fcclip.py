"""FC-CLIP (Yu et al. 2023, Convolutions Die Hard): one frozen convolutional CLIP for masks and for their names.

  python -m ovseg_jax.main --config=configs/fcclip.py
      on `scenes`, which is generated on the fly: first a small CLIP with a ConvNeXt is trained on single things, then
      masks and head on its frozen trunk; 15 and 5 minutes of one core (reckoned from 60 steps of each). One seed: PQ of
      23.8, AP of 16.1, mIoU of 14.7 on seen pairs, 1.9 held out, 86.7 on stuff. Masks are found; so few steps do not
      teach the names of things.
  python -m ovseg_jax.main --config=configs/fcclip.py:data=coco,data_dir=DIR
      the authors' recipe, COCO's panoptic masks with the CLIP ConvNeXt-L of the hub.
  python -m ovseg_jax.main --config=configs/fcclip.py:data=coco,data_dir=DIR,published=FILE
      evaluates the published fcclip_cocopan.pth on COCO's validation images, without training it.

With Python, the published model segments images by words: `Segmenter.from_pretrained("fcclip_convnext_l", FILE)`. PQ,
AP and mIoU of the authors' model on ADE20K: 26.8, 16.8 and 34.1. None of these has been reproduced yet.

Source: bytedance/fc-clip, configs/coco/panoptic-segmentation, "code". Everything else is ours.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, mask2former, pomp
from ovseg_jax.configs.maskformer import sources
from ovseg_jax.methods.fcclip import published_config


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "coco", "folder", "prepared"),
        data_dir="",
        val_dir="",  # data=folder, prepared: the folder to evaluate on; by default none
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes, or one of the package, such as coco_panoptic
        images=AtLeast(10_000, 1),  # data=scenes: number of training images
        weights="",  # the CLIP, if not on the hub: a folder or file
        published="",  # a published FC-CLIP's file: it is evaluated, and not trained
        tokenizer="",  # with published: the folder of CLIP's tokeniser, if not on the hub
        trust=0.0,  # 0.5 for OVRCOAT's rule, see `methods.fcclip`
        seed=0,
    )
    config = on_scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    args.check_read()
    return config


def small_clip(seed: int) -> ConfigDict:
    """Returns the small CLIP of configs/pomp.py, with a ConvNeXt of two stages as image tower (ours)."""
    config = pomp.small_clip(seed)
    config.towers.image = dict(name="convnext", depths=(1, 2), width=48, embed_dim=64)
    return config


def head_on_scenes(trust: float, prompt: Any) -> dict[str, Any]:
    """Returns the head's sections of a run on the embedded data. All numbers are ours."""
    return dict(
        model=dict(
            num_queries=10,
            width=64,
            mask_dim=64,
            layers=3,
            heads=4,
            ffn=128,
            encoder_layers=1,
            encoder_ffn=128,
            encoder_points=4,
            init="",
            remat="none",
            dtype="float32",
        ),
        fcclip=dict(prompt=prompt, seen=0.4, unseen=0.8, trust=trust, short=0, longest=0),
        loss=dict(mask2former.loss(), points=512),
        optimizer=common.adamw_of_scenes(),
    )


def on_scenes(args: Args) -> ConfigDict:
    """Returns a small FC-CLIP on the embedded data. All numbers are ours."""
    clip = small_clip(args.seed)
    config = common.run(
        "fcclip",
        steps=1500,
        batch_size=16,
        towers=dict(clip.towers.to_dict(), init="stage:clip", tokenizer="stage:clip"),
        **head_on_scenes(args.trust, "a photo of a {}"),
        **common.masks_on_scenes(args.images, every=500),
    )
    config.final_evals.update(common.panoptic(config.final_evals.test))
    config.stages = common.train_stages(clip=clip)
    return config


def recipe(own: ConfigDict, train: list[dict[str, Any]], size: int, **changes: Any) -> ConfigDict:
    """Returns the authors' training on COCO's panoptic masks.

    Args:
      own: the sections `towers`, `model` and `fcclip`.
      train: the sources of images.
      size: side of the crops.
      **changes: further keys.
    """
    return common.run(
        "fcclip",
        **dict(
            steps=368_750,  # code
            batch_size=16,  # code
            towers=own.towers.to_dict(),
            model=own.model.to_dict(),
            fcclip=own.fcclip.to_dict(),
            loss=mask2former.loss(),  # code
            optimizer=dict(
                common.adamw(1e-4, warmup_steps=0, weight_decay=0.05, clip_norm=0.01),  # code
                # Code: embeddings do not decay.
                no_decay=("/query_features$", "/query_positions$", "/decoder/level_embedding$"),
                schedule="steps",
                drops=(327_778, 355_092),  # code
            ),
            data=dict(
                train=train,
                image_size=size,
                mask_stride=1,  # points are drawn on the masks at the size of the image
                max_masks=64,  # ours
                scale_jitter=(0.1, 2.0),  # code
                flip=True,
                workers=8,
            ),
            checkpoint=common.checkpoint(every=1000),
            **changes,
        ),
    )


def paper(args: Args) -> ConfigDict:
    """Returns the authors' recipe for COCO's panoptic masks.

    It differs from theirs in that images are evaluated on squares: with a longer side of 1,344 pixels, where theirs
    have a shorter side of 800 and a longer one of at most 1,333, as `Segmenter` has them.
    """
    train, validation = sources(args)
    own = published_config(
        "fcclip_convnext_l", args.published, args.tokenizer if args.published else "", args.trust
    )
    if not args.published:
        own.towers.init = args.weights or own.towers.init
        own.towers.tokenizer = args.weights or own.towers.tokenizer
        own.model.update(remat="dots", dtype="bfloat16")  # ours; code: half precision
        own.towers.dtype = "bfloat16"
    evals: dict[str, Any] = {}
    if validation:
        evals = dict(validation=common.segmentation(validation, 8, image_size=1344, every=5000))
    config = recipe(own, train, 1024, evals=evals, final_evals=evals)  # 1024: code
    if args.published:
        config.steps = 0
    if validation:
        config.final_evals.update(common.panoptic(config.final_evals.validation))
    return config
