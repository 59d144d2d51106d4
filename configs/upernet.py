"""UPerNet: pixels classified into a closed set of classes, by label maps or by the predictions of a teacher (P-Seg+).

  python -m ovseg_jax.main --config=configs/upernet.py
      trains on 3,000 images of `scenes` and their label maps, on a laptop CPU in minutes: the supervised baseline,
      which does not use the labels of held-out classes.
  python -m ovseg_jax.main --config=configs/upernet.py:teacher=WORKDIR
      P-Seg+ (papers/002, 3.3.4): the run in WORKDIR labels the same images, whose masks are not read; a new network
      learns from its labels. Mean of 3 seeds, from configs/pseg.py: mIoU of 76.2 on seen pairs, 68.5 held out, 90.9 on
      stuff, where the teachers had 74.0, 66.3 and 90.0.
  python -m ovseg_jax.main --config=configs/upernet.py:data=prepared,data_dir=DIR,val_dir=DIR,target=voc,teacher=WORKDIR
      the paper's recipe: MAE's ViT-B and UPerNet, on the training images of a data set that `python -m
      ovseg_jax.prepare` wrote to DIR, which the teacher labels as it is evaluated (C.2 takes "the same model"; that
      the decision is the same is ours). Table 4's scores include background: with background=background where that is
      a class (VOC), background=void where it is the pixels without a label (Context, COCO). The paper's mIoU so: VOC
      62.0, Context 30.2, COCO 35.7. Not reproduced yet. Without background (Table 3), pixels to which the teacher
      gives no class are not learned (ours).

Numbers with a section, table or appendix are the paper's; "mmsegmentation" marks those of its MAE recipe, whose form
the paper follows; the rest is marked "ours".
"""

from ml_collections import ConfigDict

from ovseg_jax.config import Args, parse_arg
from ovseg_jax.configs import common
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.published import pixels_of, weights_of

STEPS = {"voc": 20_000, "context": 40_000, "coco": 80_000}  # Table 11
# How P-Seg is evaluated on each (C.1), see ovseg_jax/decisions/published.py.
PROTOCOLS = {"voc": "pseg_voc", "context": "context", "coco": "coco_object"}
DEPTH = 12  # blocks of ViT-B


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; keys of `arg` stand below, an unknown one or one without effect is an error."""
    args = parse_arg(
        arg,
        data=("scenes", "prepared", "folder"),
        data_dir="",  # data=prepared, folder
        val_dir="",  # data=prepared, folder: what to evaluate on; by default nothing
        target=tuple(STEPS),  # data=prepared, folder: whose number of steps
        teacher="",  # a run that labels the training images; without it, their own label maps are used
        # teacher: how its scores become labels, see ovseg_jax/decisions/rules.py; by default argmax on scenes, else as
        # P-Seg is evaluated on the target (C.2)
        decision="",
        # teacher: the class of pixels to which the decision gives none; void adds one, whose truth is what has no label
        background="",
        windows=True,  # data=prepared, folder: evaluates by sliding windows, as mmsegmentation; False: on whole images
        weights="",  # data=prepared, folder: MAE's, if not on the hub: a folder or file
        seed=0,
    )
    config = scenes() if args.data == "scenes" else paper(args)
    config.seed = args.seed
    if args.teacher:
        protocol = "" if args.data == "scenes" or args.decision else PROTOCOLS[args.target]
        label(config, args.teacher, args.decision, args.background, protocol)
    args.check_read()
    return config


def label(
    config: ConfigDict, teacher: str, decision: str = "", background: str = "", protocol: str = ""
) -> None:
    """Adds the stage in which the teacher labels the training images."""
    (source,) = config.data.train
    images = {key: value for key, value in source.items() if key != "cache"}
    rule = dict(protocol=protocol) if protocol else dict(decision=decision or "argmax")
    labels = dict(teacher=teacher, source=images, **rule, batch_size=64)
    if background:
        labels["background"] = background
    config.stages = [dict(name="labels", kind="pseudo_label_maps", config=labels)]
    config.data.train = [dict(source, masks="stage:labels")]


def scenes() -> ConfigDict:
    """Returns a small network for the embedded data. All numbers are ours."""
    # The training images of the target: all classes, other images than those of the evaluation.
    target = dict(common.scenes("validation", 3000), seed=1, cache=True)
    return common.run(
        "upernet",
        steps=2000,
        batch_size=16,
        model=dict(
            init="",
            backbone=dict(name="small", width=48, levels=4, stem="light"),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            width=64,
            pools=(1, 2),
            aux_width=32,
            dropout=0.0,
            norm="batch",
            remat="none",
            dtype="float32",
        ),
        loss=dict(auxiliary_weight=0.4),
        # At 2e-3, as elsewhere on `scenes`, the student is below its teacher after as many steps.
        optimizer=common.adamw_of_scenes(ema=0.998, learning_rate=5e-3),
        data=dict(
            train=[target],
            image_size=64,
            mask_stride=2,
            scale_jitter=(1.0, 1.0),
            flip=True,
            batch_augment=[],
            workers=0,
        ),
        final_evals=dict(test=common.segmentation(common.scenes("test", 500), 64)),
        checkpoint=common.checkpoint(every=500, keep=2),
    )


def paper(args: Args) -> ConfigDict:
    """Returns the recipe of Table 11 and C.2."""
    if not args.data_dir:
        raise UserError(f"data={args.data} needs data_dir=DIR")
    pixels = pixels_of("mae_vitb16")
    form = dict(name="prepared") if args.data == "prepared" else dict(name="folder", kind="semantic")
    evals = {}
    if args.val_dir:
        split = dict(split="val") if args.data == "prepared" else {}
        windows = dict(stride=341, short=512, longest=2048)  # mmsegmentation
        own = dict(windows=windows) if args.windows else {}
        if args.teacher and args.background == "void":
            own["background"] = "void by name"
        evals["validation"] = common.segmentation(dict(form, data_dir=args.val_dir, **split), 16, **own)
    return common.run(
        "upernet",
        steps=STEPS[args.target],
        batch_size=16,  # Table 11
        model=dict(
            init="",
            backbone=dict(
                name="mae_vitb16",  # C.2: MAE, without relative positions
                init=args.weights or weights_of("mae_vitb16"),
                taps=(3, 5, 7, 11),  # C.2: after blocks 4, 6, 8 and 12
                drop_rate=0.1,  # mmsegmentation
                remat="none",
            ),
            mean=pixels.mean,
            std=pixels.std,
            width=768,  # mmsegmentation, as the next four
            pools=(1, 2, 3, 6),
            aux_width=256,
            dropout=0.1,
            norm="batch",  # of the whole batch
            remat="none",
            dtype="bfloat16",  # ours
        ),
        loss=dict(auxiliary_weight=0.4),  # mmsegmentation
        optimizer=dict(
            name="adamw",  # Table 11, as the next four
            learning_rate=1e-4,
            weight_decay=0.05,
            b1=0.9,
            b2=0.999,
            schedule="polynomial",  # Table 11
            power=1.0,  # mmsegmentation
            final_fraction=0.0,
            warmup_steps=1500,  # Table 11; linear from 1/1500 of the rate (mmsegmentation: from a millionth)
            multipliers=common.layer_decay(0.7, DEPTH, "image/backbone/tower"),  # Table 11
            no_decay=("/bias$", "/cls$", "/pos_embedding$"),  # BEiT's and MAE's code
            clip_norm=0.0,
            ema=0.0,
        ),
        data=dict(
            train=[dict(form, data_dir=args.data_dir)],
            image_size=512,  # mmsegmentation, as the augmentation
            mask_stride=1,
            short_side=dict(ratio=(0.5, 2.0), long_side=2048, category_share=0.75, flip=True, colours=True),
            batch_augment=[],
            workers=8,
        ),
        final_evals=evals,
        checkpoint=common.checkpoint(every=1000, keep=3),
        log_every=50,
    )
