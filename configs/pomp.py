"""POMP (papers/000: Ren et al., Prompt Pre-Training with Twenty-Thousand Classes for Open-Vocabulary Recognition).

  python -m ovseg_jax.main --config=configs/pomp.py
      on `scenes`, which is generated on the fly, on a laptop CPU in minutes: first a small CLIP is trained, then CoOp
      on a subset of the classes and POMP without its correction, then POMP; the summary compares them. Expected
      accuracy over all classes, the mean of 3 seeds: POMP 14.1, without correction 13.5, CoOp 11.7, hard prompt 10.5.
  python -m ovseg_jax.main --config=configs/pomp.py:data=folder,data_dir=DIR,names=FILE
      the paper's recipe on DIR/train/<class>/*.jpg and DIR/val/<class>/*.jpg, ImageNet-21K as Ridnik et al. process it.
      The paper's accuracy (Table 1): 25.3. None of its scores has been reproduced yet.
configs/pomp_segments.py tunes the prompt on segments.

Numbers with a section, table or appendix are the paper's, "code" that of its authors' repository. What neither says is
marked "ours".
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, openseg
from ovseg_jax.pretrained.published import pixels_of, weights_of

# POMP, and the baselines of Tables 1 to 3, as the repositories of their authors run them: P amazon-science/
# prompt-pretraining, C KaiyangZhou/CoOp, M muzairkhattak/multimodal-prompt-learning. All with SGD, momentum 0.9, weight
# decay 5e-4, a cosine set once an epoch, one epoch of constant warm-up, 16 shots; the baselines with one view without
# RandAugment.
METHODS = {
    # appendix A: 32 images on each of 8 GPUs; the rate of the warm-up is the code's
    "pomp": dict(length=16, epochs=20, images=32 * 8, learning_rate=0.002, warmup_rate=1e-5),
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

# The background of things of `scenes` in prompt learning. It is new to the small CLIP: a prompt helps where images
# differ from those that its CLIP was trained on.
BLACK = (0.0, 0.0, 0.0)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        # prepared: a folder with labels that `python -m ovseg_jax.prepare` wrote, such as ImageNet-21K
        data=("scenes", "folder", "prepared"),
        data_dir="",
        group=("", "base"),  # base: trains on the first half of the classes, and scores both (CoCoOp, 4.1)
        names="",  # data=folder: a file of the folders' class names
        split="train",
        val_split="val",
        towers="clip_vitb16",  # 4.1; clip_vitb32 and clip_rn50 in Table 1
        weights="",  # where they are, if not on the hub: a folder or file
        method=tuple(METHODS),
        epochs=0,  # by default those of the method; for M up to 4 POMP has 5 (code); 50 in Table 3
        length=0,  # M; by default 16 (4.1; 4 in appendix E.2 and Table 2's best), or the method's own
        position=("end", "middle", "front"),  # of the class name
        specific=False,  # a context for each class (CoOp)
        init="",  # what the context starts from: words, as "a photo of a", or a prompt's file; noise by default
        classes=AtLeast(10_451, 2),  # folders of the data: a run's length is counted in epochs
        shots=AtLeast(16, 1),  # 4.1
        sample=1000,  # K; 4.1
        # Table 9 and the code; log, as eq. 5 is written, or a number; log10_q, -log10 of the proposal's probability, as
        # the code has it where the proposal is not uniform.
        correction="log10",
        # Table 12. Ours: similarities are averaged over the batch as probabilities, and classes are drawn without
        # replacement; the code averages logits and draws with replacement, E.1 has a distribution for each image.
        proposal=("uniform", "frequency", "similarity"),
        # Of the negatives, code: each device draws its own, on 8 GPUs about 7,400 classes a step in all. False: ours,
        # all devices share one draw of K, which they encode together, for a fraction of the time and memory.
        per_device=True,
        cache=0,  # number of augmented views of each image whose features are kept; 0: new views in each epoch
        seed=0,
    )
    config = scenes(args.seed) if args.data == "scenes" else paper(args)
    args.check_read()
    return config


def scenes(seed: int) -> ConfigDict:
    """Returns POMP on the embedded data: things of 2,412 classes on black, 32 px, a third held out (ours)."""
    clip = small_clip(seed)
    config = on_scenes(seed, clip)
    config.stages = common.train_stages(
        clip=clip,
        coop=on_scenes(seed, clip, sample=0, count=100),
        uncorrected=on_scenes(seed, clip, correction="0"),
        proposals=proposals(seed),
    )
    prompts = dict(
        hard="a photo of a {}",
        ensemble=["{}", "a photo of a {}", "a photo of the {}", "a picture of the {}", "an image of a {}"],
        coop="stage:coop/prompt.safetensors",
        uncorrected="stage:uncorrected/prompt.safetensors",
    )
    test = scene_objects("test", shots=2, fill=BLACK)
    config.final_evals = dict(
        test=common.classification(test, 512, prompts=prompts),
        # Other images and classes, as across data sets, with class-agnostic masks.
        segmentation=dict(
            type="transfer",
            source=common.scenes("test", 200),
            proposals="stage:proposals",
            ensemble=0.0,
            fill="zero",
            batch_size=50,
            prompts=prompts,
        ),
    )
    return config


def scene_objects(split: str, **own: Any) -> dict[str, Any]:
    """Returns the single things of the embedded data."""
    return dict(name="scene_objects", split=split, image_size=32, size="large", **own)


def on_scenes(
    seed: int, clip: ConfigDict, sample: int = 100, correction: str = "log10", count: int = 0
) -> ConfigDict:
    """Returns a prompt for the small CLIP, on its seen classes or `count` of them (ours)."""
    return common.run(
        "pomp",
        seed=seed,
        steps=1000,
        batch_size=256,
        towers=dict(clip.towers.to_dict(), init="stage:clip", tokenizer="stage:clip"),
        prompt=dict(length=4, position="end", specific=False, init=""),
        loss=dict(sample=sample, correction=correction, proposal="uniform", per_device=False, chunk=256),
        optimizer=common.sgd(0.05, warmup_steps=20, final_fraction=0.0, weight_decay=5e-4),
        data=dict(
            train=[scene_objects("train", shots=4, count=count, seed=1, fill=BLACK)],
            image_size=32,
            views=2,
            cache_features=2,
            augment=dict(crop=(0.7, 1.0), flip=True, randaugment=0),
            workers=0,
        ),
        checkpoint=common.checkpoint(every=500),
    )


def proposals(seed: int) -> ConfigDict:
    """Returns class-agnostic masks of `scenes`: OpenSeg's network, trained on its mask loss alone (ours)."""
    config = openseg.get_config(f"stage=teacher,seed={seed}")
    config.steps, config.evals, config.final_evals = 500, {}, {}
    return config


def small_clip(seed: int) -> ConfigDict:
    """Returns a CLIP that learns the words of `scenes` from images of 32 px and captions in minutes (ours)."""
    return common.run(
        "clip",
        seed=seed,
        steps=1000,
        batch_size=256,
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
        optimizer=common.adamw(
            3e-3, warmup_steps=50, final_fraction=0.02, weight_decay=1e-3, clip_norm=1.0, b2=0.98
        ),
        data=dict(
            train=[scene_objects("train", shots=24, cache=True)],
            image_size=32,
            # No RandAugment, since captions name colours.
            augment=dict(crop=(0.7, 1.0), flip=True, randaugment=0),
            workers=0,
        ),
        checkpoint=common.checkpoint(every=500),
    )


def published_towers(args: Args) -> dict[str, Any]:
    """Returns the section of the towers `towers` with the weights `weights` and their normalisation of pixels."""
    pixels = pixels_of(args.towers)
    return dict(
        image=dict(name=args.towers),
        text=dict(name=args.towers, remat="dots"),  # ours
        init=args.weights or weights_of(args.towers),
        tokenizer="",
        image_size=224,  # appendix A
        mean=pixels.mean,
        std=pixels.std,
        logit_scale=100.0,  # of OpenAI's weights
        dtype="float32",  # ours; the code's is half precision
    )


def paper(args: Args) -> ConfigDict:
    """Returns the recipe of 4.1 and appendix A with what the code adds to it, or that of a baseline."""
    name = args.method
    own, pomp = METHODS[name], name == "pomp"
    length, epochs = own["length"], own["epochs"]
    if "words" not in own and name != "linear_probe":
        length = args.length or length
    if pomp and length <= 4:
        epochs = 5  # code
    epochs = args.epochs or epochs
    # Contexts of classes and linear probes cannot predict new classes.
    specific = name in ("pomp", "coop") and args.specific
    halves = "" if name == "linear_probe" or specific else args.group
    group, both = (dict(group="base"), dict(group="base+new")) if halves else ({}, {})
    classes = -(-args.classes // 2) if halves else args.classes
    epoch = max(1, classes * args.shots // own["images"])
    views = 4 if pomp else 1  # code
    source = dict(name="prepared", data_dir=args.data_dir)
    if args.data == "folder":
        source = dict(name="image_folder", data_dir=args.data_dir, names=args.names)
    validation = common.classification(
        dict(source, split=args.val_split, **both),
        256,
        # Table 1, whose ensemble is of seven templates in the code, where CLIP has eighty
        prompts=dict(hard="a photo of a {}.", ensemble="simple", ensemble_80="imagenet"),
    )
    config = common.run(
        "pomp" if name == "coop" else name,
        seed=args.seed,
        steps=epochs * epoch,
        batch_size=own["images"] * views,
        towers=published_towers(args),
        optimizer=common.sgd(  # appendix A, with a cosine; momentum: code
            own["learning_rate"],
            hold_steps=epoch,  # code: the rate changes once an epoch
            warmup_steps=epoch,  # code
            warmup_rate=own["warmup_rate"],
            decay_steps=epochs
            * epoch,  # code: the cosine is as long as the run, and starts behind the warm-up
            weight_decay=5e-4,  # code
        ),
        data=dict(
            train=[dict(source, split=args.split, num_classes=args.classes, shots=args.shots, **group)],
            image_size=224,
            views=views,
            cache_features=0,
            augment=dict(crop=(0.08, 1.0), flip=True, randaugment=2 if pomp else 0, policy="dassl"),  # code
            workers=8,
        ),
        final_evals=dict(validation=validation),
        checkpoint=common.checkpoint(every=epoch),
    )
    if name not in ("vpt", "maple"):  # which change the images' features
        config.data.cache_features = args.cache
    if name == "vpt":
        config.prompt = dict(length=length, depth=own["depth"])
    elif name != "linear_probe":
        config.loss = dict(sample=0, chunk=256)  # classes at once where all take part: ours
        config.prompt = dict(
            length=length,
            position=args.position if name != "maple" else "end",
            specific=specific,
            init=args.init or own.get("words", ""),
        )
    if name == "maple":
        config.prompt.depth = own["depth"]
    if pomp and args.sample:
        config.loss.update(
            sample=args.sample, correction=args.correction, proposal=args.proposal, per_device=args.per_device
        )
    return config
