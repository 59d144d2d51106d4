"""Mask2Former (Cheng et al. 2022), masks with classes of a closed vocabulary.

  python -m ovseg_jax.main --config=configs/mask2former.py
      trains on `scenes`, which is generated on the fly: 1,500 steps, 9 minutes on one busy core. One seed: PQ of 44.3
      (49.8 on seen pairs, 92.6 on stuff), AP of 51.8 on seen pairs, mIoU of 47.5 and 93.6. Held-out pairs are classes
      that it never sees: 0.
  python -m ovseg_jax.main --config=configs/mask2former.py:data=coco,data_dir=DIR,backbone=swin_tiny
      the authors' recipe for COCO panoptic segmentation. Their PQ: ResNet-50 51.9, ResNet-101 52.6, Swin-T 53.2, Swin-S
      54.6, Swin-B 55.1 (56.4 from ImageNet-21K), Swin-L 57.8 with 200 queries. None of these has been reproduced yet.
  python -m ovseg_jax.main --config=configs/mask2former.py:data=prepared,data_dir=DIR,val_dir=DIR,backbone=swin_small
      the authors' recipe for semantic segmentation of ADE20K-150, on a set that `python -m ovseg_jax.prepare` wrote.
  python -m ovseg_jax.main \\
    --config=configs/mask2former.py:data=prepared,data_dir=DIR,val_dir=DIR,backbone=swin_small,published=hf:OWNER/NAME
      evaluates a published Mask2Former, in Hugging Face's format or the authors' (published=model_final.pkl), without
      training it. The data must have its classes in its order.

Sources: facebookresearch/Mask2Former, configs/coco/panoptic-segmentation and configs/ade20k/semantic-segmentation,
"code". Everything else is ours.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.configs.maskformer import RESNETS, SWINS, sources
from ovseg_jax.pretrained.published import IMAGENET, weights_of


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "coco", "folder", "prepared"),
        data_dir="",
        val_dir="",  # data=folder, prepared: the folder to evaluate on; by default none
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes, or one of the package, such as ade20k_150
        images=AtLeast(10_000, 1),  # data=scenes: number of training images
        backbone=(*RESNETS, *SWINS),
        weights="",  # of the backbone, if not on the hub: a folder or file; scratch: none
        published="",  # weights of a whole Mask2Former: it is evaluated, and not trained
        queries=AtLeast(100, 1),  # code: 200 with Swin-L on COCO
        # at the end also PQ, and AP of things, on the same images
        evals=("panoptic", ""),
        seed=0,
    )
    config = on_scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    own = config.final_evals.get("test") or config.final_evals.get("validation")
    if args.evals == "panoptic" and own:
        config.final_evals.update(panoptic(own, 0.4 if args.data == "scenes" else 0.8))
    args.check_read()
    return config


def panoptic(like: Any, threshold: float) -> dict[str, dict[str, Any]]:
    """Returns evaluations of PQ and AP.

    Args:
      like: the evaluation whose images they share.
      threshold: the least probability of a segment's class: 0.8 (code); on scenes 0.4 (ours), since after so few steps
        probabilities are lower: with 0.8 PQ of seen pairs is 9.4 instead of 49.8.
    """
    found = common.panoptic(like)
    found["panoptic"]["decision"] = dict(
        type="panoptic",
        object_threshold=threshold,
        overlap_threshold=0.8,  # code
    )
    return found


def loss() -> dict[str, float]:
    """Returns the weights of costs and losses, and the number of points (code)."""
    return dict(mask=5.0, dice=5.0, label=2.0, no_object=0.1, points=12544)


def on_scenes(args: Args) -> ConfigDict:
    """Returns a small Mask2Former on the embedded data. All numbers are ours."""
    return common.run(
        "mask2former",
        steps=1500,
        batch_size=16,
        model=dict(
            backbone=dict(name="small", width=48, levels=3),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            num_queries=10,
            width=64,
            mask_dim=64,
            layers=3,
            heads=4,
            ffn=128,
            encoder_layers=1,
            encoder_ffn=128,
            encoder_points=4,
            deep_supervision=True,
            init="",
            remat="none",
            dtype="float32",
        ),
        loss=dict(loss(), points=512),
        optimizer=common.adamw_of_scenes(1e-3),
        **common.masks_on_scenes(args.images, every=500),
    )


def paper(args: Args) -> ConfigDict:
    """Returns the authors' recipe for ADE20K-150, with data=coco that for COCO's panoptic masks.

    It differs from theirs: shorter sides may have any length between the bounds, not only tenths of a crop, and images
    are tested with their longer side at the size of the crop.
    """
    train, validation = sources(args)
    coco, swin = args.data == "coco", args.backbone in SWINS
    size = 1024 if coco else 640 if args.backbone in ("swin_base_384", "swin_large_384") else 512  # code
    backbone: dict[str, Any] = dict(name=args.backbone)
    if not args.published:
        backbone["init"] = "" if args.weights == "scratch" else args.weights or weights_of(args.backbone)
    # Detectors shift and fill all windows.
    backbone.update(dict(window_rule="always", drop_rate=0.3) if swin else dict(norm="frozen"))
    crops: dict[str, Any] = dict(short_side=common.short_side(size))
    if coco:
        crops = dict(scale_jitter=(0.1, 2.0), flip=True)  # code
    evals = {"validation": common.segmentation(validation, 16, every=5000)} if validation else {}
    optimizer = dict(
        common.adamw(1e-4, weight_decay=0.05, clip_norm=0.01),  # code
        multipliers=(("backbone/", 0.1),),  # code
        # Code: embeddings do not decay; biases of one axis do there, and not here.
        no_decay=(
            "/query_(features|positions)$",
            "/decoder/level_embedding$",
            *(("/relative_position_bias$",) if swin else ()),
        ),
    )
    if coco:
        optimizer.update(schedule="steps", drops=(327_778, 355_092))  # code
    else:
        optimizer.update(schedule="polynomial", power=0.9)  # code
    return common.run(
        "mask2former",
        steps=0 if args.published else 368_750 if coco else 160_000,  # code
        batch_size=16,
        model=dict(
            backbone=backbone,
            mean=IMAGENET.mean,
            std=IMAGENET.std,
            num_queries=args.queries,
            width=256,
            mask_dim=256,
            layers=9,
            heads=8,
            ffn=2048,
            encoder_layers=6,
            encoder_ffn=1024,
            encoder_points=4,
            deep_supervision=True,
            init=args.published,
            remat="dots",  # ours, for memory
            dtype="bfloat16",  # ours
        ),
        loss=loss(),
        optimizer=optimizer,
        data=dict(
            train=train,
            image_size=size,
            mask_stride=1,  # points are drawn on the masks at the size of the image
            max_masks=64,
            workers=8,
            **crops,
        ),
        evals=evals,
        final_evals=evals,
        checkpoint=common.checkpoint(every=1000),
    )
