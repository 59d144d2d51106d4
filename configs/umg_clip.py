"""UMG-CLIP's pre-training (papers/003: A Unified Multi-Granularity Vision Generalist for Open-World Understanding).

  python -m ovseg_jax.main --config=configs/umg_clip.py
      on `scenes`, which is generated on the fly, on a laptop CPU in minutes: captions and tags of images and of boxes
      train a small EVA and its text tower from random weights; then classification, retrieval, and segmentation by the
      features of patches, none of them trained on a mask. One seed, 15 minutes on one core: mIoU of 49.8 on seen
      pairs, 24.8 held out, 69.2 on stuff, R@1 of 87.8 image to text and 77.3 text to image. Crops of things are
      named after the stuff around them, unless only things are among the names (100 and 94.6% right).
  python -m ovseg_jax.main --config=configs/umg_clip.py:losses=image_captions
      the first row of Table 7; captions and image_tags are the next two, all (the default) the last.
  python -m ovseg_jax.main --config="configs/umg_clip.py:data=umg41m,data_dir=DIR,images=DIR2,retrieval=DIR3"
      the paper's recipe (5.1) on the JSON files of UMG-41M in DIR and the images in DIR2, from EVA-CLIP's weights.
      tower=eva02_clip_l14 and the like choose the model of Table 6. The paper's R@1 on COCO after adaptation, which
      this config does not do: 64.7 image to text, 51.6 text to image (B/16, Table 3). Not reproduced yet.

UMG-41M is published without images and without a description of its keys: paths="captions:PATH;box:PATH" says where
they are, see `ovseg_jax/data/sources/region_json.py`. Numbers with a section or table are the paper's; "EVA" those of
EVA-CLIP's repository, whose training the paper keeps where it states nothing; the rest is marked "ours".
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.published import CLIP, weights_of


class Recipe(NamedTuple):
    """The numbers of a model of Table 6.

    Attributes:
      depth, text_depth: blocks of the towers.
      rate, text_rate: learning rates of the towers (5.1). EVA has 2e-4 and 2e-5 for B/16, 4e-4 and 4e-5 for the others:
        the paper may have confused them.
      decay: the layer decay of the image tower (EVA).
      epochs: 5.1.
    """

    depth: int
    text_depth: int
    rate: float
    text_rate: float
    decay: float
    epochs: int


MODELS = {
    "eva02_clip_b16": Recipe(12, 12, 4e-4, 4e-5, 0.75, 10),
    "eva02_clip_l14": Recipe(24, 12, 2e-4, 2e-5, 0.85, 10),
    "eva01_clip_g14": Recipe(40, 12, 2e-4, 2e-5, 0.85, 10),
    "eva02_clip_e14": Recipe(64, 24, 2e-4, 2e-5, 0.9, 6),
}
PAIRS = 41_410_000  # Table 1; 27.4 million without IN21K, which is not published
OTHER_RATE = 5e-4  # of the temperature, EVA

# Table 7: the terms of the loss (eq. 3) by row.
TERMS = {
    "all": ("image_captions", "region_captions", "image_tags", "region_tags"),
    "image_captions": ("image_captions",),
    "captions": ("image_captions", "region_captions"),
    "image_tags": ("image_captions", "region_captions", "image_tags"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "umg41m"),
        losses=tuple(TERMS),  # rows of Table 7
        data_dir="",  # data=umg41m: the folder of the JSON files, or of zips with them
        images="",  # data=umg41m: that of the images, or of zips; by default data_dir
        paths="",  # data=umg41m: where the fields are in a file, KEY:PATH;KEY:PATH
        tower=tuple(MODELS),  # data=umg41m: Table 6
        weights="",  # data=umg41m: where EVA-CLIP's weights are, if not on the hub: a folder or file
        # data=umg41m: images in a step, with about 77,000 boxes; the paper does not say: ours
        batch=AtLeast(8192, 1),
        pairs=AtLeast(PAIRS, 1),  # data=umg41m: images in an epoch, for the number of steps
        fsdp=AtLeast(1, 1),  # data=umg41m: chips over which parameters are split; E/14 needs it
        # data=umg41m: folders of prepared sets to score at the end, A;B: with captions, with classes, with masks
        retrieval="",
        classification="",
        segmentation="",
        seed=0,
    )
    config = scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    args.check_read()
    return config


def losses(args: Args) -> dict[str, Any]:
    """Returns the loss section."""
    return dict(
        terms=TERMS[args.losses],
        image_weight=1.0,  # α, 4.1
        region_weight=1.0,  # β, 4.1
        # sum: over D, 1 - cos of unit vectors, whatever D is; mean: D times less. 4.1 does not say: ours
        # Tags are read without a template; the paper does not say how.
        tag_reduction="sum",
    )


def dense(prompt: Any) -> dict[str, Any]:
    """Returns the section of boxes and patches."""
    return dict(
        features="plain",  # eq. 1; value: as CLIPSelf
        normalise="pooled",  # eq. 1; pixels: as CLIPSelf
        sampling=0,  # of RoIAlign, by the size of the box, as CLIPSelf and detectron2; the paper does not say: ours
        prompt=prompt,
    )


def scenes(args: Args) -> ConfigDict:
    """Returns the pre-training of a small EVA on the embedded data. All numbers are ours."""
    tower = dict(name="eva", patch=8, grid=8, width=64, depth=4, heads=4, hidden=128, embed_dim=64)
    tower |= dict(rope_grid=8, swiglu=True, attn_norm=True, mlp_norm=True)
    test = common.scenes("test", 500)
    config = common.run(
        "umg_clip",
        steps=2000,
        batch_size=64,
        towers=dict(
            image=tower,
            text=dict(name="clip", width=64, heads=2, layers=1, embed_dim=64, length=24),
            init="",
            tokenizer="words",
            image_size=64,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            logit_scale=14.0,
        ),
        loss=losses(args),
        dense=dense(["{}", "a {}", "the {}"]),
        clusters=dict(ratio=1.0),
        optimizer=common.adamw(
            2e-3,
            warmup_steps=100,
            final_fraction=0.02,
            weight_decay=0.05,
            clip_norm=1.0,
            b2=0.98,
            no_decay=("/bias$",),
        ),
        data=dict(
            train=[dict(common.scenes("train", 10_000), cache=True)],
            image_size=64,
            scale_jitter=(1.0, 1.0),
            flip=True,
            max_boxes=5,
            max_tags=6,
            max_box_tags=2,
            max_box_tokens=12,
            max_tag_tokens=4,
            workers=0,
        ),
        final_evals=dict(
            classification=common.classification(
                dict(name="scene_objects", split="test", shots=8, image_size=64, size="small"), 64
            ),
            retrieval=dict(type="retrieval", source=test, batch_size=50),
            test=common.segmentation(test, 50),
        ),
        checkpoint=common.checkpoint(every=500),
    )
    return config


def paper(args: Args) -> ConfigDict:
    """Returns the recipe of 5.1."""
    if not args.data_dir:
        raise UserError("data=umg41m needs data_dir=, the folder of its JSON files")
    model = MODELS[args.tower]
    source: dict[str, Any] = dict(name="region_json", data_dir=args.data_dir)
    if args.images:
        source["images"] = args.images
    if args.paths:
        source["paths"] = dict(_pair(item) for item in args.paths.split(";"))
    rates = lambda rate: rate / OTHER_RATE
    config = common.run(
        "umg_clip",
        steps=round(model.epochs * args.pairs / args.batch),
        batch_size=args.batch,
        towers=dict(
            # remat: ours. B/16 then takes 14.3 of 32 GiB on v4:2x4x4 (`python -m ovseg_jax.plan`), with "dots" 48.6.
            image=dict(name=args.tower, remat="all"),
            text=dict(name=args.tower, remat="all"),
            init=args.weights or weights_of(args.tower),
            tokenizer="",
            image_size=336,  # 5.1
            mean=CLIP.mean,
            std=CLIP.std,
            logit_scale=100.0,  # of weights that have none
            dtype="bfloat16",  # ours; EVA's is half precision
        ),
        loss=losses(args),
        dense=dense("imagenet"),
        # 4.1: a quarter of the tokens remains; after 2 blocks and by 5 neighbours: ours, see models/token_clusters.py
        clusters=dict(ratio=0.25, after=2, neighbours=5),
        optimizer=dict(
            name="lamb",  # 5.1
            learning_rate=OTHER_RATE,
            schedule="cosine",  # EVA
            warmup_steps=2000,  # EVA
            final_fraction=0.0,  # EVA
            weight_decay=0.05,  # 5.1
            no_decay=("/bias$",),  # EVA: neither biases nor what has one axis
            clip_norm=5.0,  # EVA's commands; its LAMB then clips at 1.0 as well
            b1=0.9,  # 5.1
            b2=0.98,  # 5.1
            ema=0.0,
            multipliers=(
                *common.layer_decay(model.decay, model.depth, "image", common.EVA_NAMES, rates(model.rate)),
                # 0.75: EVA
                *common.layer_decay(
                    0.75, model.text_depth, "text", common.TEXT_NAMES, rates(model.text_rate)
                ),
            ),
        ),
        data=dict(
            train=[source],
            image_size=336,  # 5.1
            augment=dict(crop=(0.9, 1.0), flip=False, randaugment=0),  # EVA
            max_boxes=16,  # ours; 9.4 on average (Table 1)
            box_draw="random",  # ours
            max_tags=8,  # ours
            max_box_tags=1,  # 3: each region has one class
            # Of captions of boxes, 6 words on average (Table 12), and of tags; those of images have 77: ours.
            max_box_tokens=24,
            max_tag_tokens=12,
            workers=16,
        ),
        checkpoint=common.checkpoint(every=1000, keep=3),
        log_every=50,
    )
    config.mesh.fsdp = args.fsdp
    prepared = lambda folder, split: dict(name="prepared", data_dir=folder, split=split)
    for kind, folders, split in (
        ("retrieval", args.retrieval, "test"),
        ("classification", args.classification, "val"),
        ("segmentation", args.segmentation, "val"),
    ):
        for folder in filter(None, folders.split(";")):
            name = f"{kind}_{folder.rstrip('/').rpartition('/')[2]}"
            config.final_evals[name] = dict(type=kind, source=prepared(folder, split), batch_size=256)
    return config


def _pair(item: str) -> tuple[str, str]:
    """Splits KEY:PATH."""
    key, colon, path = item.partition(":")
    if not colon:
        raise UserError(f"paths: {item!r} is not KEY:PATH, such as captions:image.captions")
    return key.strip(), path.strip()
