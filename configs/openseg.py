"""OpenSeg (papers/004: Ghiasi et al., Scaling Open-Vocabulary Image Segmentation with Image-Level Labels).

  python -m ovseg_jax.main --config=configs/openseg.py
      trains on `scenes`, which is generated on the fly, on a laptop CPU in minutes.
  python -m ovseg_jax.main --config=configs/openseg.py:data=coco,data_dir=DIR,size=tiny
      some steps on any folder of COCO's layout, on a laptop CPU: a check that your files are read.
  python -m ovseg_jax.main --config=configs/openseg.py:data=coco,data_dir=DIR
      the paper's recipe for COCO; with narratives=DIR2 for COCO and Localized Narratives (4.1).

Numbers with a section, table or appendix are the paper's. What the paper leaves out is marked "ours".
"""

from ml_collections import ConfigDict

from ovseg_jax.config import parse_arg
from ovseg_jax.errors import UserError

# Table 3 and 4.1: learning rate, and steps for (COCO, COCO and Localized Narratives). ALIGN's own weights, of the
# paper's best rows, were never released: the released model started from noisy student.
INITS = {
    "scratch": (0.32, (180_000, 180_000)),
    "noisy_student": (0.08, (60_000, 60_000)),
    "align": (0.005, (30_000, 60_000)),
}
# Published weights of each backbone, and of the text towers; see pretrained/hub.py for other places.
WEIGHTS = {
    "efficientnet_b7": "timm:tf_efficientnet_b7.ns_jft_in1k",
    "resnet101": "timm:resnet101.tv_in1k",
    "resnet50": "timm:resnet50.tv_in1k",
    "clip_vitb32": "hf:openai/clip-vit-base-patch32",
    "clip_vitb16": "hf:openai/clip-vit-base-patch16",
    "clip_vitl14": "hf:openai/clip-vit-large-patch14",
    "dino_vits8": "hf:facebook/dino-vits8",
    "dino_vits16": "hf:facebook/dino-vits16",
    "mae_vitb16": "hf:facebook/vit-mae-base",
}
TEXT_TOWERS = {
    "clip": ("clip_vitl14_336", "hf:openai/clip-vit-large-patch14-336", 768),  # of the released model
    "bert": ("bert_large", "hf:google-bert/bert-large-uncased", 1024),  # 4.1's architecture
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Keys of `arg`: see `parse_arg` below; unknown ones are an error that lists them."""
    args = parse_arg(
        arg,
        data="scenes",  # scenes | coco | folder
        data_dir="",
        val_dir="",  # data=folder: the folder to evaluate on, which needs classes; none where it is not said
        kind="segments",  # data=folder: what the values of a mask are: segments | semantic
        labels="",  # a label file with more names for the classes
        size="",  # tiny: a small network and few steps, for any data
        narratives="",  # a folder of images and captions (README: train on your own data) mixed in by half
        backbone="efficientnet_b7",  # 4.1; resnet101 in Table 2
        init="noisy_student",  # scratch; for ResNets ImageNet's weights, whatever the name
        weights="",  # where they are, if not on the hub: a folder or file
        text="clip",  # the frozen text encoder: clip | bert; learned: words learn their vectors
        text_weights="",  # where it is, if not on the hub: a folder with weights and tokeniser
        vectors="",  # an .npz of `words` and `vectors`: a frozen encoder that knows these words only
        method="openseg",  # lseg: the per-pixel supervised baseline of 4.3, LSeg+
        contrast="unsync",  # 4.1; sync in appendix F and in the strongest rows of Table 2
        captions="noun+adj",  # Table 5: all | noun+adj+verb | noun+adj
        seed=0,
    )
    if args.data == "scenes":
        config = scenes()
    elif args.data in ("coco", "folder"):
        config = paper(args)
        if args.size == "tiny":
            shrink(config)
    else:
        raise UserError(f"data={args.data}: known are scenes, coco, folder")
    if args.size not in ("", "tiny"):
        raise UserError(f"size={args.size}: leave it out, or say size=tiny")
    if args.method == "lseg":
        # What these spoil, the words of captions can drop, but not the class of a pixel.
        config.data.batch_augment = []
        # Without its mask side a step takes less: for the small network, with labels at half size, 5/8 of the time.
        config.steps = config.steps * 8 // 5
        if args.data == "scenes":
            config.data.mask_stride = 2
            # Bounded for the sake of eq. 6, which is not used here.
            config.loss.update(dict(temperature=0.05, temperature_bounds=(0.01, 1.0)))
    if args.vectors:
        config.text = dict(learned=False, vectors=args.vectors)
    if not config.text.get("learned", False):
        config.optimizer.frozen = ("^text/",)
    config.seed = args.seed
    config.method = args.method
    config.loss.contrast = args.contrast
    config.data.caption_filter = args.captions
    return config


def scenes() -> ConfigDict:
    """OpenSeg on the embedded data: 64 px images, a small network, eight and a half minutes on two cores (ours)."""
    source = dict(name="scenes", size="small", image_size=64)
    evaluation = dict(type="segmentation", masks=("predicted",), batch_size=64)
    steps = 5500
    return ConfigDict(
        dict(
            method="openseg",
            seed=0,
            steps=steps,
            batch_size=16,
            accumulate=1,
            profile="",
            mesh=dict(data=-1, fsdp=1),
            model=dict(
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
                mask_scale=8.0,
                mask_bias=-1.0,
                # A departure from the paper, whose grounding loss also moves the masks: without it a run of
                # minutes does not learn masks first.
                detach_masks=True,
                remat="none",
                dtype="float32",
            ),
            # There is no pretrained text tower for a made-up world: each word's vector is learned, a phrase is
            # the normalised sum of its words' vectors.
            text=dict(learned=True, vectors=""),
            loss=dict(
                mask_weight=2.0,
                grounding_weight=1.0,
                contrast="unsync",
                group=16,
                form="auto",
                # Not allowed to sink: eq. 6 adds cosines of overlapping proposals, so they have to differ by more than
                # a small temperature asks for. On one seed a floor of 0.06 gave 9 points of seen mIoU, 0.09 another 3.
                temperature=0.1,
                temperature_bounds=(0.09, 1.0),
                shared_temperature=False,
            ),
            optimizer=dict(
                name="adamw",
                learning_rate=2e-3,
                schedule="cosine",
                warmup_steps=100,
                final_fraction=0.02,
                weight_decay=1e-3,
                clip_norm=1.0,
                b1=0.9,
                b2=0.98,
            ),
            data=dict(
                train=[dict(source, split="train", num_examples=10_000, cache=True)],
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
                # Whole batches lose their colour, and with it the words for colour; others lose their texture,
                # and with it the words for things. Otherwise colour tells which nouns never occur together, and
                # the held-out pairs are never learned.
                batch_augment=[
                    dict(name="channels", probability=0.65, probability_end=0.4, drop=("lexicon:colour",)),
                    dict(
                        name="blur",
                        probability=0.25,
                        factor=8,
                        mask_weight=0.1,
                        drop=("pos:noun",),
                        spare=("lexicon:stuff",),
                    ),
                ],
                workers=0,
            ),
            evals=dict(
                validation=dict(
                    evaluation, source=dict(source, split="validation", num_examples=200), every=1000
                )
            ),
            final_evals=dict(test=dict(evaluation, source=dict(source, split="test", num_examples=500))),
            checkpoint=dict(every=500, keep=2),
            log_every=20,
        )
    )


def paper(args: ConfigDict) -> ConfigDict:
    """The recipe of 4.1 on COCO's layout, or on a folder of your own."""
    if args.init not in INITS:
        raise UserError(f"init={args.init}: known are {', '.join(INITS)}")
    if args.init == "align":
        raise UserError("init=align: ALIGN's weights were never released; leave it out, or say init=scratch")
    if args.text not in (*TEXT_TOWERS, "learned"):
        raise UserError(f"text={args.text}: known are {', '.join(TEXT_TOWERS)}, learned")
    init = "" if args.init == "scratch" else args.weights or WEIGHTS.get(args.backbone, "")
    if args.init != "scratch" and not init:
        raise UserError(f"backbone={args.backbone} needs weights=FOLDER, or init=scratch")
    text, embed_dim = dict(learned=True, vectors=""), 640  # 4.1
    if args.text != "learned":
        tower, where, embed_dim = TEXT_TOWERS[args.text]
        text = dict(tower=tower, init=args.text_weights or where)
    learning_rate, steps = INITS[args.init]
    train, validation = sources(args)
    evals = {}
    if validation is not None:
        evals["validation"] = dict(
            type="segmentation", masks=("predicted",), batch_size=64, source=validation, every=5000
        )
    return ConfigDict(
        dict(
            method="openseg",
            seed=0,
            steps=steps[1] if args.narratives else steps[0],
            batch_size=1024,  # 4.1
            accumulate=1,  # parts in which a batch goes through the network, where memory is short
            profile="",  # FIRST:STOP, steps to trace for XProf
            mesh=dict(data=-1, fsdp=1),
            model=dict(
                backbone=dict(name=args.backbone, init=init, remat="all"),
                mean=(128 / 255,) * 3,  # the released demo's normalisation
                std=(128 / 255,) * 3,
                width=640,  # 4.1
                embed_dim=embed_dim,
                num_queries=128,  # Table 1
                decoder_layers=3,  # appendix C
                decoder_heads=1,  # ours
                head_convs=3,  # 4.1
                pyramid_output_conv=True,  # FPN
                position_grid=160,  # one for each position of P2 at 640 x 640
                mask_scale=1.0,
                mask_bias=0.0,
                detach_masks=False,
                # none | products | all (models/remat.py). With none, here and in the backbone, 16 images of 640 x 640
                # do not fit a core of TPU v3.
                remat="products",
                dtype="bfloat16",  # ours
            ),
            text=text,
            loss=dict(
                mask_weight=1.0,  # α of eq. 5; the paper gives no value: ours
                grounding_weight=1.0,
                contrast="unsync",
                group=16,  # 4.1: each core contrasts its local batch of 16
                form="auto",  # of contrast=sync: gather | ring (kernels/all_pairs.py), by size
                temperature=0.07,  # the paper gives no start: ours
                temperature_bounds=(0.01, 1.0),
                shared_temperature=True,  # eq. 2: one τ
            ),
            optimizer=dict(
                name="sgd",  # the paper names none: ours, from the size of its learning rates
                learning_rate=learning_rate,  # Table 3
                schedule="cosine",  # 4.1
                warmup_steps=1000,  # ours
                final_fraction=0.0,
                weight_decay=1e-5,  # 4.1
                momentum=0.9,  # ours
                clip_norm=1.0,  # ours
            ),
            data=dict(
                train=train,  # equal probability, 4.1
                image_size=640,  # 4.1
                mask_stride=4,
                max_masks=64,  # ours
                max_words=32,  # ours
                scale_jitter=(0.8, 1.2),  # 4.1
                flip=True,
                caption_filter="noun+adj",  # Table 5
                tagger="pattern",
                min_count=5,  # ours
                keep_prob=0.75 if args.narratives else 0.5,  # appendix H; 4.1
                batch_augment=[],
                workers=8,
            ),
            evals=evals,
            final_evals=evals,
            checkpoint=dict(every=1000, keep=3),
            log_every=50,
        )
    )


def sources(args: ConfigDict) -> tuple[list[dict], dict | None]:
    """What to train on (mixed with equal probability, 4.1), and what to evaluate on."""
    common = dict(labels=args.labels or None)
    if args.data == "folder":
        common.update(name="folder", kind=args.kind)
        train = dict(common, data_dir=args.data_dir)
        validation = dict(common, data_dir=args.val_dir) if args.val_dir else None
    else:
        common.update(name="coco", data_dir=args.data_dir)
        # A laptop has COCO's validation images at most.
        train = dict(common, split="val2017" if args.size == "tiny" else "train2017")
        validation = dict(common, split="val2017")
    narratives = [dict(name="folder", data_dir=args.narratives)] if args.narratives else []
    return [train, *narratives], validation


def shrink(config: ConfigDict) -> None:
    """A network and a run for a laptop, on the same data with the same code."""
    config.update(dict(steps=200, batch_size=8, log_every=10))
    config.model.update(
        dict(
            width=64,
            embed_dim=64,
            num_queries=32,
            head_convs=1,
            position_grid=32,
            remat="none",
            dtype="float32",
        )
    )
    config.model.backbone = dict(name="small", width=48, levels=4)
    config.text = dict(learned=True, vectors="")  # Nothing to download.
    config.loss.group = 8
    config.optimizer.update(dict(name="adamw", learning_rate=2e-3, warmup_steps=10, weight_decay=1e-3))
    config.data.update(dict(image_size=128, max_masks=32, min_count=1, workers=0))
    for evaluator in (*config.evals.values(), *config.final_evals.values()):
        evaluator.update(dict(batch_size=4, every=0))
    config.checkpoint.update(dict(every=100, keep=2))
