"""UMG-CLIP (papers/003: A Unified Multi-Granularity Vision Generalist for Open-World Understanding).

  python -m ovseg_jax.main --config=configs/umg_clip.py
      on `scenes`, which is generated on the fly, in 7 minutes on two cores: first captions and tags of images and of
      boxes train a small EVA and its text tower from random weights (4.1); then, with adapters in the frozen tower,
      masks and a head for their names (4.2). Mean of three seeds: R@1 of 81.6 image to text and 70.4 text to image; PQ
      of 68.4, AP of 63.8, mIoU of 69.4 on seen pairs, 37.6 held out, 93.8 on stuff.
  python -m ovseg_jax.main --config=configs/umg_clip.py:adapt=none
      the first part alone; adapt=global goes on with adapters for classification and retrieval.
  python -m ovseg_jax.main --config=configs/umg_clip.py:losses=image_captions
      the first row of Table 7; captions and image_tags are the next two, all (the default) the last.
  python -m ovseg_jax.main --config="configs/umg_clip.py:data=umg41m,data_dir=DIR,images=DIR2,retrieval=DIR3"
      the paper's pre-training (5.1) on the JSON files of UMG-41M in DIR and the images in DIR2, from EVA-CLIP's
      weights. tower=eva02_clip_l14 and the like choose the model of Table 6.
  python -m ovseg_jax.main \\
    --config="configs/umg_clip.py:data=umg41m,data_dir=DIR,images=DIR2,retrieval=DIR3,adapt=global,weights=RUN"
      its adaptation to classification and retrieval. The paper's R@1 on COCO: 64.7 image to text, 51.6 text to image
      (B/16, Table 3). Not reproduced yet.
  python -m ovseg_jax.main --config="configs/umg_clip.py:data=coco,data_dir=DIR,weights=RUN"
      its adaptation to panoptic segmentation on COCO, by FC-CLIP's recipe. The paper's PQ on COCO: 54.8, 58.0, 57.7 and
      59.0 (B, L, g, E; Table 4). Not reproduced yet. Without weights, on EVA-CLIP's, the table's other rows.

Memory and time of pre-training with 8,192 images in a step, by `python -m ovseg_jax.plan`; days are the minimum at the
chips' peak rates; in brackets the paper's on 32 A800 (5.1):
  B/16  v4:2x4x4                     14.3 of 32 GiB  0.37 days (2.37)
  B/16  v3:4x8   loop=true            7.8 of 16 GiB  0.47 days
  L/14  v4:4x4x4  fsdp=64,loop=true  13.7 of 32 GiB  0.38 days (4.29); on v4:2x4x4 with fsdp=32 40.7, without the loop
  L/14  v3:8x8   fsdp=128,loop=true  6.8 of 16 GiB  0.56 days
  g/14  v4:4x4x4  fsdp=64,loop=true  16.4 of 32 GiB  0.48 days (5.54)
  E/14  v4:4x4x4  fsdp=64,loop=true  27.1 of 32 GiB  1.19 days (6.12)
g/14 takes the TPU compiler five minutes of a core, E/14 nine. Without its loop, B/16 takes it more than 24 GB for v3.
With fsdp=64 a chip holds 0.8 of the 52.6 GiB of E/14's parameters and LAMB's moments.
The adaptation to COCO's masks at 896 pixels, 368,750 steps of 16 images, an image a chip or core, compiled; memory
traffic bounds them all:
  B/16  v4:2x2x4  loop=true          3.8 of 32 GiB  at least 179 ms a step, 18 hours
  B/16  v3:2x4                       3.3 of 16 GiB  at least 539 ms a step, 2.3 days
  L/14  v4:2x2x4  loop=true          6.8 of 32 GiB  at least 297 ms a step, 30 hours
  L/14  v3:2x4    loop=true          6.0 of 16 GiB  at least 889 ms a step, 3.8 days
  g/14  v4:2x2x4  fsdp=16,loop=true  5.6 of 32 GiB  at least 390 ms a step, 40 hours
  E/14  v4:2x2x4  fsdp=16,loop=true  8.3 of 32 GiB  at least 646 ms a step, 66 hours
A step takes 4.0, 10.4, 27.1 and 101 TFLOP a chip: on 16 H100, by their FLOPs alone (--topology=h100:16, g and E with
fsdp=16,loop=true), at least 1.5, 3.8, 10.1 and 37.8 hours. The paper does not state its own.

UMG-41M is published without images and without a description of its keys: paths="captions:PATH;box:PATH" says where
they are, see `ovseg_jax/data/sources/region_json.py`. Numbers with a section or table are the paper's; "EVA" those of
EVA-CLIP's repository, whose training the paper keeps where it states nothing; the rest is marked "ours".
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, fcclip
from ovseg_jax.configs.maskformer import sources
from ovseg_jax.errors import UserError
from ovseg_jax.methods.umg_clip import TAG_LOSSES
from ovseg_jax.pretrained.published import CLIP, weights_of


class Recipe(NamedTuple):
    """The numbers of a model of Table 6.

    Attributes:
      depth, text_depth: blocks of the towers.
      rate, text_rate: learning rates of the towers (5.1). EVA has 2e-4 and 2e-5 for B/16, 4e-4 and 4e-5 for the others:
        the paper may have confused them.
      decay: the layer decay of the image tower (EVA).
      epochs, adapt_epochs: of pre-training, and of adaptation to classification and retrieval (5.1).
    """

    depth: int
    text_depth: int
    rate: float
    text_rate: float
    decay: float
    epochs: int
    adapt_epochs: int


MODELS = {
    "eva02_clip_b16": Recipe(12, 12, 4e-4, 4e-5, 0.75, 10, 5),
    "eva02_clip_l14": Recipe(24, 12, 2e-4, 2e-5, 0.85, 10, 5),
    "eva01_clip_g14": Recipe(40, 12, 2e-4, 2e-5, 0.85, 10, 5),
    "eva02_clip_e14": Recipe(64, 24, 2e-4, 2e-5, 0.9, 6, 2),
}
PAIRS = 41_410_000  # Table 1; 27.4 million without IN21K, which is not published
OTHER_RATE = 5e-4  # of the temperature, EVA
TABLE_5 = ("A-150", "A-847", "PC-59", "PC-459", "PAS-21", "PAS-20")
PROMPT = ["{}", "a {}", "the {}"]  # on scenes: ours

# Table 7: the terms of the loss (eq. 3) by row.
TERMS = {
    "all": ("image_captions", "region_captions", "image_tags", "region_tags"),
    "image_captions": ("image_captions",),
    "captions": ("image_captions", "region_captions"),
    "image_tags": ("image_captions", "region_captions", "image_tags"),
}
IMAGE_TERMS = ("image_captions", "image_tags")  # of L_image, eq. 3: 5.1 adapts to images by it


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "umg41m", "coco", "folder", "prepared"),
        # what follows pre-training: global, adapters for images; panoptic, adapters and a head for masks. By default
        # panoptic, and none on UMG-41M; with data=umg41m, coco, folder or prepared it starts from weights
        adapt=("", "panoptic", "global", "none"),
        adapters=True,  # False: a frozen tower without adapters (Table 10)
        losses=tuple(TERMS),  # rows of Table 7
        tags=TAG_LOSSES,  # Table 8
        data_dir="",  # the folder of the data; of UMG-41M's JSON files, or of zips with them
        val_dir="",  # data=folder, prepared: the folder to evaluate on; by default none
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes, or one of the package, such as coco_panoptic
        images="",  # data=umg41m: the folder of the images, or of zips; by default data_dir
        paths="",  # data=umg41m: where the fields are in a file, KEY:PATH;KEY:PATH
        tower=tuple(MODELS),  # Table 6
        # EVA-CLIP's, if not on the hub: a folder or file; for an adaptation also the folder of a finished run
        weights="",
        # data=umg41m: images in a step, with about 77,000 boxes; the paper does not say: ours
        batch=AtLeast(8192, 1),
        pairs=AtLeast(PAIRS, 1),  # data=umg41m: images in an epoch, for the number of steps
        fsdp=AtLeast(1, 1),  # chips over which parameters are split; E/14 needs it
        # not data=scenes: the blocks of a tower as one loop of the program, which is traced in a fifth of the time
        # (L/14) and has the weights of one block at a time on each chip. Ours
        loop=False,
        # adapt=panoptic: side of the images (5.1: 640 on BigDet; Table 10: 384, 640, 896)
        size=AtLeast(896, 32),
        part=1.0,  # adapt=panoptic: how much of the images to train on, and of the steps (Tables 7 to 9: 0.2, 5.3)
        # data=umg41m: folders of prepared sets to score at the end, A;B: with captions, with classes, with masks
        retrieval="",
        classification="",
        segmentation="",
        eval_sets="",  # adapt=panoptic: a folder that holds the sets of Table 5 by name, to test on at the end
        sets=";".join(TABLE_5),  # which of them, or others that lie there
        things="",  # other sets there with masks of single things, to test on by PQ and AP
        sets_are=("folders", "prepared"),  # of images and masks, or written by `python -m ovseg_jax.prepare`
        seed=0,
    )
    adapt = args.adapt or ("none" if args.data == "umg41m" else "panoptic")
    if (adapt == "panoptic") == (args.data == "umg41m") and args.data != "scenes":
        needs = "masks: data=coco, folder or prepared" if adapt == "panoptic" else "texts: data=umg41m"
        raise UserError(f"adapt={adapt} needs {needs}, not data={args.data}")
    if args.data == "scenes":
        config = {"panoptic": panoptic_on_scenes, "global": global_on_scenes, "none": scenes}[adapt](args)
    else:
        config = panoptic(args) if adapt == "panoptic" else paper(args, adapt == "global")
    config.seed = args.seed
    args.check_read()
    return config


def losses(args: Args, terms: tuple[str, ...]) -> dict[str, Any]:
    """Returns the loss section."""
    tags = args.tags if any("tags" in term for term in terms) else "smooth_l1"
    return dict(
        terms=terms,
        image_weight=1.0,  # α, 4.1
        region_weight=1.0,  # β, 4.1
        # Tags are read without a template; the paper does not say how.
        tag_loss=tags,
        # sum: over D, 1 - cos of unit vectors, whatever D is; mean: D times less. 4.1 does not say: ours
        **(dict(tag_reduction="sum") if tags == "smooth_l1" else {}),
    )


def dense(prompt: Any) -> dict[str, Any]:
    """Returns the section of boxes and patches."""
    return dict(
        features="plain",  # eq. 1; value: as CLIPSelf
        normalise="pooled",  # eq. 1; pixels: as CLIPSelf
        sampling=0,  # of RoIAlign, by the size of the box, as CLIPSelf and detectron2; the paper does not say: ours
        prompt=prompt,
    )


def adapter() -> dict[str, Any]:
    """Returns the adapters of 4.2."""
    return dict(
        width=8,  # Convpass; the paper does not say
        activation="gelu",  # 4.2
        dropout=0.1,  # Convpass
        scale=0.1,  # s, 4.2
    )


def panoptic_on_scenes(args: Args) -> ConfigDict:
    """Returns the adaptation of a small tower to masks, after its pre-training. All numbers are ours."""
    first = scenes(args)
    first.seed = args.seed
    own = dict(init="stage:pretraining", tokenizer="stage:pretraining")
    if args.adapters:
        own["adapter"] = adapter()
    config = common.run(
        "fcclip",
        steps=1500,
        batch_size=16,
        towers=first.towers.to_dict() | own,
        **fcclip.head_on_scenes(0.0, PROMPT),
        **common.masks_on_scenes(10_000, every=500),
    )
    if args.adapters:
        config.fcclip.clip_features = "frozen"
    config.final_evals.update(common.panoptic(config.final_evals.test))
    config.stages = common.train_stages(pretraining=first)
    return config


def global_on_scenes(args: Args) -> ConfigDict:
    """Returns the adaptation of a small tower to texts of images, after its pre-training. All numbers are ours."""
    first = scenes(args)
    first.seed = args.seed
    config = first.copy_and_resolve_references()
    own = dict(init="stage:pretraining", tokenizer="stage:pretraining", adapter=adapter())
    config.towers.update(own)
    config.steps = 500
    config.loss.terms = IMAGE_TERMS
    config.data = {key: x for key, x in first.data.items() if "box" not in key}
    del config.loss.region_weight
    config.stages = common.train_stages(pretraining=first)
    return config


def scenes(args: Args) -> ConfigDict:
    """Returns the pre-training of a small EVA on the embedded data. All numbers are ours."""
    tower = dict(name="eva", patch=8, grid=8, width=64, depth=4, heads=4, hidden=128, embed_dim=64)
    tower |= dict(rope_grid=8, swiglu=True, attn_norm=True, mlp_norm=True)
    test = common.scenes("test", 500)
    config = common.run(
        "umg_clip",
        steps=2000,
        batch_size=32,
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
        loss=losses(args, TERMS[args.losses]),
        dense=dense(PROMPT),
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


def paper(args: Args, adapts: bool) -> ConfigDict:
    """Returns the pre-training of 5.1, or its adaptation to classification and retrieval."""
    if not args.data_dir:
        raise UserError("data=umg41m needs data_dir=, the folder of its JSON files")
    model = MODELS[args.tower]
    source: dict[str, Any] = dict(name="region_json", data_dir=args.data_dir)
    if args.images:
        source["images"] = args.images
    if args.paths:
        source["paths"] = dict(_pair(item) for item in args.paths.split(";"))
    rates = lambda rate: rate / OTHER_RATE
    in_loop: Any = (dict(scan=2), dict(scan=True)) if args.loop else ({}, {})  # 2: the clusters come before
    config = common.run(
        "umg_clip",
        steps=round(model.epochs * args.pairs / args.batch),
        batch_size=args.batch,
        towers=dict(
            # remat: ours. B/16 then takes 14.3 of 32 GiB on v4:2x4x4 (`python -m ovseg_jax.plan`), with "dots" 48.6.
            image=dict(name=args.tower, remat="all", **in_loop[0]),
            text=dict(name=args.tower, remat="all", **in_loop[1]),
            init=args.weights or weights_of(args.tower),
            tokenizer="",
            image_size=336,  # 5.1
            mean=CLIP.mean,
            std=CLIP.std,
            logit_scale=100.0,  # of weights that have none
            dtype="bfloat16",  # ours; EVA's is half precision
        ),
        loss=losses(args, IMAGE_TERMS if adapts else TERMS[args.losses]),
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
            no_decay=("/bias$",),  # EVA: neither biases nor arrays of one axis
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
    if adapts:
        config.steps = round(model.adapt_epochs * args.pairs / args.batch)  # 5.1
        config.towers.adapter = adapter()
        del config.loss.region_weight
        config.optimizer.learning_rate = 1e-3  # 5.1
        config.optimizer.multipliers = ()
        config.data = {key: x for key, x in config.data.items() if "box" not in key}
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


def panoptic(args: Args) -> ConfigDict:
    """Returns the adaptation to masks: the recipe of FC-CLIP, 50 epochs of COCO, but for the size of images (5.1).

    On BigDet Panoptic (data=folder) the paper has size=640 and 10 epochs, of 224,000 steps each with its 3.59 million
    images: --config.steps=2240000 and drops at the same shares (ours).
    """
    train, validation = sources(args)
    own = fcclip.published_config("fcclip_convnext_l")
    own.towers = dict(
        image=dict(name=args.tower, remat="all", **(dict(scan=0) if args.loop else {})),  # ours
        text=dict(name=args.tower),
        init=args.weights or weights_of(args.tower),
        tokenizer="",
        image_size=args.size,
        mean=CLIP.mean,
        std=CLIP.std,
        logit_scale=100.0,  # of weights that have none
        dtype="bfloat16",  # ours
    )
    if args.tower.endswith("14"):
        own.towers.image.patch = 16  # ours: 640 is no multiple of 14, and EVA-CLIP converts its models so
    if args.adapters:
        own.towers.adapter = adapter()
        # Ours: on scenes names of held-out things are better, see tests/benchmarks/README.md.
        own.fcclip.clip_features = "frozen"
    own.model.update(remat="dots", dtype="bfloat16")  # ours
    own.fcclip.update(short=0, longest=0)  # ours: squares, as in training
    evals: dict[str, Any] = {}
    if validation:
        evals["validation"] = common.segmentation(validation, 16, every=5000)
    form = dict(name="prepared", split="val")
    if args.sets_are == "folders":
        form = dict(name="folder", kind="semantic")
    sets = {
        name: common.segmentation(dict(form, data_dir=f"{args.eval_sets}/{name}"), 16)
        for name in (filter(None, args.sets.split(";")) if args.eval_sets else ())
    }
    config = fcclip.recipe(own, train, args.size, evals=evals, final_evals={**evals, **sets})
    config.mesh.fsdp = args.fsdp
    if args.part != 1:
        train[0]["part"] = args.part
        config.data.train = train
        config.steps = round(config.steps * args.part)
        config.optimizer.drops = tuple(round(at * args.part) for at in config.optimizer.drops)
    if validation:
        config.final_evals.update(common.panoptic(config.final_evals.validation))
    if args.eval_sets:
        single = form if args.sets_are == "prepared" else dict(form, kind="segments")
        for name in filter(None, args.things.split(";")):
            like = ConfigDict(dict(source=dict(single, data_dir=f"{args.eval_sets}/{name}"), batch_size=16))
            found = common.panoptic(like)
            config.final_evals.update({f"{name}_{kind}": evaluation for kind, evaluation in found.items()})
    return config


def _pair(item: str) -> tuple[str, str]:
    """Splits KEY:PATH."""
    key, colon, path = item.partition(":")
    if not colon:
        raise UserError(f"paths: {item!r} is not KEY:PATH, such as captions:image.captions")
    return key.strip(), path.strip()
