"""A prompt is tuned on segments (papers/000, tables 4 and 5, appendix B; ZSSeg, Xu et al. 2021).

  python -m ovseg_jax.main --config=configs/pomp_segments.py
      on `scenes`: first the CLIP, the prompt and the masks of configs/pomp.py; run=runs/pomp takes those of that run.
      Expected mIoU on scenes, the mean of 3 seeds: 22.1; from noise (init=noise) 18.9.
  python -m ovseg_jax.main --config=configs/pomp_segments.py:data=masks,data_dir=DIR,unseen=coco_stuff,init=FILE
      the prompt of FILE, or by default one from noise, learns from the segments of the classes that are not unseen. DIR
      has images/, masks/ with ids of classes, and classes.txt; data=coco takes COCO's panoptic layout, data=prepared a
      folder that `python -m ovseg_jax.prepare` wrote.

A segment is cut out, and what does not belong to it gets one colour. Numbers are those of the authors' copy of ZSSeg,
amazon-science/prompt-pretraining, third_party/zsseg.baseline/configs/*/
zero_shot_proposal_classification_learn_prompt_pomp_*.yaml, except two: its training crops are 224 x 244 pixels, and
their colour is mean * std + mean, since it is filled in after the normalisation; ours is the mean, as in its inference.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, parse_arg
from ovseg_jax.configs import common, pomp
from ovseg_jax.pretrained.published import CLIP
from ovseg_jax.towers.prompt_file import FILE, is_prompt_file

# Steps, and segments of each class: of the 156 seen classes of COCO-Stuff, of the 15 of VOC.
AMOUNTS = {"coco_stuff": (16_000, 32), "voc": (3_200, 128)}
# w of `methods.zsseg`.
ENSEMBLE = {"coco_stuff": 0.8, "voc": 0.7}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "masks", "coco", "prepared"),
        data_dir="",
        val_dir="",  # data=masks, prepared: the folder to evaluate on; by default none
        unseen="",  # coco_stuff | voc (not data=coco, whose classes are panoptic) | "cow; ..." | FILE.json
        proposals="",  # a run whose masks the prompts are tried on at the end; needs val_dir, except with data=coco
        init="",  # a prompt's file, words, or noise; by default noise, on scenes POMP's prompt
        run="",  # data=scenes: a finished run of configs/pomp.py
        towers="clip_vitb16",
        weights="",  # where they are, if not on the hub: a folder or file
        length=0,  # M; 16 by default
        cache=0,  # number of augmented views of each segment whose features are kept; 0: new views in each epoch
        seed=0,
    )
    config = on_scenes(args) if args.data == "scenes" else on_masks(args)
    config.seed = args.seed
    args.check_read()
    return config


def on_scenes(args: Args) -> ConfigDict:
    """Returns the tuning of a prompt for single things on the segments of whole scenes (ours)."""
    clip = pomp.small_clip(args.seed)
    config = pomp.on_scenes(args.seed, clip)
    place = lambda name: f"{args.run}/{name}" if args.run else f"stage:{name}"
    if not args.run:
        learned = pomp.on_scenes(args.seed, clip)
        config.stages = common.train_stages(clip=clip, pomp=learned, proposals=pomp.proposals(args.seed))
    prompt = place(FILE) if args.run else place(f"pomp/{FILE}")
    config.towers.init = config.towers.tokenizer = place("clip")
    config.prompt.init = "" if args.init == "noise" else args.init or prompt
    return on_segments(
        config,
        args,
        common.scenes("train", 1000),
        common.scenes("test", 200),
        proposals=args.proposals or place("proposals"),
        shots=32,
        fill=pomp.BLACK,
        rules=dict(fill="zero", ensemble=0.0),
        prompts=dict(hard="a photo of a {}", pomp=prompt),
    )


def on_masks(args: Args) -> ConfigDict:
    """Returns the recipe for published towers and the segments of a data set."""
    if args.data == "coco":
        common_ = dict(name="coco", data_dir=args.data_dir)
        train, validation = dict(common_, split="train2017"), dict(common_, split="val2017")
    elif args.data == "prepared":
        train = dict(name="prepared", data_dir=args.data_dir)
        validation = dict(train, data_dir=args.val_dir, split="val") if args.val_dir else None
    else:
        common_ = dict(name="folder", kind="semantic")
        train = dict(common_, data_dir=args.data_dir)
        validation = dict(common_, data_dir=args.val_dir) if args.val_dir else None
    steps, shots = AMOUNTS.get(args.unseen, AMOUNTS["coco_stuff"])
    init = "" if args.init == "noise" else args.init
    config = common.run(
        "pomp",
        steps=steps,
        batch_size=32,
        towers=pomp.published_towers(args),
        prompt=dict(length=args.length or 16, position="end", specific=False, init=init),
        loss=dict(sample=0, chunk=256),
        optimizer=common.sgd(
            0.02,
            warmup_steps=100,
            warmup_rate=0.02 * 0.005,  # constant
            decay_steps=steps,
            weight_decay=5e-4,
            clip_norm=0.01,
        ),
        data=dict(image_size=224, cache_features=args.cache, workers=8),
        checkpoint=common.checkpoint(every=1000),
    )
    hard = dict(single="a sculpture of a {}.", vild="vild", imagenet="imagenet")  # table 13
    return on_segments(
        config,
        args,
        train,
        validation,
        proposals=args.proposals if validation else "",
        shots=shots,
        fill=tuple(255 * x for x in CLIP.mean),
        rules=dict(fill="mean", ensemble=ENSEMBLE.get(args.unseen, 0.8)),
        prompts=hard | (dict(before=init) if is_prompt_file(init) else {}),
    )


def on_segments(
    config: ConfigDict,
    args: Args,
    train: dict[str, Any],
    validation: dict[str, Any] | None,
    *,
    proposals: str,
    shots: int,
    fill: tuple[float, ...],
    rules: dict[str, Any],
    prompts: dict[str, Any],
) -> ConfigDict:
    """Returns `config` with segments, cut out of the images of two sources, to learn from and to be evaluated on."""
    cut = dict(name="crops", fill=fill, unseen=args.unseen, min_size=1)
    config.loss.sample = 0  # all classes
    config.data.train = [dict(cut, of=train, shots=shots, group="seen" if args.unseen else "")]
    config.data.update(views=1, augment=dict(crop=(0.08, 1.0), flip=True, randaugment=0))
    config.final_evals = {}
    if validation:
        config.final_evals.validation = common.classification(dict(cut, of=validation), 256, prompts=prompts)
    if proposals:
        config.final_evals.segmentation = dict(
            type="transfer",
            source=validation,
            split=args.unseen,
            proposals=proposals,
            batch_size=8,
            prompts=prompts,
            **rules,
        )
    return config
