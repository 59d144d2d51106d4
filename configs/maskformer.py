"""MaskFormer (Cheng et al. 2021), the supervised baseline with a closed vocabulary.

  python -m ovseg_jax.main --config=configs/maskformer.py
      trains on `scenes`, which is generated on the fly: 3,000 steps, 6 minutes on one busy core. One seed: mIoU of 44.9
      on seen pairs, 93.2 on stuff; held-out pairs are classes that it never sees: 0.
  python -m ovseg_jax.main --config=configs/maskformer.py:data=prepared,data_dir=DIR,val_dir=DIR,backbone=swin_small
      the authors' recipe for ADE20K-150, on a data set that `python -m ovseg_jax.prepare` wrote. Their mIoU: ResNet-50
      44.5, ResNet-101 45.5, Swin-T 46.7, Swin-S 49.8, Swin-B 52.7, Swin-L 54.1. None of these has been reproduced yet.
  python -m ovseg_jax.main --config=configs/maskformer.py:data=coco,data_dir=DIR,backbone=swin_small
      the authors' recipe for COCO panoptic segmentation.
  python -m ovseg_jax.main \\
    --config=configs/maskformer.py:data=prepared,data_dir=DIR,val_dir=DIR,backbone=swin_small,published=hf:OWNER/NAME
      evaluates a published MaskFormer, in Hugging Face's format, without training it. The data must have its classes
      in its order.

  python -m ovseg_jax.main \\
    --config=configs/maskformer.py:classes=text,data=prepared,data_dir=DIR,val_dir=DIR,prompt=FILE
      ZSSeg's MaskFormer, whose class names are embedded by CLIP's text tower, in the prompt of FILE: the first stage of
      papers/000, tables 4, 5 and 13. Classes that the prepared set withholds (COCO-Stuff 15 of 171, VOC 5 of 20) are
      not trained. `configs/pomp_segments.py:...,proposals=WORKDIR` is the second stage; configs/zsseg.py trains both.

Sources: facebookresearch/MaskFormer, configs/ade20k-150 and configs/coco-panoptic, "code"; for classes=text
amazon-science/prompt-pretraining, third_party/zsseg.baseline/configs/coco-stuff-164k-171, "zsseg". Everything else is
ours.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.published import IMAGENET, weights_of

RESNETS, SWINS = (
    ("resnet50", "resnet101"),
    ("swin_tiny", "swin_small", "swin_base_384", "swin_large_384"),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "coco", "folder", "prepared"),
        data_dir="",
        val_dir="",  # data=folder, prepared: the folder to evaluate on; by default none
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes, or one of the package, such as ade20k_150
        # closed: a class for each of the data; text: the embeddings of their names, by a frozen text tower, on scenes
        # by learned vectors of their words
        classes=("closed", "text"),
        prompt="",  # classes=text: around every name: the file of a learned prompt, a template, imagenet or vild
        text_weights="hf:openai/clip-vit-base-patch16",  # classes=text: the text tower and tokeniser
        unseen="",  # classes=text: classes not to train, of data that withholds none: coco_stuff | voc | "cow; ..."
        images=AtLeast(10_000, 1),  # data=scenes: number of training images
        backbone=(*RESNETS, *SWINS),
        weights="",  # of the backbone, if not on the hub: a folder or file; scratch: none
        published="",  # weights of a whole MaskFormer: it is evaluated, and not trained
        # at the end also PQ, and AP of things, on the same images
        evals=("", "panoptic"),
        seed=0,
    )
    config = on_scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    if args.classes == "text":
        with_text(config, args)
    if args.evals == "panoptic":
        own = config.final_evals.get("test") or config.final_evals.get("validation")
        if not own:
            raise UserError("evals=panoptic has no effect without val_dir=DIR")
        config.final_evals.update(common.panoptic(own))
    args.check_read()
    return config


def loss() -> dict[str, float]:
    """Returns the weights of costs and losses (code)."""
    return dict(focal=20.0, dice=1.0, label=1.0, no_object=0.1)


def with_text(config: ConfigDict, args: Args) -> None:
    """Classifies by the texts of class names, as ZSSeg does."""
    config.method = "maskformer_text"
    config.loss.update(dict(scale=100.0, unseen=args.unseen))  # zsseg
    if args.data == "scenes":
        config.model.update(dict(embed_dim=64, embed_hidden=64))
        config.text = dict(learned=True, vectors="")
        config.loss.scale = 20.0  # ours: vectors of words are learned
        return
    config.model.update(dict(embed_dim=512, embed_hidden=1024))  # zsseg
    config.text = dict(tower="clip_vitb16", init=args.text_weights, prompt=args.prompt)
    if args.unseen == "voc":  # zsseg, voc-11k-15: shorter sides of 0.5 to 1.5 times 640, and crops of 512
        config.steps, config.batch_size, config.data.image_size = 20_000, 16, 512
        config.data.short_side = common.short_side(512, 0.625, 1.875)
    elif args.data != "coco":  # zsseg
        config.steps, config.batch_size, config.data.image_size = 60_000, 32, 640
        config.data.short_side = common.short_side(640, 0.5, 1.5)


def on_scenes(args: Args) -> ConfigDict:
    """Returns a small MaskFormer on the embedded data. All numbers are ours."""
    return common.run(
        "maskformer",
        steps=3000,
        batch_size=16,
        model=dict(
            backbone=dict(name="small", width=48, levels=3),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            num_queries=10,
            width=64,
            mask_dim=64,
            layers=2,
            heads=4,
            ffn=128,
            dropout=0.0,
            deep_supervision=True,
            init="",
            remat="none",
            dtype="float32",
        ),
        loss=loss(),
        optimizer=common.adamw_of_scenes(1e-3),
        **common.masks_on_scenes(args.images, every=1000),
    )


def paper(args: Args) -> ConfigDict:
    """Returns the authors' recipe for ADE20K-150, with data=coco that for COCO's panoptic masks.

    It differs from theirs: shorter sides may have any length between the bounds, not only tenths of a crop, and images
    are tested with their longer side at the size of the crop. On COCO, theirs with a ResNet has six layers of a
    transformer before the pixel decoder, and the sizes of images and crops are ours.
    """
    train, validation = sources(args)
    coco, swin = args.data == "coco", args.backbone in SWINS
    large = args.backbone in ("swin_base_384", "swin_large_384")
    size = 640 if coco or large else 512  # code; of COCO, whose images have shorter sides of 480 to 800: ours
    steps = 554_400 if coco else 160_000
    backbone: dict[str, Any] = dict(name=args.backbone)
    if not args.published:
        init = "" if args.weights == "scratch" else args.weights or weights_of(args.backbone)
        backbone["init"] = init
    # Detectors shift and fill all windows.
    backbone.update(dict(window_rule="always", drop_rate=0.3) if swin else dict(norm="frozen"))
    crops: dict[str, Any] = dict(short_side=common.short_side(size))
    if coco:
        crops = dict(scale_jitter=(0.5, 2.0), flip=True)  # ours
    evals = {"validation": common.segmentation(validation, 16, every=5000)} if validation else {}
    rate = 6e-5 if swin else 1e-4
    optimizer = dict(
        common.adamw(
            rate,
            warmup_steps=1500
            if swin
            else 0,  # code; its 10 warm-up steps of ResNets on COCO have the full rate
            weight_decay=0.01 if swin else 1e-4,
            clip_norm=0.01,
        ),
        # Code: embeddings do not decay; biases of one axis do there, and not here.
        no_decay=("/queries$", "/relative_position_bias$") if swin else ("/queries$",),
    )
    if coco:
        optimizer["schedule"] = "linear"  # ours: theirs falls to a tenth after two thirds of the steps
    else:
        # Code, where it falls from the first step of the warm-up on.
        optimizer.update(schedule="polynomial", power=0.9)
    if not swin:
        optimizer["multipliers"] = (("backbone/", 0.1),)
    return common.run(
        "maskformer",
        steps=0 if args.published else steps,
        batch_size=64 if coco else 16,
        model=dict(
            backbone=backbone,
            mean=IMAGENET.mean,
            std=IMAGENET.std,
            num_queries=100,
            width=256,
            mask_dim=256,
            layers=6,
            heads=8,
            ffn=2048,
            dropout=0.1,
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
            mask_stride=1,  # the loss is computed at the size of the image
            max_masks=64,
            workers=8,
            **crops,
        ),
        evals=evals,
        final_evals=evals,
        checkpoint=common.checkpoint(every=1000),
    )


def sources(args: Args) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Returns the source to train on and the one to evaluate on."""
    common_ = dict(labels=args.labels or None, data_dir=args.data_dir)
    if args.data == "coco":
        common_.update(name="coco")
        return [dict(common_, split="train2017")], dict(common_, split="val2017")
    if args.data == "folder":
        common_.update(name="folder", kind=args.kind)
        return [common_], dict(common_, data_dir=args.val_dir) if args.val_dir else None
    common_.update(name="prepared")
    return [common_], dict(common_, data_dir=args.val_dir, split="val") if args.val_dir else None
