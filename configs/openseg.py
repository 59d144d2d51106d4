"""OpenSeg (papers/004: Ghiasi et al., Scaling Open-Vocabulary Image Segmentation with Image-Level Labels).

  python -m ovseg_jax.main --config=configs/openseg.py
      trains on `scenes`, which is generated on the fly, on a laptop CPU in minutes. Expected on its test split,
      the mean of 3 seeds: mIoU of 83.7 on seen pairs, 75.4 held out, 92.6 on stuff; Grounding mIoU 87.5.
  python -m ovseg_jax.main --config=configs/openseg.py:data=coco,data_dir=DIR,size=tiny
      some steps on any folder of COCO's layout, on a laptop CPU: a check that your files are read.
  python -m ovseg_jax.main --config=configs/openseg.py:data=prepared,data_dir=DIR,val_dir=DIR
      the paper's recipe on a data set that `python -m ovseg_jax.prepare` wrote to DIR.
  python -m ovseg_jax.main --config=configs/openseg.py:data=coco,data_dir=DIR,evals=benchmark,eval_sets=DIR2
      the paper's recipe for COCO, tested on the five sets of 4.1, whose row of Table 2 it prints; narratives=DIR3
      adds Localized Narratives. The paper's mIoU with both and noisy student (Table 3): A-847 6.6, PC-459 10.7, A-150
      24.4, PC-59 46.9. None of its scores has been reproduced yet.

Numbers with a section, table or appendix are the paper's. What the paper leaves out is marked "ours".
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.tables import ENGINEERED, LABELS, TABLE_2
from ovseg_jax.methods.published import image_section
from ovseg_jax.models import eva, vit
from ovseg_jax.pretrained.published import CENTRED, pixels_of, weights_of
from ovseg_jax.scoring.protocols import CONTEXT_59, PROTOCOLS

# Learning rate (Table 3), steps on COCO alone (4.1) and on COCO and Localized Narratives (Table 3). ALIGN's weights,
# of the paper's best rows, were never released.
INITS = {
    "noisy_student": (0.08, 30_000, 60_000),
    "scratch": (0.32, 90_000, 180_000),  # on COCO alone: ours, half as many, as with noisy student
}
RECIPE = -1.0  # stands for the number of the recipe
# The classes of PC-59 that VOC lacks: predicted in PAS-20, they are background (4.1).
REST = tuple(n for k, n in enumerate(CONTEXT_59) if k not in PROTOCOLS["pas21-openseg"].predicted)
# Tower, weights, embed_dim.
TEXT_TOWERS = {
    "clip": ("clip_vitl14_336", "hf:openai/clip-vit-large-patch14-336", 768),  # of the released model
    "bert": ("bert_large", "hf:google-bert/bert-large-uncased", 1024),  # 4.1's architecture
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        # prepared: folders that `python -m ovseg_jax.prepare` wrote; their splits `train` and `val` are read
        data=("scenes", "coco", "folder", "prepared"),
        data_dir="",  # data=folder, prepared: also several, A;B, mixed by equal parts (Table 6)
        val_dir="",  # data=folder, prepared: the folder to evaluate on, which needs classes; by default none
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes, or coco_panoptic of the package
        size=("", "tiny"),  # tiny: a small network and few steps, for any data
        # folders A;B of images and captions (ovseg_jax/data/README.md), mixed in; together they are drawn as often as
        # one of the others (4.1)
        narratives="",
        narratives_are=("", "folders", "prepared"),  # as in sets_are; by default prepared with data=prepared
        tars="",  # not data=scenes: folders A;B of tars of images and captions, as img2dataset writes CC3M; mixed in
        images=AtLeast(10_000, 1),  # data=scenes: number of training images with masks
        captioned=0,  # data=scenes: number of further ones with captions alone, mixed in by half
        # true: the images of narratives, tars or captioned get pseudo-masks first, of a teacher that is trained on the
        # others (3.3); or WORKDIR of a finished teacher
        pseudo="",
        eval_sets="",  # a folder that holds the sets of Table 2 by name, to test on at the end
        sets=";".join(TABLE_2),  # which of them, or others that lie there
        sets_are=("folders", "prepared"),  # of images and masks, or written by `python -m ovseg_jax.prepare`
        names="",  # more names (appendix I), to test on as SET+eng as well: a folder of SET.txt, or package
        masks="predicted",  # Table 4: which masks to test with, of predicted;none;truth; the first names the scores
        # 4.1; resnet101 in Table 2; or a tower of `predict --model=list`, such as tipsv2_b14
        backbone="efficientnet_b7",
        init=tuple(INITS),  # for ResNets, noisy_student stands for ImageNet's weights
        weights="",  # where they are, if not on the hub: a folder or file
        text=("clip", "bert", "learned"),  # the frozen text encoder; learned: words learn their vectors
        text_weights="",  # where it is, if not on the hub: a folder with weights and tokeniser
        vectors="",  # an .npz of `words` and `vectors`: a frozen encoder that knows these words only
        method=("openseg", "lseg"),  # lseg: the per-pixel supervised baseline of 4.3, LSeg+
        # teacher: learns masks alone (3.3), and is tested on their recall (Tables 1 and 6)
        stage=("", "teacher"),
        contrast=("unsync", "sync"),  # 4.1; sync in appendix F and in the strongest rows of Table 2
        # panoptic: at the end also PQ, and AP of things, on the same images. benchmark: the five sets of 4.1 alone, in
        # the folder eval_sets, and PAS-20 by the protocol of 4.1
        evals=("", "panoptic", "benchmark"),
        captions="noun+adj",  # Table 5: all | noun+adj+verb | noun+adj
        kp=RECIPE,  # Table 9: the keep probability of words; by default the recipe's
        mask_weight=RECIPE,  # α of eq. 5, by default the recipe's; 0 in Table 8: captions alone
        seed=0,
    )
    config = base(args)
    if args.stage == "teacher":
        config = teacher(config)
    else:
        taught(config, args)
    args.check_read()
    return config


def base(args: Args) -> ConfigDict:
    """Returns what teachers and their students share."""
    config = scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    return config


def teacher(config: ConfigDict) -> ConfigDict:
    """Returns a config that trains masks alone, the teacher of 3.3; words have no part in it."""
    config.loss.grounding_weight = 0.0
    config.data.batch_augment = []  # those of `scenes` are for words
    config.text = dict(learned=True, vectors="")  # nothing to download
    for section in (config.evals, config.final_evals):
        for evaluation in section.values():
            evaluation.type = "proposals"
            if "masks" in evaluation:  # both sections may hold the same one
                del evaluation["masks"]
    return config


def taught(config: ConfigDict, args: Args) -> None:
    """Fills in what concerns words: the text side, what is kept of captions, both losses and the tests with names."""
    if args.vectors:
        config.text = dict(learned=False, vectors=args.vectors)
    config.method, config.data.caption_filter = args.method, args.captions
    masks = tuple(args.masks.split(";"))
    for section in (config.evals, config.final_evals):
        for evaluation in section.values():
            evaluation.masks = masks
    own = config.final_evals.get("test") or config.final_evals.get("validation")
    if args.evals == "panoptic" or (args.evals and args.data == "scenes"):
        if args.evals == "benchmark" or args.method == "lseg" or not own:
            raise UserError(f"evals={args.evals} has no effect with data={args.data},method={args.method}")
        config.final_evals.update(common.panoptic(own))
    if args.method == "lseg":
        # Words of captions can be dropped where an augmentation makes them wrong, but not the class of a pixel.
        config.data.batch_augment = []
        if args.data == "scenes":
            # Ours: without its mask side, and with labels at half size, a step takes 5/8 of the time.
            config.steps = config.steps * 8 // 5
            config.data.mask_stride = 2
            # The bounds of `scenes` are for eq. 6, which is not used here.
            config.loss.update(dict(temperature=0.05, temperature_bounds=(0.01, 1.0)))
        return
    config.loss.contrast = args.contrast
    if args.kp != RECIPE:
        with config.ignore_type():  # `scenes` has a probability for each part of speech
            config.data.keep_prob = args.kp
    if args.mask_weight != RECIPE:
        config.loss.mask_weight = args.mask_weight
        if not args.mask_weight:
            config.model.detach_masks = False  # otherwise nothing trains the masks of `scenes`
    if args.pseudo:
        pseudo_labelled(config, args)


def pseudo_labelled(config: ConfigDict, args: Args) -> None:
    """Adds the stages of 3.3: a teacher learns masks on the other sources, and labels the captioned images.

    With `pseudo=WORKDIR` the run in that folder is the teacher.

    Raises:
      UserError: there is no source of captions.
    """
    own = base(args.changed(narratives="", narratives_are="", tars="", captioned=0))
    count = len(own.data.train)
    captioned = config.data.train[count:]
    if not captioned:
        key = "captioned" if args.data == "scenes" else "narratives"
        raise UserError(f"pseudo={args.pseudo} labels the images of {key}=, which is missing")
    stages, first = [], args.pseudo
    if first == "true":
        own = teacher(own)
        own.evals, own.final_evals = {}, {}
        stages, first = common.train_stages(teacher=own), "stage:teacher"
    for k, source in enumerate(captioned):
        name = f"masks{k or ''}"
        labelled = {key: value for key, value in source.items() if key != "cache"}
        labels = dict(teacher=first, source=labelled, batch_size=16)
        stages.append(dict(name=name, kind="pseudo_label", config=labels))
        config.data.train[count + k] = dict(source, masks=f"stage:{name}")
    config.stages = stages


def scenes_net() -> dict[str, Any]:
    """Returns a network that learns `scenes` in minutes. All numbers are ours."""
    return dict(
        backbone=dict(name="small", width=48, levels=3),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        width=64,
        embed_dim=64,
        num_queries=8,
        decoder_layers=3,
        decoder_heads=1,
        head_convs=1,
        pyramid_output_conv=False,
        position_grid=16,
        mask_scale=1.0,
        mask_bias=-1.0,
        # The paper's grounding loss also moves the masks: then a run of minutes does not learn masks first.
        detach_masks=True,
        remat="none",
        dtype="float32",
    )


def scenes(args: Args) -> ConfigDict:
    """Returns OpenSeg on the embedded data, four to nine minutes on two cores. All numbers are ours."""
    train = [dict(common.scenes("train", args.images), cache=True)]
    if args.captioned:
        # Other images than those with masks: another seed.
        others = dict(common.scenes("train", args.captioned), seed=1, fields=["image", "captions"])
        train.append(dict(others, cache=True))
    return common.run(
        "openseg",
        steps=5500,
        batch_size=16,
        model=scenes_net(),
        # There is no pretrained text tower for a made-up world: each word's vector is learned, a phrase is the
        # normalised sum of its words' vectors.
        text=dict(learned=True, vectors=""),
        loss=dict(
            mask_weight=2.0,
            grounding_weight=1.0,
            contrast="unsync",
            group=16,
            form="auto",
            # Eq. 6 adds cosines of overlapping proposals, which a small temperature hardly tells apart. On one seed a
            # lower bound of 0.06 gave 9 points of seen mIoU, 0.09 another 3.
            temperature=0.1,
            temperature_bounds=(0.09, 1.0),
            shared_temperature=False,
        ),
        optimizer=common.adamw_of_scenes(),
        data=dict(
            train=train,
            image_size=64,
            mask_stride=1,
            max_masks=6,
            max_words=16,
            scale_jitter=(1.0, 1.0),
            flip=True,
            caption_filter="noun+adj",
            tagger="pattern",
            min_count=1,
            keep_prob=dict(noun=1.0, adj=0.9),
            batch_augment=common.without_shortcuts(),
            workers=0,
        ),
        evals=dict(validation=common.segmentation(common.scenes("validation", 200), 64, every=1000)),
        final_evals=dict(test=common.segmentation(common.scenes("test", 500), 64)),
        checkpoint=common.checkpoint(every=500, keep=2),
    )


def paper(args: Args) -> ConfigDict:
    """Returns the recipe of 4.1 on COCO's layout, or on a folder of your own; with size=tiny for a laptop.

    Ours, and no key of the config, where the paper says nothing: GroupNorm of 8 groups and ReLU in the heads; pre-norm
    blocks, an MLP of twice the width and no dropout in the decoder; queries that start from N(0, 0.5), positions from
    N(0, 0.1); one of an image's captions is drawn a step; where all words of a caption would be dropped, the one that
    came closest to being kept stays; τ is learned on a log scale; no weight decay on arrays of one dimension.
    """
    train, validation = sources(args)
    tiny = args.size == "tiny"
    evals = {}
    if validation:
        evals["validation"] = common.segmentation(validation, 64, every=5000)
    config = common.run(
        "openseg",
        batch_size=1024,  # 4.1
        loss=dict(
            mask_weight=1.0,  # α of eq. 5: ours, the paper gives no value
            grounding_weight=1.0,
            contrast="unsync",
            group=16,  # 4.1: each core contrasts its local batch of 16
            form="auto",  # of contrast=sync: gather | ring (kernels/all_pairs.py), by size
            temperature=0.07,  # the start of a learned one: ours
            temperature_bounds=(0.01, 1.0),  # ours, as CLIP's; the paper has none: ()
            shared_temperature=True,  # eq. 2: one τ
        ),
        data=dict(
            train=train,  # equal probability, 4.1
            image_size=640,  # 4.1
            mask_stride=4,  # of the masks in the loss, the network's own (P2): ours
            max_masks=64,  # ours
            max_words=32,  # ours
            scale_jitter=(0.8, 1.2),  # 4.1
            flip=True,  # ours
            caption_filter="noun+adj",  # Table 5
            tagger="pattern",  # ours
            # The paper has no vocabulary. A frozen tower needs none; rare words would learn no vector: ours.
            min_count=1 if tiny or args.stage or args.vectors or args.text != "learned" else 5,
            keep_prob=0.75 if args.narratives else 0.5,  # appendix H; 4.1
            batch_augment=[],
            workers=8,
        ),
        evals=evals,
        final_evals=final_evals(args, evals),
        checkpoint=common.checkpoint(every=1000, keep=3),
        log_every=50,
    )
    config.update(small(args) if tiny else full(args))
    if tiny:
        for evaluator in (*config.evals.values(), *config.final_evals.values()):
            evaluator.batch_size = 4
        for evaluator in config.evals.values():
            evaluator.every = 0
    return config


def full(args: Args) -> dict[str, Any]:
    """Returns the network, its start and its schedule."""
    learning_rate, *steps = INITS[args.init]
    init, pixels, backbone = "", CENTRED, image_section(args.backbone)
    if args.init != "scratch":
        init, pixels = args.weights or weights_of(backbone["name"]), pixels_of(backbone["name"])
    if 640 % (vit.PRESETS | eva.PRESETS).get(backbone["name"], {}).get("patch", 1):
        backbone["patch"] = 16  # ours: 640 is no multiple of 14, and EVA-CLIP converts its models so
    text, embed_dim = dict(learned=True, vectors=""), 640  # 4.1
    if not args.stage and not args.vectors and args.text != "learned":
        tower, where, embed_dim = TEXT_TOWERS[args.text]
        text = dict(tower=tower, init=args.text_weights or where, prompt="")
    return dict(
        steps=steps[1] if args.narratives else steps[0],
        model=dict(
            backbone=dict(backbone, init=init, remat="all"),
            mean=pixels.mean,
            std=pixels.std,
            width=640,  # 4.1
            embed_dim=embed_dim,
            num_queries=128,  # Table 1
            decoder_layers=3,  # appendix C
            decoder_heads=1,  # ours
            head_convs=3,  # 4.1
            pyramid_output_conv=True,  # FPN
            position_grid=160,  # one for each position of P2 at 640 x 640: ours
            # 3.1: a plain dot product. It starts with a deviation of about 9, with 1 / sqrt(640) of 0.4.
            mask_scale=1.0,
            mask_bias=placeholder(float),  # 3.1: none; a number: where a learned one starts
            detach_masks=False,
            # none | dots | all (models/remat.py). With none, here and in the backbone, 16 images of 640 x 640 do
            # not fit a core of TPU v3.
            remat="dots",
            dtype="bfloat16",  # ours
        ),
        text=text,
        optimizer=common.sgd(  # the paper names no optimiser: ours, from the size of its learning rates
            learning_rate,  # Table 3
            warmup_steps=1000,  # ours
            final_fraction=0.0,  # ours
            weight_decay=1e-5,  # 4.1; not on biases and scales: ours
            clip_norm=1.0,  # ours
        ),
    )


def small(args: Args) -> dict[str, Any]:
    """Returns a network and a run for a laptop, on the same data with the same code. All numbers are ours."""
    pixels = CENTRED
    return dict(
        steps=200,
        batch_size=8,
        log_every=10,
        model=dict(
            backbone=dict(name="small", width=48, levels=4),
            mean=pixels.mean,
            std=pixels.std,
            width=64,
            embed_dim=64,
            num_queries=32,
            decoder_layers=3,
            decoder_heads=1,
            head_convs=1,
            pyramid_output_conv=True,
            position_grid=32,
            mask_scale=1.0,
            mask_bias=placeholder(float),
            detach_masks=False,
            remat="none",
            dtype="float32",
        ),
        text=dict(learned=True, vectors=""),  # Nothing to download.
        loss=dict(group=8),
        optimizer=common.adamw(2e-3, warmup_steps=10, final_fraction=0.0, weight_decay=1e-3, clip_norm=1.0),
        data=dict(image_size=128, max_masks=32, workers=0),
        checkpoint=common.checkpoint(every=100, keep=2),
    )


def sources(args: Args) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Returns the sources to train on (mixed with equal probability, 4.1), and the one to evaluate on."""
    common_ = dict(labels=args.labels or None, data_dir=args.data_dir)
    more: list[dict[str, Any]] = []
    if args.data == "folder":
        common_.update(name="folder", kind=args.kind)
        train = [dict(common_, data_dir=place) for place in args.data_dir.split(";")]
        validation = dict(common_, data_dir=args.val_dir) if args.val_dir else None
    elif args.data == "prepared":
        common_.update(name="prepared")
        train = [dict(common_, data_dir=place) for place in args.data_dir.split(";")]
        validation = dict(common_, data_dir=args.val_dir, split="val") if args.val_dir else None
    else:
        common_.update(name="coco")
        # A laptop has COCO's validation images at most.
        train = [dict(common_, split="val2017" if args.size == "tiny" else "train2017")]
        validation = dict(common_, split="val2017")
    if args.narratives:
        are = args.narratives_are or ("prepared" if args.data == "prepared" else "folders")
        form = "prepared" if are == "prepared" else "folder"
        told = [dict(name=form, data_dir=place) for place in args.narratives.split(";")]
        more += told if len(told) == 1 else [dict(name="joined", sources=told)]
    if args.tars:
        more += [dict(name="webdataset", data_dir=place) for place in args.tars.split(";")]
    return [*train, *more], validation


def final_evals(args: Args, evals: dict[str, Any]) -> dict[str, Any]:
    """Returns the evaluations at the end: those during training, and the sets of Table 2, or others.

    Each set is a folder of its name in `eval_sets`, in the layout of data.sources.folder, with kind=semantic, for a
    teacher with `kind`; or a prepared one. All classes of the labels count.
    """
    benchmark = not args.stage and args.evals == "benchmark"
    if not args.eval_sets:
        if benchmark:
            raise UserError("evals=benchmark needs eval_sets=DIR, the folder of the five sets")
        return evals
    if args.sets_are == "prepared":
        form = dict(name="prepared", split="val")
    else:
        form = dict(name="folder", kind=args.kind if args.stage else "semantic")
    sets = TABLE_2 if benchmark else args.sets.split(";")
    files = {}
    if not args.stage and args.names:
        files = {name: f"{args.names}/{name}.txt" for name in sets}
        if args.names == "package":
            own = LABELS | ({"PAS-20": "voc_2012_background"} if benchmark else {})
            files = {name: own[name] for name in sets if name in own}
        if not files:
            raise UserError(f"names=package: the package has more names for {', '.join(LABELS)} only")
    found = {}
    for name in sets:
        source = dict(form, data_dir=f"{args.eval_sets}/{name}")
        rest = dict(names=dict(background=REST)) if benchmark and name == "PAS-20" else {}
        found[name] = common.segmentation(source, 64, **rest)
        if name in files:
            more = dict(source, labels=files[name])
            found[f"{name}{ENGINEERED}"] = common.segmentation(more, 64, **rest)
    return found if benchmark else {**evals, **found}
