"""A prompt goes on learning from segments (papers/000, tables 4 and 5, appendix B; ZSSeg, Xu et al. 2021).

  python -m ovseg_jax.main --config=configs/pomp_segments.py
      on `scenes`: first the CLIP, the prompt and the masks of configs/pomp.py; run=runs/pomp takes those of that run.
  python -m ovseg_jax.main --config=configs/pomp_segments.py:data=masks,data_dir=DIR,unseen=coco_stuff,init=FILE
      the prompt of FILE, or by default one from noise, learns from the segments of the classes that are not unseen. DIR
      has images/, masks/ with ids of classes, and classes.txt; data=coco takes COCO's panoptic layout.

A segment is cut out, and what does not belong to it gets one colour. Numbers are those of the authors' copy of ZSSeg,
amazon-science/prompt-pretraining, third_party/zsseg.baseline/configs/*/
zero_shot_proposal_classification_learn_prompt_pomp_*.yaml, but for two: its training crops are 224 x 244 pixels, and
their colour is mean * std + mean, as it is filled in behind the normalisation; ours is the mean, as in its inference.
"""

import runpy
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import check_read, parse_arg
from ovseg_jax.errors import UserError
from ovseg_jax.towers.clip import MEAN
from ovseg_jax.towers.prompt_file import FILE, is_prompt_file
from ovseg_jax.vocab.splits import UNSEEN

# Steps, and segments of each class: of the 156 seen classes of COCO-Stuff, of the 15 of VOC.
AMOUNTS = {"coco_stuff": (16_000, 32), "voc": (3_200, 128)}
# w on VOC and on COCO-Stuff, see `methods.zsseg`.
ENSEMBLE = {"coco_stuff": 0.8, "voc": 0.7}


def get_config(arg: str | None = None) -> ConfigDict:
    """Keys of `arg`: see `parse_arg` below; unknown ones are an error that lists them."""
    keys = dict(
        data="scenes",  # scenes | masks | coco
        data_dir="",
        val_dir="",  # data=masks: the folder to evaluate on; none where it is not said
        unseen="",  # coco_stuff | voc (of data=masks: their classes are no panoptic ones) | "cow; ..." | FILE.json
        proposals="",  # a run whose masks the prompts are then tried on
        init="",  # a prompt's file, words, or noise; by default noise, on scenes POMP's prompt
        run="",  # data=scenes: a finished run of configs/pomp.py
        towers="clip_vitb16",
        weights="",  # where they are, if not on the hub: a folder or file
        length=0,  # M; 16 by default
        cache=0,  # augmented views of each segment whose features are kept; 0: segments are seen anew in each epoch
        seed=0,
    )
    args = parse_arg(arg, **keys)
    pomp: Any = runpy.run_path(str(Path(__file__).with_name("pomp.py")))
    if args.data == "scenes":
        read = ("data", "unseen", "proposals", "init", "run", "seed")
        check_read(args, keys, read, "data=scenes")
        config = on_scenes(args, pomp)
    elif args.data in ("masks", "coco"):
        check_read(args, keys, [key for key in keys if key != "run"], f"data={args.data}")
        config = on_masks(args, pomp)
    else:
        raise UserError(f"data={args.data}: known are scenes, masks, coco")
    config.seed = args.seed
    return config


def on_scenes(args: ConfigDict, pomp: Any) -> ConfigDict:
    """What a prompt has learned from single things meets the segments of whole scenes (ours)."""
    clip = pomp["small_clip"](args.seed)
    config = pomp["on_scenes"](args.seed, clip)
    place = lambda name: f"{args.run}/{name}" if args.run else f"stage:{name}"
    if not args.run:
        learned = pomp["on_scenes"](args.seed, clip)
        stages = dict(clip=clip, pomp=learned, proposals=pomp["proposals"](args.seed))
        config.stages = [dict(name=name, kind="train", config=stage) for name, stage in stages.items()]
    prompt = place(FILE) if args.run else place(f"pomp/{FILE}")
    config.towers.init = config.towers.tokenizer = place("clip")
    args.init = "" if args.init == "noise" else args.init or prompt
    args.proposals = args.proposals or place("proposals")
    scenes = lambda split, count: dict(
        name="scenes", split=split, num_examples=count, image_size=64, size="small"
    )
    return on_segments(
        config,
        args,
        scenes("train", 1000),
        scenes("test", 200),
        shots=32,
        fill=pomp["BLACK"],
        rules=dict(fill="zero", ensemble=0.0),
        prompts=dict(hard="a photo of a {}", pomp=prompt),
    )


def on_masks(args: ConfigDict, pomp: Any) -> ConfigDict:
    """Published towers, and the segments of a data set."""
    args.init = "" if args.init == "noise" else args.init
    if args.data == "coco":
        if args.unseen in UNSEEN:
            raise UserError(
                f"unseen={args.unseen} lists classes of COCO-Stuff or VOC, and data=coco has COCO's panoptic ones: say "
                "data=masks, or unseen='cow; giraffe'"
            )
        common = dict(name="coco", data_dir=args.data_dir)
        train, validation = dict(common, split="train2017"), dict(common, split="val2017")
    else:
        common = dict(name="folder", kind="semantic")
        train = dict(common, data_dir=args.data_dir)
        validation = dict(common, data_dir=args.val_dir) if args.val_dir else None
    if args.proposals and not validation:
        raise UserError("proposals: on which images are they to be tried? say val_dir=DIR")
    towers = (
        f"data=folder,towers={args.towers},weights={args.weights},length={args.length},cache={args.cache}"
    )
    config = pomp["get_config"](towers)
    config.steps, shots = AMOUNTS.get(args.unseen, AMOUNTS["coco_stuff"])
    config.batch_size, config.checkpoint.every = 32, 1000
    config.optimizer = dict(
        name="sgd",
        learning_rate=0.02,
        schedule="cosine",
        warmup_steps=100,
        warmup_rate=0.02 * 0.005,  # constant
        decay_steps=config.steps,
        momentum=0.9,
        weight_decay=5e-4,
        clip_norm=0.01,
    )
    hard = dict(single="a sculpture of a {}.", vild="vild", imagenet="imagenet")  # table 13
    return on_segments(
        config,
        args,
        train,
        validation,
        shots=shots,
        fill=tuple(255 * x for x in MEAN),
        rules=dict(fill="mean", ensemble=ENSEMBLE.get(args.unseen, 0.8)),
        prompts=hard | (dict(before=args.init) if is_prompt_file(args.init) else {}),
    )


def on_segments(
    config: ConfigDict,
    args: ConfigDict,
    train: dict,
    validation: dict | None,
    *,
    shots: int,
    fill: tuple[float, ...],
    rules: dict,
    prompts: dict,
) -> ConfigDict:
    """`config` with segments, cut out of the images of two sources, to learn from and to be evaluated on."""
    cut = dict(name="crops", fill=fill, unseen=args.unseen, min_size=1)
    config.prompt.init = args.init
    config.loss.sample = 0  # all classes
    config.data.train = [dict(cut, of=train, shots=shots, group="seen" if args.unseen else "")]
    config.data.update(views=1, augment=dict(crop=(0.08, 1.0), flip=True, randaugment=0))
    config.final_evals = {}
    if validation:
        config.final_evals.validation = dict(
            type="classification", source=dict(cut, of=validation), batch_size=256, prompts=prompts
        )
    if validation and args.proposals:
        config.final_evals.segmentation = dict(
            type="transfer",
            source=validation,
            split=args.unseen,
            proposals=args.proposals,
            batch_size=8,
            prompts=prompts,
            **rules,
        )
    return config
