"""The tables of papers/004 (Ghiasi et al., Scaling Open-Vocabulary Image Segmentation with Image-Level Labels).

Data of the commands: data/coco in COCO's layout; data/narratives, the folder of images and captions of Localized
Narratives (ovseg_jax/data/README.md; or narratives="DIR;DIR2;DIR3",narratives_are=prepared), which a teacher labels
first where a row says pseudo=true (with pseudo=WORKDIR rows share one, the run of Table 1); data/sets/A-847 and the
other sets of 4.1, as `python -m ovseg_jax.prepare` writes them (configs/README.md); data/names, label files with more
names for their classes (appendix I); data/mseg/train/NAME and data/mseg/val/NAME, a folder (kind=semantic) for each of
MSeg's sets.
"""

from ml_collections import ConfigDict

from ovseg_jax.configs.tables import row_config
from ovseg_jax.experiment.paper_tables import PaperTable, Row

FOUR = ("A-847", "PC-459", "A-150", "PC-59")
FIVE = (*FOUR, "PAS-20")
MSEG = ("COCO", "ADE20K", "Mapillary", "IDD", "BDD", "Cityscapes", "SUN")

SETS = "eval_sets=data/sets,sets_are=prepared"
COCO = f"data=coco,data_dir=data/coco,evals=benchmark,{SETS}"
BOTH = f"{COCO},narratives=data/narratives,pseudo=true"

ALIGN = (
    "ALIGN's weights were never released: the backbone starts from noisy student, and CLIP's text tower takes the "
    "place of BERT"
)
TEXT = "CLIP's text tower takes the place of ALIGN's BERT, which was never released"
RATE = "the paper names no learning rate for ResNet-101: ours is that of noisy student"
NAMES = "names=package asks for our own names, which there are for A-150, PC-59 and PAS-20"
OTHERS = "the numbers are those of another paper, whose method is not built here"


def miou(*sets: str, more: str = "", suffix: str = "") -> tuple[str, ...]:
    """Returns the keys of mIoU on some sets, with `more` behind each name and `suffix` behind the metric."""
    return tuple(f"{name}{more}/miou{suffix}" for name in sets)


def recall(*sets: str) -> tuple[str, ...]:
    """Returns the keys of the recalls of Table 1."""
    return tuple(f"{name}/recall@{threshold}" for name in sets for threshold in (0.5, 0.7, 0.9))


def run(
    name: str, values: tuple[float | None, ...], args: str, keys: tuple[str, ...] = (), **own: object
) -> Row:
    """Returns a row that a run of configs/openseg.py scores, by default by its mIoU on the four sets of Table 3."""
    return Row(name, values, keys or miou(*FOUR), "openseg", args, **({"differs": ALIGN} | own))


def mseg(name: str, values: tuple[float, ...], *folders: str) -> Row:
    """Returns a row of Table 6, trained on some of MSeg's sets."""
    places = ";".join(f"data/mseg/train/{folder}" for folder in folders)
    args = f"data=folder,data_dir={places},kind=semantic,stage=teacher"
    return run(
        name,
        values,
        f"{args},eval_sets=data/mseg/val,sets={';'.join(MSEG)}",
        tuple(f"{each}/recall@0.5" for each in MSEG),
        differs=f"{ALIGN}; a segment is the whole area of a class; sets are drawn with equal probability; the paper "
        "states neither",
    )


def batch(name: str, values: tuple[float, ...], size: int, steps: int) -> Row:
    """Returns a row of Table 7 with a synchronised loss."""
    return run(
        name,
        values,
        f"{BOTH},contrast=sync",
        overrides={"batch_size": size, "steps": steps},
        differs=f"{ALIGN}; the learning rate stays the same, since the paper names no other",
    )


TABLES = (
    PaperTable(
        "openseg",
        1,
        "recall of 128 mask proposals",
        [f"{data} R{cut}" for data in ("COCO", "PC-59") for cut in (50, 70, 90)],
        [
            Row(
                "MCG", (41.1, 21.4, 4.6, 57.8, 31.7, 8.7), why=f"its proposals are files of others; {OTHERS}"
            ),
            Row(
                "COB", (46.0, 24.8, 4.9, 62.9, 37.6, 12.1), why=f"its proposals are files of others; {OTHERS}"
            ),
            run(
                "OpenSeg",
                (68.9, 48.1, 16.9, 84.5, 65.1, 29.1),
                f"data=coco,data_dir=data/coco,{SETS},sets=PC-59,stage=teacher",
                recall("validation", "PC-59"),
                differs="ALIGN's weights were never released: the backbone starts from noisy student; a segment of "
                "PC-59 is the whole area of a class, which the paper does not state",
            ),
        ],
    ),
    PaperTable(
        "openseg",
        2,
        "mIoU of OpenSeg and of previous open-vocabulary and zero-shot methods",
        FIVE,
        [
            Row("LSeg-ViT-L16", (None, None, None, None, 52.3), why=OTHERS),
            Row("SPNet", (None, None, None, 24.3, 18.3), why=OTHERS),
            Row("ZS3Net", (None, None, None, 19.4, 38.3), why=OTHERS),
            Row("LSeg", (None, None, None, None, 47.4), why=OTHERS),
            run(
                "LSeg+",
                (2.5, 5.2, 13.0, 36.0, 59.0),
                f"{COCO},method=lseg,backbone=resnet101",
                miou(*FIVE),
                differs=f"{TEXT}; {RATE}",
            ),
            run(
                "OpenSeg-R101-COCO",
                (4.0, 6.5, 15.3, 36.9, 60.0),
                f"{COCO},backbone=resnet101",
                miou(*FIVE),
                differs=f"{TEXT}; {RATE}",
            ),
            run(
                "OpenSeg-R101",
                (4.4, 7.9, 17.5, 40.1, 63.8),
                f"{BOTH},backbone=resnet101",
                miou(*FIVE),
                differs=f"{TEXT}; {RATE}",
            ),
            Row("GroupViT", (None, None, None, 22.4, 52.3), why=OTHERS),
            run("OpenSeg-B7", (8.1, 11.5, 26.4, 44.8, 70.2), f"{BOTH},contrast=sync", miou(*FIVE)),
            run(
                "OpenSeg-B7-prompt-eng",
                (8.8, 12.2, 28.6, 48.2, 72.2),
                f"{BOTH},contrast=sync,names=data/names",
                miou(*FIVE, more="+eng"),
                differs=f"{ALIGN}; {NAMES}",
            ),
        ],
    ),
    PaperTable(
        "openseg",
        3,
        "mIoU by what the backbone starts from, on COCO and Localized Narratives",
        FOUR,
        [
            run("random", (4.5, 7.6, 18.6, 40.6), f"{BOTH},init=scratch", differs=TEXT),
            run("NoisyStudent", (6.6, 10.7, 24.4, 46.9), BOTH, differs=TEXT),
            Row("ALIGN", (6.8, 11.2, 24.8, 45.9), why="ALIGN's weights were never released"),
        ],
    ),
    PaperTable(
        "openseg",
        4,
        "mIoU by the masks at inference, on COCO",
        FOUR,
        [
            run(
                f"OpenSeg{name}",
                values,
                f"{COCO},masks=predicted;none;truth",
                miou(*FOUR, suffix=suffix),
            )
            for name, suffix, values in (
                ("", "", (6.3, 9.0, 21.1, 42.1)),
                ("-no-masks", "@none", (4.6, 5.9, 16.4, 32.1)),
                ("-true-masks", "@truth", (9.1, 12.3, 27.5, 49.3)),
            )
        ],
    ),
    PaperTable(
        "openseg",
        5,
        "mIoU by the words kept of captions, on COCO",
        FOUR,
        [
            run("all-words", (5.3, 8.8, 20.0, 41.3), f"{COCO},captions=all"),
            run("noun+adj+verb", (6.0, 8.8, 20.9, 41.7), f"{COCO},captions=noun+adj+verb"),
            run("noun+adj", (6.3, 9.0, 21.1, 42.1), COCO),
        ],
    ),
    PaperTable(
        "openseg",
        6,
        "recall at IoU 0.5 of proposals trained on a set of MSeg's (rows) on others (columns)",
        MSEG,
        [
            mseg("Cityscapes", (28.8, 25.8, 42.5, 50.0, 61.2, 69.3, 22.4), "Cityscapes"),
            mseg("COCO", (82.2, 68.0, 48.6, 58.1, 64.2, 58.6, 90.8), "COCO"),
            mseg("MSeg", (82.9, 80.3, 55.8, 68.1, 73.4, 67.2, 93.6), *MSEG),
        ],
    ),
    PaperTable(
        "openseg",
        7,
        "mIoU by batch size; the second number of a name is that of the examples that the loss contrasts",
        FOUR,
        [
            run("1024-16", (6.8, 11.2, 24.8, 45.9), BOTH),
            batch("256-256", (8.1, 11.2, 26.2, 45.4), 256, 240_000),
            batch("512-512", (8.2, 11.2, 25.7, 45.0), 512, 120_000),
            run("1024-1024", (8.1, 11.5, 26.4, 44.8), f"{BOTH},contrast=sync"),
            batch("2048-2048", (8.4, 11.4, 26.9, 45.3), 2048, 30_000),
        ],
    ),
    PaperTable(
        "openseg",
        8,
        "mIoU with and without the mask loss (scores that the paper's text does not give legibly are left out)",
        FOUR,
        [
            run("COCO", (6.3, 9.0, 21.1, 42.1), COCO),
            run("COCO-no-masks", (2.5, 3.3, None, None), f"{COCO},mask_weight=0"),
            run("COCO+narratives", (6.8, 11.2, 24.8, 45.9), BOTH),
            run(
                "COCO+narratives-no-masks",
                (6.3, 10.4, None, None),
                f"{COCO},narratives=data/narratives",
                differs=f"{ALIGN}; the mask loss is a mean over the images with masks, where the paper, which "
                "gives those of the narratives the weight 0, may divide by all of them",
            ),
        ],
    ),
    PaperTable(
        "openseg",
        9,
        "mIoU by the keep probability of words, on COCO and Localized Narratives",
        FOUR,
        [
            run("kp-1.0", (5.8, 10.4, 22.7, 44.9), f"{BOTH},kp=1"),
            run("kp-0.75", (6.8, 11.2, 24.8, 45.9), BOTH),
            run("kp-0.5", (7.0, 10.7, 25.0, 46.0), f"{BOTH},kp=0.5"),
            run("kp-0.25", (6.8, 9.8, 22.4, 43.5), f"{BOTH},kp=0.25"),
        ],
    ),
    PaperTable(
        "openseg",
        10,
        "mIoU and Grounding mIoU with more names for the classes (scores that the paper's text does not give legibly "
        "are left out)",
        [*(f"{name} mIoU" for name in FOUR), *(f"{name} Grounding" for name in FOUR)],
        [
            run(
                name,
                values,
                f"{data},names=data/names",
                tuple(f"{each}{more}/{metric}" for metric in ("miou", "grounding_miou") for each in FOUR),
                differs=f"{ALIGN}; {NAMES}",
            )
            for name, data, more, values in (
                ("COCO", COCO, "", (6.3, 9.0, 21.1, 42.1, 21.8, 32.1, 41.0, 57.2)),
                ("COCO-eng", COCO, "+eng", (6.8, 10.0, 24.8, 46.4, None, None, None, None)),
                ("COCO+narratives", BOTH, "", (6.8, 11.2, 24.8, 45.9, 25.4, 39.0, 45.5, 61.5)),
                ("COCO+narratives-eng", BOTH, "+eng", (7.6, 11.8, 27.7, 49.0, 25.5, 39.7, 46.8, 64.2)),
            )
        ],
    ),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a row: "table=2,row=LSeg+"."""
    return row_config(TABLES, arg)
