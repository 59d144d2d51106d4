"""POMP (papers/000: Ren et al., Prompt Pre-Training with Twenty-Thousand Classes for Open-Vocabulary Recognition).

  python -m ovseg_jax.main --config=configs/pomp.py
      on `scenes`, which is generated on the fly, on a laptop CPU in minutes: first a small CLIP is trained, then CoOp
      on a subset of the classes and POMP without its correction, then POMP; the summary compares them.
  python -m ovseg_jax.main --config=configs/pomp.py:data=folder,data_dir=DIR,names=FILE
      the paper's recipe on DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, ImageNet-21K as Ridnik et al. process it.
configs/pomp_segments.py takes the prompt on to segments.

Numbers with a section, table or appendix are the paper's, "code" that of its authors' repository. What neither says is
marked "ours".
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from ovseg_jax.config import check_read, parse_arg
from ovseg_jax.errors import UserError

TOWERS = {
    "clip_rn50": "hf:timm/resnet50_clip.openai",
    "clip_vitb32": "hf:openai/clip-vit-base-patch32",
    "clip_vitb16": "hf:openai/clip-vit-base-patch16",  # 4.1
}

# The baselines of Tables 1 to 3, as the repositories of their authors run them. P: amazon-science/prompt-pretraining,
# C: KaiyangZhou/CoOp, M: muzairkhattak/multimodal-prompt-learning. All with SGD, momentum 0.9, weight decay 5e-4, a
# cosine set once an epoch, one epoch of constant warm-up, 16 shots, one view without RandAugment.
BASELINES = {
    # P scripts/coop/main.sh, vit_b16_ep50 (Table 3)
    "coop": dict(length=16, epochs=50, images=32, learning_rate=0.002, warmup_rate=1e-5),
    # C configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml
    "cocoop": dict(
        length=4, words="a photo of a", epochs=10, images=1, learning_rate=0.002, warmup_rate=1e-5
    ),
    # P and M configs/trainers/VPT/vit_b16_c2_ep5_batch4_4.yaml
    "vpt": dict(length=8, depth=12, epochs=5, images=4, learning_rate=0.0025, warmup_rate=1e-5),
    # P and M configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx_cross_datasets.yaml
    "maple": dict(
        length=2,
        depth=3,
        words="a photo of a",
        epochs=2,
        images=4,
        learning_rate=0.0026,
        warmup_rate=1e-5,
    ),
    # P configs/trainers/MLP/vit_b16_ep20.yaml, scripts/mlp/main.sh
    "linear_probe": dict(length=1, epochs=20, images=256, learning_rate=0.2, warmup_rate=1e-3),
}


# What a thing of `scenes` stands on where a prompt is learned. The small CLIP has seen none like it: a prompt is of use
# where images look otherwise than those that its CLIP knows.
BLACK = (0.0, 0.0, 0.0)


def get_config(arg: str | None = None) -> ConfigDict:
    """Keys of `arg`: see `parse_arg` below; unknown ones are an error that lists them."""
    keys = dict(
        data="scenes",  # scenes | folder
        data_dir="",
        group="",  # base: trains on the first half of the classes, and scores both (CoCoOp, 4.1)
        names="",  # data=folder: a file of the folders' class names
        split="train",
        val_split="val",
        towers="clip_vitb16",  # 4.1; clip_vitb32 and clip_rn50 in Table 1
        weights="",  # where they are, if not on the hub: a folder or file
        method="pomp",  # the baselines of Tables 1 to 3: coop | cocoop | vpt | maple | linear_probe
        length=0,  # M; by default 16 (4.1; 4 in appendix E.2 and Table 2's best), or the baseline's own
        position="end",  # of the class name: end | middle | front
        specific=False,  # a context for each class (CoOp)
        init="",  # what the context starts from: words, as "a photo of a", or a prompt's file; noise by default
        classes=10_451,  # folders of the data: a run's length is counted in epochs
        shots=16,  # 4.1
        sample=1000,  # K; 4.1
        correction="log10",  # Table 9 and the code; log, as eq. 5 is written, or a number
        proposal="uniform",  # Table 12: frequency | similarity
        per_device=False,  # negatives: shared by the batch, or drawn by each device (code)
        cache=0,  # augmented views of each image whose features are kept; 0: images are seen anew in each epoch
        seed=0,
    )
    args = parse_arg(arg, **keys)
    if args.data == "scenes":
        config = scenes(args.seed)
        check_read(args, keys, ("data", "method", "seed"), "data=scenes")
        if args.method != "pomp":
            raise UserError(
                f"method={args.method}: on scenes POMP is trained, and CoOp beside it; say data=folder"
            )
    elif args.data == "folder":
        config = paper(args)
    else:
        raise UserError(f"data={args.data}: known are scenes, folder")
    config.seed = args.seed
    return config


def scenes(seed: int) -> ConfigDict:
    """POMP on the embedded data: things of 2,412 classes on black, 32 px, of which a third is held out (ours)."""
    clip = small_clip(seed)
    config = on_scenes(seed, clip)
    config.before = dict(
        clip=clip,
        coop=on_scenes(seed, clip, sample=0, count=100),
        uncorrected=on_scenes(seed, clip, correction="0"),
        proposals=proposals(seed),
    )
    prompts = dict(
        hard="a photo of a {}",
        ensemble=["{}", "a photo of a {}", "a photo of the {}", "a picture of the {}", "an image of a {}"],
        coop="before:coop/prompt.safetensors",
        uncorrected="before:uncorrected/prompt.safetensors",
    )
    config.final_evals = dict(
        test=dict(
            type="classification",
            source=dict(name="scene_objects", image_size=32, size="large", split="test", shots=2, fill=BLACK),
            batch_size=512,
            prompts=prompts,
        ),
        # Other images of other classes: cross-dataset, by masks that know no class.
        segmentation=dict(
            type="transfer",
            source=dict(name="scenes", split="test", num_examples=200, image_size=64, size="small"),
            proposals="before:proposals",
            ensemble=0.0,
            fill="zero",
            batch_size=50,
            prompts=prompts,
        ),
    )
    return config


def on_scenes(
    seed: int, clip: ConfigDict, sample: int = 100, correction: str = "log10", count: int = 0
) -> ConfigDict:
    """A prompt for the small CLIP, on its seen classes or `count` of them (ours)."""
    source = dict(
        name="scene_objects",
        image_size=32,
        size="large",
        split="train",
        shots=4,
        count=count,
        seed=1,
        fill=BLACK,
    )
    return ConfigDict(
        dict(
            method="pomp",
            seed=seed,
            steps=1000,
            batch_size=256,
            accumulate=1,
            profile="",
            mesh=dict(data=-1, fsdp=1),
            towers=dict(clip.towers.to_dict(), init="before:clip", tokenizer="before:clip"),
            prompt=dict(length=4, position="end", specific=False, init=""),
            loss=dict(sample=sample, correction=correction, proposal="uniform", per_device=False, chunk=256),
            optimizer=dict(
                name="sgd",
                learning_rate=0.05,
                schedule="cosine",
                warmup_steps=20,
                final_fraction=0.0,
                momentum=0.9,
                weight_decay=5e-4,
            ),
            data=dict(
                train=[source],
                image_size=32,
                views=2,
                cache_features=2,
                augment=dict(crop=(0.7, 1.0), flip=True, randaugment=0),
                workers=0,
            ),
            evals={},
            final_evals={},
            checkpoint=dict(every=500, keep=1),
            log_every=20,
        )
    )


def proposals(seed: int) -> ConfigDict:
    """Class-agnostic masks of `scenes`: OpenSeg's network, trained on its mask loss alone (ours)."""
    config = runpy.run_path(str(Path(__file__).with_name("openseg.py")))["scenes"]()
    config.seed, config.steps = seed, 500
    config.loss.grounding_weight = 0.0
    config.data.batch_augment = []
    config.evals = config.final_evals = {}
    return config


def small_clip(seed: int) -> ConfigDict:
    """A CLIP that learns the words of `scenes` from images of 32 px and captions in minutes (ours)."""
    source = dict(name="scene_objects", image_size=32, size="large")
    return ConfigDict(
        dict(
            method="clip",
            seed=seed,
            steps=1000,
            batch_size=256,
            accumulate=1,
            profile="",
            mesh=dict(data=-1, fsdp=1),
            towers=dict(
                image=dict(name="small", width=48, levels=2, embed_dim=64),
                text=dict(name="clip", width=64, heads=2, layers=2, embed_dim=64, length=16),
                init="",
                tokenizer="words",
                image_size=32,
                mean=(0.5, 0.5, 0.5),
                std=(0.25, 0.25, 0.25),
                logit_scale=14.0,
            ),
            optimizer=dict(
                name="adamw",
                learning_rate=3e-3,
                schedule="cosine",
                warmup_steps=50,
                final_fraction=0.02,
                weight_decay=1e-3,
                clip_norm=1.0,
                b2=0.98,
            ),
            data=dict(
                train=[dict(source, split="train", shots=24, cache=True)],
                image_size=32,
                # What RandAugment does to colours, captions would have to say.
                augment=dict(crop=(0.7, 1.0), flip=True, randaugment=0),
                workers=0,
            ),
            evals={},
            final_evals={},
            checkpoint=dict(every=500, keep=1),
            log_every=20,
        )
    )


def paper(args: ConfigDict) -> ConfigDict:
    """4.1 and appendix A, and what the code adds to them."""
    if args.towers not in TOWERS:
        raise UserError(f"towers={args.towers}: known are {', '.join(TOWERS)}")
    if args.method not in ("pomp", *BASELINES):
        raise UserError(f"method={args.method}: known are pomp, {', '.join(BASELINES)}")
    own = ConfigDict(
        BASELINES.get(args.method)
        or dict(
            length=16,
            epochs=5 if 0 < args.length <= 4 else 20,  # appendix A; M = 4 has 5 in the code
            images=32 * 8,  # appendix A: on each of 8 GPUs
            learning_rate=0.002,  # appendix A
            warmup_rate=1e-5,  # code: constant
        )
    )
    if args.length:
        if "words" in own or args.method == "linear_probe":
            raise UserError(f"length={args.length} means nothing with method={args.method}")
        own.length = args.length
    if args.classes < 2 or args.shots < 1:
        raise UserError(
            f"classes={args.classes}, shots={args.shots}: at least 2 and 1, by which an epoch is counted"
        )
    pomp = args.method == "pomp"
    views = 4 if pomp else 1  # code
    if args.group not in ("", "base"):
        raise UserError(f"group={args.group}: known is base")
    if args.group and (args.specific or args.method == "linear_probe"):
        raise UserError(
            "group=base: a context for each class, or a linear probe, has nothing for new classes"
        )
    group, halves = (dict(group="base"), dict(group="base+new")) if args.group else ({}, {})
    classes = -(-args.classes // 2) if args.group else args.classes
    epoch = max(1, classes * args.shots // own.images)
    source = dict(name="image_folder", data_dir=args.data_dir, names=args.names)
    validation = dict(
        type="classification",
        source=dict(source, split=args.val_split, **halves),
        batch_size=256,
        every=0,
        prompts=dict(hard="a photo of a {}.", ensemble="imagenet"),  # Table 1
    )
    return ConfigDict(
        dict(
            method="pomp" if args.method == "coop" else args.method,
            seed=0,
            steps=own.epochs * epoch,
            batch_size=own.images * views,
            accumulate=1,
            profile="",
            mesh=dict(data=-1, fsdp=1),
            towers=dict(
                image=dict(name=args.towers),
                text=dict(name=args.towers, remat="products"),  # ours
                init=args.weights or TOWERS[args.towers],
                tokenizer="",
                image_size=224,  # appendix A
                logit_scale=100.0,  # of OpenAI's weights
                dtype="float32",
            ),
            prompt=dict(
                length=own.length,
                position=args.position,
                specific=args.specific,
                init=args.init or own.get("words", ""),
                **({"depth": own.depth} if "depth" in own else {}),
            ),
            loss=dict(
                sample=args.sample if pomp else 0,
                correction=args.correction,
                proposal=args.proposal,
                per_device=args.per_device,
                chunk=256,  # classes at once where all take part: ours
            ),
            optimizer=dict(
                name="sgd",  # appendix A
                learning_rate=own.learning_rate,
                schedule="cosine",  # appendix A
                hold_steps=epoch,  # code: the rate changes once an epoch
                warmup_steps=epoch,  # code
                warmup_rate=own.warmup_rate,
                # code: the cosine is as long as the run, and starts behind the warm-up
                decay_steps=own.epochs * epoch,
                momentum=0.9,  # code
                weight_decay=5e-4,  # code
            ),
            data=dict(
                train=[dict(source, split=args.split, num_classes=args.classes, shots=args.shots, **group)],
                image_size=224,
                views=views,
                cache_features=args.cache,
                augment=dict(
                    crop=(0.08, 1.0), flip=True, randaugment=2 if pomp else 0, policy="dassl"
                ),  # code
                workers=8,
            ),
            evals={},
            final_evals=dict(validation=validation),
            checkpoint=dict(every=epoch, keep=1),
            log_every=20,
        )
    )
