"""P-Seg (papers/002: Pseudo-mask and Language: A Simple Recipe for Open-Vocabulary Semantic Segmentation).

  python -m ovseg_jax.main --config=configs/pseg.py
      P-Seg on `scenes` with captions alone, on a laptop CPU in minutes: no labelled mask is read. Mean of 3 seeds: mIoU
      of 74.0 on seen pairs, 66.3 held out, 90.0 on stuff.
  python -m ovseg_jax.main --config=configs/pseg.py:plus=true
      then P-Seg+: images of all classes, labelled by it, train a UPerNet: 76.2, 68.5 and 90.9. P-Seg's own scores
      are in `pseg/summary.json` of the run.
  python -m ovseg_jax.main --config=configs/pseg.py:form=paper
      the same data with the paper's form, see below.
  python -m ovseg_jax.main --config=configs/pseg.py:baseline=true
      baseline 2 (4.1) on the same data. One seed: 73.7, 64.3 and 91.3.
  python -m ovseg_jax.main --config="configs/pseg.py:data=tars,data_dir=CC3M;CC12M;REDCAPS,tokenizer=DIR,dino=DIR"
      the paper's recipe (Tables 10 and C.1) on tars of images and captions, as img2dataset writes them; DIR are folders
      of CLIP's tokeniser and of DINO's weights, by default taken from the hub. The paper's mIoU with background
      (Table 4): VOC 53.2, Context 27.9, COCO 30.3. None of its scores has been reproduced yet.

Numbers with a section, table or equation are the paper's. What the paper leaves out is marked "ours".

The paper's form (MaskFormer, whose mask features are queries; their mean is contrasted with the whole caption;
Hungarian matching) needs millions of pairs. On the 10,000 of `scenes` it learns masks but not names: 0.4, 0.4 and 21.1.
form=small, the default there, is ours: OpenSeg's network, which sums pixel embeddings under the predicted masks; each
word attends to the masks; each pseudo-mask trains its best query.
"""

from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.config import Args, AtLeast, parse_arg
from ovseg_jax.configs import common, openseg, upernet
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.published import IMAGENET

EPOCHS, WARMUP = 30, 2  # Table 10
PAIRS = 26_000_000  # C.1


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        # tars: folders of tars of images and captions; others: with captions, and classes for val_dir
        data=("scenes", "tars", "folder", "coco", "prepared"),
        data_dir="",  # not data=scenes: also several, A;B, all of whose images are equally likely
        form=("", "paper", "small"),  # see above; by default small on `scenes`, else paper
        images=AtLeast(10_000, 1),  # data=scenes: number of training images
        pairs=AtLeast(PAIRS, 1),  # not data=scenes: number of pairs in an epoch, for the number of steps
        val_dir="",  # not data=scenes: a folder to evaluate on, which needs classes; by default none
        # not data=scenes: a folder of the sets, which are scored at the end as GroupViT does (C.1), VOC by MaskFormer's
        # inference; see `common.BACKGROUND`
        eval_sets="",
        sets="VOC;Context;COCO-Object",  # eval_sets; others: LVIS, ImageNet-S (Table 7)
        sets_are=("prepared", "folders"),  # eval_sets
        background=True,  # eval_sets: whether background pixels are scored
        backbone="swin_small",  # C.1
        # form=paper: nouns and verbs of a caption in templates that an image is contrasted with beside the caption, by
        # GroupViT's multi-label loss, which has 3; the paper has no such term
        prompts=AtLeast(0, 0),
        tokenizer="hf:openai/clip-vit-base-patch16",  # where CLIP's tokeniser is; its vocabulary is that of C.1
        dino="hf:facebook/dino-vits8",  # where DINO's weights are
        # true: pseudo-masks are made once, of the whole images, before the training; false: in each step, of the
        # augmented images, as in Figure 17. By default true on `scenes`
        ahead=("", "true", "false"),
        # whether baseline 2 of 4.1 is trained instead: a ViT whose tokens are pooled in each pseudo-mask; it learns
        # names from captions, and no masks
        baseline=False,
        plus=False,  # data=scenes: whether P-Seg+ follows; on other data it is configs/upernet.py:teacher=WORKDIR
        seed=0,
    )
    config = scenes(args) if args.data == "scenes" else paper(args)
    config.seed = args.seed
    if args.baseline:
        config.loss.mask_weight = 0.0
    elif args.ahead == "true" or (args.data == "scenes" and args.ahead != "false"):
        make_masks_ahead(config)
    if args.data == "scenes" and args.plus:
        config = with_student(config)
    args.check_read()
    return config


def make_masks_ahead(config: ConfigDict) -> None:
    """Moves the pseudo-masks from the step to stages before the training."""
    generator, stages = config.pseudo_masks.to_dict(), []
    config.data.mask_stride, config.data.max_masks = generator.pop("mask_stride"), generator["clusters"]
    del config.pseudo_masks
    for k, source in enumerate(config.data.train):
        name = f"masks{k or ''}"
        source = dict(source, fields=["image", "captions"])  # no masks of its own
        own = {key: value for key, value in source.items() if key != "cache"}
        made = dict(generator=generator, source=own, image_size=config.data.image_size, batch_size=32)
        stages.append(dict(name=name, kind="cluster", config=made))
        config.data.train[k] = dict(source, masks=f"stage:{name}")
    config.stages = stages


def with_student(teacher: ConfigDict) -> ConfigDict:
    """Returns P-Seg+ (3.3.4): P-Seg as a stage, which labels the images of the target, and a student of its labels."""
    student = upernet.scenes()
    student.seed = teacher.seed
    upernet.label(student, "stage:pseg")
    student.stages = [*common.train_stages(pseg=teacher), *student.stages]
    return student


def contrast_prompts(config: ConfigDict, count: int) -> None:
    """Adds GroupViT's multi-label loss of `count` prompts an image, if there are any."""
    if count:
        config.data.max_prompts = count
        config.loss.multi_label_weight = 1.0  # GroupViT's code


def losses(small: bool) -> dict[str, Any]:
    """Returns the loss section of a form."""
    return dict(
        mask_weight=2.0 if small else 1.0,  # 3.3.3
        contrastive_weight=1.0,  # 3.3.3
        average=False,  # eq. 4 and 3.3.3 add the losses; Figure 17 halves the sum, which only scales the rate of AdamW
        matching="best" if small else "hungarian",  # 3.3.1
        focal=20.0,  # 3.3.3
        dice=1.0,  # 3.3.3
        aggregation="words" if small else "mean",  # 3.3.2
        temperature=0.1 if small else 0.07,  # ours, as GroupViT
        temperature_bounds=(0.09, 1.0) if small else (0.01, 1.0),  # ours, as configs/openseg.py; as CLIP
        form="auto",  # gather | ring (kernels/all_pairs.py), by size
    )


def scenes(args: Args) -> ConfigDict:
    """Returns P-Seg on the embedded data. All numbers are ours, except those of the paper's form."""
    small = args.form != "paper"
    config = common.run(
        "pseg",
        steps=4500,
        batch_size=16,
        model=scenes_model(small, args.baseline),
        loss=losses(small),
        pseudo_masks=common.colour_masks(),
        optimizer=common.adamw_of_scenes(ema=0.998),
        data=dict(
            train=[dict(common.scenes("train", args.images), fields=["image", "captions"], cache=True)],
            image_size=64,
            workers=0,
        ),
        evals=dict(validation=common.segmentation(common.scenes("validation", 200), 64, every=2500)),
        final_evals=dict(test=common.segmentation(common.scenes("test", 500), 64)),
        checkpoint=common.checkpoint(every=500, keep=2),
    )
    if small:
        config.text = dict(learned=True, vectors="", layers=0)
        config.loss.group = 16
        config.data.update(
            dict(
                scale_jitter=(1.0, 1.0),
                flip=True,
                max_words=16,
                caption_filter="noun+adj",
                tagger="pattern",
                min_count=1,
                keep_prob=dict(noun=1.0, adj=0.9),
                batch_augment=common.without_shortcuts(channels=0.6, blur=0.4),
            )
        )
    else:
        config.text = transformer("words", width=64, layers=2, heads=4, hidden=64, length=32)
        config.data.update(dict(scale_jitter=(1.0, 1.0), flip=True))
        contrast_prompts(config, args.prompts)
    return config


def scenes_model(small: bool, baseline: bool) -> dict[str, Any]:
    """Returns the network of a form, or of the baseline, for images of 64 pixels. All numbers are ours."""
    if baseline:
        size = dict(patch=8, grid=(8, 8), width=64, depth=4, heads=4, mlp_dim=128)
        pixels = dict(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), dtype="float32")
        return segment_vit(size, embed_dim=64, projection_hidden=64, **pixels)
    if not small:
        return small_maskformer()
    backbone = dict(name="small", width=48, levels=3, stem="light")
    return dict(openseg.scenes_net(), network="openseg", backbone=backbone)


def segment_vit(size: dict[str, Any], **own: Any) -> dict[str, Any]:
    """Returns the network of baseline 2 (4.1); the paper does not say which ViT it is, nor what follows the pooling."""
    tower = dict(name="vit", cls="none", pool="mean", remat="none", **size)
    return dict(network="segment_vit", backbone=tower, projection_norm=False, **own)


def small_maskformer() -> dict[str, Any]:
    """Returns the network of the paper's form for images of 64 pixels."""
    return dict(
        network="maskformer",
        backbone=dict(name="small", width=48, levels=3),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        num_queries=8,
        width=64,
        mask_dim=64,
        layers=3,
        heads=4,
        ffn=128,
        dropout=0.0,
        deep_supervision=False,
        remat="none",
        dtype="float32",
        embed_dim=64,
        projection_hidden=64,
        projection_norm=False,
    )


def transformer(
    tokenizer: str, width: int, layers: int, heads: int, hidden: int, length: int
) -> dict[str, Any]:
    """Returns the text side of the paper's form."""
    return dict(
        tokenizer=tokenizer,
        vocab_size=0 if tokenizer == "words" else 49408,  # C.1
        length=length,
        width=width,
        layers=layers,
        heads=heads,
        projection_hidden=hidden,
        projection_norm=False,
        prompt="a photo of a {}.",  # GroupViT's, whose inference the paper follows (C.1)
        remat="none",
    )


def paper_model(args: Args) -> dict[str, Any]:
    """Returns the network of C.1, or of baseline 2, from random weights."""
    if args.baseline:  # ours: ViT-S/16; the rest as below
        size = dict(patch=16, grid=(14, 14), width=384, depth=12, heads=6, mlp_dim=1536)
        pixels = dict(mean=IMAGENET.mean, std=IMAGENET.std, dtype="bfloat16")
        return segment_vit(size, embed_dim=256, projection_hidden=256, **pixels)
    return dict(
        network="maskformer",  # 3.2
        backbone=dict(name=args.backbone, init="", remat="none"),  # no weights: 3.3 needs no labels (ours)
        mean=IMAGENET.mean,  # ours, as GroupViT and MaskFormer
        std=IMAGENET.std,
        num_queries=64,  # C.1
        width=256,  # C.1
        mask_dim=256,  # C.1
        layers=6,  # C.1
        heads=8,  # ours, as MaskFormer
        ffn=2048,  # ours, as MaskFormer
        dropout=0.1,  # ours, as MaskFormer
        # Figure 17 has one mask loss. True: each layer of the decoder is matched, as in the authors' MaskFormer.
        deep_supervision=False,
        remat="none",
        dtype="bfloat16",  # ours
        embed_dim=256,  # C.1
        projection_hidden=256,  # ours: 2 layers (C.1); GroupViT's have 4096
        # Ours: GroupViT's are normalised, but here statistics would be of means over masks, and tests of masks.
        projection_norm=False,
    )


def paper(args: Args) -> ConfigDict:
    """Returns the recipe of Table 10 and C.1."""
    if not args.data_dir:
        raise UserError(f"data={args.data} needs data_dir=")
    if args.form == "small":
        raise UserError("form=small is for data=scenes")
    places = args.data_dir.split(";")
    name = dict(tars="webdataset").get(args.data, args.data)
    # One source, since a list of several would be drawn from in equal parts, and C.1 has 3, 12 and 11 million pairs.
    folders = [dict(name=name, data_dir=place) for place in places]
    train = folders if len(folders) == 1 else [dict(name="joined", sources=folders)]
    evals = {}
    if args.val_dir:
        form = "folder" if args.data == "tars" else args.data
        evals["validation"] = common.segmentation(dict(name=form, data_dir=args.val_dir), 16, every=5000)
    ends = dict(evals)
    if args.eval_sets:
        scored = common.by_protocol(args.eval_sets, args.sets, args.sets_are, args.background, 16)
        if "VOC" in scored:
            scored["VOC"]["protocol"] = f"pseg_{scored['VOC']['protocol']}"
        ends |= scored
    batch, epoch = 4096, args.pairs / 4096  # Table 10
    config = common.run(
        "pseg",
        steps=round(EPOCHS * epoch),
        batch_size=batch,
        model=paper_model(args),
        # C.1; heads as GroupViT
        text=transformer(args.tokenizer, width=256, layers=12, heads=4, hidden=256, length=77),
        loss=losses(small=False),
        pseudo_masks=common.dino_masks(args.dino),
        optimizer=common.adamw(
            5e-4,  # Table 10's "base" rate, not times batch / 256 (ours): that would make Table 11's 6e-6
            warmup_steps=round(WARMUP * epoch),  # Table 10
            final_fraction=0.0,  # ours
            weight_decay=0.05,  # Table 10
            clip_norm=5.0,  # ours, as GroupViT
            b1=0.9,  # Table 10
            b2=0.999,  # Table 10
            # GroupViT's code: no bias decays, and as everywhere here nothing of one axis.
            no_decay=("/bias$",),
        ),
        data=dict(
            train=train,
            image_size=224,  # C.1
            augment=dict(
                crop=(0.08, 1.0), flip=True, randaugment=0
            ),  # C.1: random crops; bounds and flip ours
            caption_text="nouns_verbs",  # C.1; caption: all of it; prompt: one of these words in a template of CLIP's
            tagger="pattern",  # ours; nltk, as GroupViT, needs a download
            workers=16,
        ),
        evals=evals,
        final_evals=ends,
        checkpoint=common.checkpoint(every=1000, keep=3),
        log_every=50,
    )
    contrast_prompts(config, args.prompts)
    return config
