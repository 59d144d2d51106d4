"""The tables of papers/000 (Ren et al., Prompt Pre-Training with Twenty-Thousand Classes).

Data of the commands: data/imagenet21k, train/ and val/ with a folder for each class, and names.txt with their names;
data/imagenet, the same of ImageNet-1K; data/sets, the sets of `score suite --suite=pomp` (of which
`python -m ovseg_jax.prepare` writes imagenet21k, fgvc_aircraft, imagenet_v2, imagenet_sketch, imagenet_a and imagenet_r
by name, the other nine by `coop`), and for segmentation COCO-Stuff, VOC, ADE20K and PC-59, as it writes coco_stuff,
voc_2012 (train, val and trainaug), ade20k_150 and pascal_context_59; data/pomp/prompt.safetensors, the prompt of Table
1's POMP-B16.
"""

from ml_collections import ConfigDict

from ovseg_jax.configs.tables import row_config
from ovseg_jax.experiment.paper_tables import SUITE, PaperTable, Row
from ovseg_jax.experiment.scores import CROSS_DATASET, CROSS_DOMAIN

FULL = "data=folder,data_dir=data/imagenet21k,names=data/imagenet21k/names.txt"
IMAGENET = "data=folder,data_dir=data/imagenet,names=data/imagenet/names.txt,classes=1000"
BEST = f"{FULL},length=4"
AFTER = "python -m ovseg_jax.score suite --checkpoint=WORKDIR --suite=pomp --data_dir=data/sets"
AFTER += " --out=WORKDIR/scores.csv"
ON_STUFF = "data=prepared,data_dir=data/sets/COCO-Stuff,trained=all,eval_sets=data/sets"
PROMPT = "data/pomp/prompt.safetensors"
TOWERS = {"RN50": ",towers=clip_rn50", "B32": ",towers=clip_vitb32", "B16": ""}  # B16: 4.1's, the default

OTHERS = "the numbers are those of another paper, whose method is not built here"
SEGMENTS = (
    "the first stage has ResNet-101, the paper's ResNet-101c (DeepLab's stem and dilations); a test image is fitted "
    "into a square of 640 pixels (VOC 512), where the authors resize its shorter side to it"
)
ONE_SET = f"a run for each data set, as in the paper; {SEGMENTS}"
TUNED = f"the prompt learns from the seen classes of COCO-Stuff, as in the authors' configs; {SEGMENTS}"
DETECTOR = (
    "the detector, CenterNet2 as Detic trains it, is not built here; `python -m ovseg_jax.prompts --checkpoint=WORKDIR "
    "--classes=FILE --out=vectors.npy` writes the class vectors that Detic reads"
)
TWO = (
    "no single checkpoint of the authors has all of the paper's scores: that of 4 words has 24.9, 66.7 and 60.4, that "
    "of 16 words 25.2, 65.1 and 60.0"
)
PROPOSAL = (
    "classes are drawn without replacement, and similarities averaged over the batch as probabilities; the code of the "
    f"authors draws with replacement and averages logits; {TWO}"
)
# Table 3: memory and time are linear in the K - 1 + 32 classes of a step, CoOp's 1,000 included, so that POMP ran as
# CoOp did: 32 images of one view on one GPU. Its config there, vit_b16_ep50 (scripts/pomp/main.sh), has no randaug2 in
# its name either. An epoch has 1,000 * 16 / 32 steps.
ONE_GPU = {
    "batch_size": 32,
    "steps": 50 * 500,
    "data.views": 1,
    "data.augment.randaugment": 0,
    "optimizer.hold_steps": 500,
    "optimizer.warmup_steps": 500,
    "optimizer.decay_steps": 50 * 500,
    "checkpoint.every": 500,
}
ON_ONE_GPU = "the paper states neither batch nor augmentation of this table: 32 images of one view, without RandAugment"
COOP = "the paper does not say how many words: 16, and 50 epochs, as in the authors' script"


def clip(method: str, scores: dict[str, float], args: str, key: str, **own: str) -> list[Row]:
    """Returns the rows of a method in Table 1, one for each image tower."""
    return [
        Row(f"{method}-{tower}", (score,), (key,), "pomp", args + TOWERS[tower], **own)
        for tower, score in scores.items()
    ]


def transfer(
    name: str, values: tuple[float, ...], args: str, prompt: str = "", differs: str = "", why: str = ""
) -> Row:
    """Returns a row of Table 2."""
    if why:
        return Row(name, values, why=why)
    sets = (*CROSS_DATASET, "cross-dataset", *CROSS_DOMAIN, "cross-domain")
    keys = tuple(f"{SUITE}{each}/accuracy{prompt}" for each in sets)
    return Row(name, values, keys, "pomp", args, after=AFTER, differs=differs)


def ablation(name: str, values: tuple[float, float, float], args: str, differs: str = TWO) -> Row:
    """Returns a row of Table 8 or 12."""
    keys = ("validation/accuracy", f"{SUITE}cross-dataset/accuracy", f"{SUITE}cross-domain/accuracy")
    return Row(name, values, keys, "pomp", args, after=AFTER, differs=differs)


def open_vocabulary(name: str, stuff: tuple[float, ...], voc: tuple[float, ...], args: str = "") -> list[Row]:
    """Returns the two rows of a method in Table 4, one for each data set."""
    sets = {
        "COCO-Stuff": ("coco_stuff", (*stuff, None, None, None)),
        "VOC": ("voc", (None, None, None, *voc)),
    }
    rows = []
    for folder, (unseen, values) in sets.items():
        metrics = [f"{folder}/{metric}" for metric in ("hiou", "miou/seen", "miou/unseen")]
        own = f"data=prepared,data_dir=data/sets/{folder},unseen={unseen}{args}"
        keys = tuple("" if value is None else metrics[k % 3] for k, value in enumerate(values))
        rows.append(Row(f"{name}-{folder}", values, keys, "zsseg", own, differs=ONE_SET))
    return rows


def segments(
    name: str, values: tuple[float, ...], metrics: tuple[str, ...], args: str, prompt: str = "", **own: str
) -> Row:
    """Returns a row of Table 5 or 13."""
    keys = tuple(
        f"{folder}/{metric}{prompt}" for folder in ("COCO-Stuff", "ADE20K", "PC-59") for metric in metrics
    )
    return Row(name, values, keys, "zsseg", f"{ON_STUFF}{args}", **({"differs": SEGMENTS} | own))


def margin(value: str, sample: int, score: float, correction: str) -> Row:
    """Returns a row of Table 9."""
    args = f"{BEST},sample={sample}" if sample != 1000 else BEST
    args += "" if correction == "log10" else f",correction={correction}"
    return Row(
        f"m{value}-K{sample}", (score,), (f"{SUITE}cross-dataset/accuracy",), "pomp", args, after=AFTER
    )


def others(rows: dict[str, tuple[float | None, ...]], why: str) -> list[Row]:
    """Returns rows that cannot be run."""
    return [Row(name, values, why=why) for name, values in rows.items()]


SHARED = ["ImageNet-21K", "cross-dataset, average of 10", "cross-domain, average of 4"]
BOXES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
LVIS = ("APr", "APc", "APf", "AP")

TABLES = (
    PaperTable(
        "pomp",
        1,
        "accuracy on ImageNet-21K's test set; the paper's column, the image tower of CLIP, ends the row's name",
        ["accuracy"],
        [
            *clip(
                "ZeroshotCLIP",
                {"RN50": 17.5, "B32": 19.8, "B16": 21.8},
                FULL,
                "validation/accuracy[hard]",
                differs="none of the prompt's training counts: any run on these images scores it too",
            ),
            *clip(
                "PromptEnsemble",
                {"RN50": 18.8, "B32": 20.9, "B16": 23.5},
                FULL,
                "validation/accuracy[ensemble]",
                differs="the seven templates of the authors' code; ensemble_80 in the summary is that of the eighty",
            ),
            *clip(
                "CoOp",
                {"RN50": 16.6, "B32": 18.1, "B16": 20.8},
                f"{IMAGENET},method=coop",
                f"{SUITE}imagenet21k/accuracy",
                after=AFTER,
                differs=COOP,
            ),
            *clip(
                "MaPLe",
                {"B32": 21.6, "B16": 24.2},
                f"{IMAGENET},method=maple",
                f"{SUITE}imagenet21k/accuracy",
                after=AFTER,
            ),
            *clip(
                "LinearProbe",
                {"RN50": 6.5, "B32": 18.2, "B16": 20.9},
                f"{FULL},method=linear_probe",
                "validation/accuracy",
            ),
            *clip("VPT", {"B32": 21.8, "B16": 24.8}, f"{FULL},method=vpt", "validation/accuracy"),
            *clip("POMP", {"RN50": 20.2, "B32": 22.2, "B16": 25.3}, FULL, "validation/accuracy"),
        ],
    ),
    PaperTable(
        "pomp",
        2,
        "accuracy on other data sets and domains, ViT-B/16 (overall accuracy, as the authors' code counts)",
        [
            *("Caltech101", "OxfordPets", "StanfordCars", "Flowers102", "Food101"),
            *("Aircraft", "SUN397", "DTD", "EuroSAT", "UCF101", "average"),
            *("ImageNetV2", "ImageNet-S", "ImageNet-A", "ImageNet-R", "average"),
        ],
        [
            transfer(
                "hard-prompt",
                (
                    *(93.3, 88.2, 65.6, 67.4, 85.3, 23.7, 62.6, 44.3, 42.0, 65.1, 63.7),
                    *(60.9, 46.1, 47.8, 74.0, 57.2),
                ),
                BEST,
                "[hard]",
            ),
            transfer(
                "CoOp",
                (
                    *(93.7, 89.1, 64.5, 68.7, 85.3, 18.5, 64.2, 41.9, 46.4, 66.6, 63.9),
                    *(64.2, 48.0, 49.7, 75.2, 59.3),
                ),
                f"{IMAGENET},method=coop,length=4,init=a photo of a",
                differs="4 words and 50 epochs, as the authors of CoCoOp ran it, whose scores these are",
            ),
            transfer(
                "CoCoOp",
                (
                    *(94.4, 90.1, 65.3, 71.9, 86.1, 22.9, 67.4, 45.7, 45.4, 68.2, 65.7),
                    *(64.1, 48.8, 50.6, 76.2, 59.9),
                ),
                f"{IMAGENET},method=cocoop",
            ),
            transfer(
                "LASP",
                (
                    *(94.5, 89.4, 64.8, 70.5, 86.3, 23.0, 67.0, 45.5, 48.3, 68.2, 65.8),
                    *(63.8, 49.0, 50.7, 77.1, 60.1),
                ),
                "",
                why=OTHERS,
            ),
            transfer(
                "VPT",
                (
                    *(93.7, 90.6, 65.0, 70.9, 86.3, 24.9, 67.5, 46.1, 45.9, 68.7, 66.0),
                    *(64.2, 49.2, 51.3, 77.0, 60.4),
                ),
                f"{FULL},method=vpt",
                differs="trained on ImageNet-21K, as in Table 1; the paper does not say on what here",
            ),
            transfer(
                "MaPLe",
                (
                    *(93.5, 90.5, 65.6, 72.2, 86.2, 24.7, 67.0, 46.5, 48.1, 68.7, 66.3),
                    *(64.1, 49.2, 50.9, 77.0, 60.3),
                ),
                f"{IMAGENET},method=maple",
            ),
            transfer(
                "POMP",
                (
                    *(95.0, 89.5, 66.8, 72.4, 86.3, 25.6, 67.7, 46.2, 52.1, 68.5, 67.0),
                    *(63.8, 49.8, 51.6, 77.9, 60.8),
                ),
                BEST,
                differs=f"4 words (appendix E.2): {TWO}",
            ),
        ],
    ),
    PaperTable(
        "pomp",
        3,
        "prompt tuning on ImageNet-1K (memory and time are of the authors' GPU, with nothing of ours beside them)",
        ["accuracy", "GPU memory (GB)", "training time (h)"],
        [
            *(
                Row(name, values, ("validation/accuracy", "", ""), "pomp", f"{IMAGENET},{args}")
                for name, values, args in (
                    ("CoOp", (71.9, 28.2, 5.9), "method=coop"),
                    ("CoCoOp", (70.1, 28.3, 27.5), "method=cocoop"),
                )
            ),
            *(
                Row(
                    f"POMP-K{k}",
                    values,
                    ("validation/accuracy", "", ""),
                    "pomp",
                    f"{IMAGENET},sample={k},epochs=50",
                    ONE_GPU,
                    differs=ON_ONE_GPU,
                )
                for k, values in ((128, (71.2, 5.3, 2.7)), (256, (71.4, 8.8, 3.3)), (512, (71.6, 15.9, 4.2)))
            ),
        ],
    ),
    PaperTable(
        "pomp",
        4,
        "open-vocabulary segmentation",
        [f"{data} {metric}" for data in ("COCO-Stuff", "VOC") for metric in ("hIoU", "seen", "unseen")],
        [
            *others(
                {
                    "SPNet": (16.8, 20.5, 14.3, 21.8, 73.3, 15.0),
                    "ZS3": (15.0, 34.7, 9.5, 28.7, 77.3, 17.7),
                    "CaGNet": (18.2, 35.5, 12.2, 39.7, 78.4, 25.6),
                    "ZegFormer": (34.8, 36.6, 33.2, 73.3, 86.4, 63.6),
                },
                OTHERS,
            ),
            *open_vocabulary("ZSSeg", (37.8, 39.3, 36.3), (77.5, 83.5, 72.5)),
            *open_vocabulary("POMP", (39.1, 39.9, 38.2), (84.4, 93.6, 76.8), f",init={PROMPT}"),
        ],
    ),
    PaperTable(
        "pomp",
        5,
        "segmentation across data sets",
        [
            f"{data} {metric}"
            for data in ("COCO-Stuff", "ADE20K", "PC-59")
            for metric in ("mIoU", "fwIoU", "pACC")
        ],
        [
            segments(
                "ZSSeg",
                (40.8, 49.0, 62.7, 19.5, 48.7, 60.0, 50.8, 64.1, 75.7),
                ("miou", "fwiou", "pacc"),
                "",
                differs=TUNED,
            ),
            segments(
                "POMP",
                (41.1, 49.2, 62.9, 20.7, 51.5, 63.7, 51.1, 65.4, 76.1),
                ("miou", "fwiou", "pacc"),
                f",init={PROMPT}",
                differs=TUNED,
            ),
        ],
    ),
    PaperTable(
        "pomp",
        6,
        "detection across data sets",
        [f"{data} {metric}" for data in ("LVIS", "COCO", "Objects365") for metric in BOXES],
        [
            *others(
                {
                    "ViLD": (
                        *(27.5, 41.8, 29.3, 20.6, 35.9, 43.4),
                        *(34.1, 52.3, 36.5, 21.6, 38.9, 46.1),
                        *(11.5, 17.8, 12.3, 4.2, 11.1, 17.8),
                    ),
                    "DetPro": (
                        *(28.4, 42.9, 30.3, 21.0, 36.7, 44.1),
                        *(34.9, 53.8, 37.4, 22.5, 39.6, 46.3),
                        *(12.1, 18.8, 12.9, 4.5, 11.5, 18.6),
                    ),
                },
                OTHERS,
            ),
            *others(
                {
                    "Detic": (
                        *(36.8, 50.7, 38.6, 26.1, 46.7, 51.7),
                        *(38.8, 56.0, 41.9, 25.6, 42.2, 50.0),
                        *(15.6, 22.1, 16.8, 6.1, 15.6, 23.8),
                    ),
                    "POMP": (
                        *(37.2, 51.1, 39.3, 26.5, 47.2, 52.6),
                        *(40.3, 57.9, 43.6, 28.3, 43.9, 50.6),
                        *(16.1, 22.9, 17.3, 6.2, 16.3, 24.7),
                    ),
                },
                DETECTOR,
            ),
        ],
    ),
    PaperTable(
        "pomp",
        7,
        "open-vocabulary LVIS",
        [f"{task} {metric}" for task in ("boxes", "masks") for metric in LVIS],
        [
            *others(
                {
                    "ViLD": (16.7, 26.5, 34.2, 27.8, 16.6, 24.6, 30.3, 25.5),
                    "DetPro": (20.8, 27.8, 32.4, 28.4, 19.8, 25.6, 28.9, 25.9),
                    "PromptDet": (None, None, None, None, 21.4, 23.3, 29.3, 25.3),
                },
                OTHERS,
            ),
            *others(
                {
                    "Detic": (26.7, 36.4, 40.3, 36.3, 24.9, 32.5, 35.6, 32.4),
                    "POMP": (26.8, 36.4, 40.4, 36.2, 25.2, 33.0, 35.6, 32.7),
                },
                DETECTOR,
            ),
        ],
    ),
    PaperTable(
        "pomp",
        8,
        "local contrast and local correction, ViT-B/16",
        SHARED,
        [
            ablation("K100", (24.1, 65.5, 59.5), f"{BEST},sample=100"),
            ablation("K500", (24.9, 66.5, 60.0), f"{BEST},sample=500"),
            ablation("K1000", (25.3, 67.0, 60.8), BEST),
            ablation("no-correction", (25.0, 65.8, 59.8), f"{BEST},correction=0"),
        ],
    ),
    PaperTable(
        "pomp",
        9,
        "the margin m of the local correction",
        ["cross-dataset, average of 10"],
        [
            margin("0", 319, 65.2, "0"),
            margin("0", 1000, 65.8, "0"),
            margin("0.5", 319, 65.7, "0.5"),
            margin("0.5", 1000, 66.1, "0.5"),
            margin("1", 319, 66.2, "1"),
            margin("1", 1000, 67.0, "log10"),
            margin("1.5", 319, 66.5, "log10"),
            margin("1.5", 1000, 66.4, "1.5"),
        ],
    ),
    PaperTable(
        "pomp",
        10,
        "settings of segmentation and detection",
        ["proposal network", "trained on", "tested on"],
        [
            Row(name, values, why="a setting, with no score")
            for name, values in {
                "COCO-Stuff": ("MaskFormer", "COCO Stuff (seen)", "COCO Stuff (unseen)"),
                "VOC": ("MaskFormer", "PASCAL VOC (seen)", "PASCAL VOC (unseen)"),
                "segmentation-cross-dataset": ("MaskFormer", "COCO Stuff", "ADE20K / PASCAL Context"),
                "LVIS": (
                    "CenterNet2",
                    "LVIS (frequent and common) and ImageNet-21K (overlaps with LVIS)",
                    "LVIS (rare)",
                ),
                "detection-cross-dataset": (
                    "CenterNet2",
                    "LVIS and ImageNet-21K (overlaps with LVIS)",
                    "COCO / Object365",
                ),
            }.items()
        ],
    ),
    PaperTable(
        "pomp",
        11,
        "data sets",
        ["classes", "training images", "test images", "metric"],
        [
            Row(name, values, why="a property of the data, with no score")
            for name, values in {
                "Caltech-101": ("102", "3,060", "6,086", "mean per-class accuracy"),
                "Oxford-IIIT-Pets": ("37", "3,680", "3,669", "mean per-class accuracy"),
                "Stanford-Cars": ("196", "8,144", "8,041", "accuracy"),
                "Oxford-Flowers-102": ("102", "2,040", "6,149", "mean per-class accuracy"),
                "Food-101": ("101", "75,750", "25,250", "accuracy"),
                "FGVC-Aircraft": ("100", "6,667", "3,333", "mean per-class accuracy"),
                "SUN-397": ("397", "15,880", "19,850", "accuracy"),
                "DTD": ("47", "3,760", "1,880", "accuracy"),
                "EuroSAT": ("10", "10,000", "5,000", "accuracy"),
                "UCF-101": ("101", "7,639", "3,783", "accuracy"),
                "ImageNetV2": ("1,000", "10,000", "10,000", "accuracy"),
                "ImageNet-S": ("1,000", "50,889", "50,889", "accuracy"),
                "ImageNet-A": ("200", "7,500", "7,500", "accuracy"),
                "ImageNet-R": ("200", "30,000", "30,000", "accuracy"),
                "COCO-Stuff": ("171", "117K", "5K", "mIoU (seen/unseen), hIoU"),
                "PASCAL-VOC": ("20", "11,185", "1,449", "mIoU (seen/unseen), hIoU"),
                "ADE20K": ("150", "20K", "3K", "mIoU, fwIoU, pACC"),
                "PASCAL-Context": ("59", "10,103", "9,637", "mIoU, fwIoU, pACC"),
                "LVIS": ("1,203", "100,170", "19,822", "APr, APc, APf, AP"),
                "COCO": ("80", "118K", "5K", "AP, AP50, AP75, APs, APm, APl"),
                "Object365": ("365", "600K", "38K", "AP, AP50, AP75, APs, APm, APl"),
            }.items()
        ],
    ),
    PaperTable(
        "pomp",
        12,
        "the proposal distribution of the negatives, ViT-B/16",
        SHARED,
        [
            ablation("uniform", (25.3, 67.0, 60.8), BEST),
            ablation(
                "frequency", (24.9, 66.2, 60.1), f"{BEST},proposal=frequency,correction=log10_q", PROPOSAL
            ),
            ablation(
                "similarity", (23.6, 64.2, 59.2), f"{BEST},proposal=similarity,correction=log10_q", PROPOSAL
            ),
        ],
    ),
    PaperTable(
        "pomp",
        13,
        "segmentation across data sets by the prompt",
        [
            f"{data} {metric}"
            for data in ("COCO-Stuff", "ADE20K", "PC-59")
            for metric in ("mIoU", "fwIoU", "mACC", "pACC")
        ],
        [
            segments(name, values, ("miou", "fwiou", "macc", "pacc"), f",prompt={prompt}", key)
            for name, prompt, key, values in (
                (
                    "single",
                    "single",
                    "[single]",
                    (40.5, 47.8, 53.5, 61.7, 17.8, 44.0, 31.0, 52.9, 51.8, 64.6, 69.9, 74.3),
                ),
                (
                    "ImageNet",
                    "imagenet",
                    "[imagenet]",
                    (40.9, 48.4, 54.7, 62.3, 17.7, 46.5, 31.8, 57.1, 52.0, 64.7, 70.3, 75.4),
                ),
                (
                    "ViLD",
                    "vild",
                    "[vild]",
                    (40.9, 48.6, 54.2, 62.3, 20.2, 49.1, 33.4, 60.7, 51.8, 63.8, 69.6, 73.8),
                ),
                (
                    "POMP",
                    PROMPT,
                    "",
                    (41.2, 49.0, 54.7, 62.6, 20.6, 49.3, 35.0, 61.7, 52.4, 65.3, 70.6, 76.4),
                ),
            )
        ],
    ),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a row: "table=1,row=POMP-B16"."""
    return row_config(TABLES, arg)
