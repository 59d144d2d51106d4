"""The tables of papers/003 (UMG-CLIP: A Unified Multi-Granularity Vision Generalist for Open-World Understanding).

Data of the commands: data/umg41m, the JSON files of UMG-41M, and its images; data/coco in COCO's layout; data/sets with
A-150 and the other five sets of Table 5, ADE20K-panoptic (ade20k_150 with `--option=kind=panoptic`), COCO-captions and
Flickr30k (coco_retrieval, flickr30k_retrieval), as `python -m ovseg_jax.prepare` writes them (configs/README.md), and
the 21 sets of Table 2 for `score suite --suite=umg_clip`: caltech101, dtd, eurosat and sun397 as `prepare coop` writes
them, each other as `prepare` of its own name does, such as data/sets/country211; or folders of images by class
(`score suite --help`). The paper names no splits: those of CoOp's four are CoOp's, and resisc45 is all of its images or
those of a list.
data/umg_clip/B16 and the like are the runs of Table 6, which other rows start from, and data/umg_clip/ablation-NAME
those of Tables 7 and 9.

Tables 1, 11 and 12 count UMG-41M, and 13 and 14 are its quality as judged by people: none has scores of a model. (In
Table 13 the columns of raw and generated captions are exchanged: the text has 76.8% for the generated ones.)
"""

from ml_collections import ConfigDict

from ovseg_jax.configs.tables import row_config
from ovseg_jax.configs.umg_clip import MODELS, PAIRS
from ovseg_jax.experiment.paper_tables import SUITE, PaperTable, Row
from ovseg_jax.experiment.scores import UMG_CLIP

# On v4, B/16 fits with its parameters on every chip. Those of the others are split over all chips, and their
# pre-training gathers one block at a time (loop=true): L/14 then takes 13.7 of 32 GiB on v4:4x4x4.
SPLIT: dict[str, dict[str, int]] = {size: {"mesh.data": 1, "mesh.fsdp": -1} for size in ("L14", "g14", "E14")}
TOWERS = dict(zip(("B16", "L14", "g14", "E14"), MODELS, strict=True))
SIX = ("A-150", "A-847", "PC-59", "PC-459", "PAS-21", "PAS-20")
RETRIEVAL = ("COCO-captions", "Flickr30k")

UMG41M = "data=umg41m,data_dir=data/umg41m,images=data/umg41m/images"
SCORED = f"retrieval={';'.join(f'data/sets/{name}' for name in RETRIEVAL)}"
DENSE = "data=coco,data_dir=data/coco,eval_sets=data/sets,sets_are=prepared,things=ADE20K-panoptic"
AFTER = "python -m ovseg_jax.score suite --checkpoint=WORKDIR --suite=umg_clip --data_dir=data/sets"
AFTER += " --out=WORKDIR/scores.csv"
PART = PAIRS - 14_000_000  # 5.3: 27M, Table 1 without IN21K
BATCH = 8192  # ours

CITED = "the numbers are those of another paper, whose method is not built here"
CLIPS = "cited: the scores of a published CLIP, whose prompts and resizing to 336 pixels the paper does not describe"
FCCLIP = (
    "the numbers are those of the published model: configs/fcclip.py with published=FILE scores it, on COCO or on one "
    "prepared set at a time"
)
BIGDET = (
    "BigDet Panoptic is not published: configs/umg_clip.py with data=folder takes masks like it, but of others the "
    "scores are not the row's"
)
ODISE = f"{CITED}; ADE20K's PQ is a slip of the paper: ODISE's own is 22.6"
CATSEG = f"{CITED}; they are of the first version of CAT-Seg's paper, whose last has 16.0 on A-847 and 23.8 on PC-459"
CONTRASTIVE = "the contrast of one tag of each image or box, drawn in each step, is ours"
LACKS = "IN21K's part of UMG-41M is not published; batch, boxes in an image and texts in a step are ours"
AS_IS = "EVA-CLIP's weights without a step of training; the prompts of classes are CLIP's eighty: ours"
ADAPTED = f"{LACKS}; so are the prompts of classes, CLIP's eighty"
HEAD = (
    "the width of adapters, how one map of the tower feeds the head's levels, and patches of 16 pixels for towers of"
    " 14 are ours: the paper states none of these"
)
PRETRAINED = f"{LACKS}; the paper does not name the model of Tables 7 to 9: L/14 by their scores"
FIFTH = "which fifth of COCO, and 50 epochs of it, are ours"


def read(text: str) -> dict[str, tuple[float | None, ...]]:
    """Returns rows by name from names, each followed by its scores; "-" is none."""
    rows: dict[str, tuple[float | None, ...]] = {}
    for word in text.split():
        if word[0].isalpha():
            name = word
            rows[name] = ()
        else:
            rows[name] += (None if word == "-" else float(word),)
    return rows


def global_rows(text: str, keys: tuple[str, ...], after: str = "") -> list[Row]:
    """Returns the rows of Table 2 or 3."""
    rows = []
    for name, values in read(text).items():
        family, _, size = name.rpartition("-")
        tower, split = f"tower={TOWERS.get(size)}", SPLIT.get(size, {})
        loop = ",loop=true" * (size in SPLIT)
        if family == "UMG-CLIP":
            args = f"{UMG41M},{tower},adapt=global,weights=data/umg_clip/{size},{SCORED}{loop}"
            rows.append(Row(name, values, keys, "umg_clip", args, split, after, ADAPTED))
        elif family == "EVA-02-CLIP":
            args = f"{UMG41M},{tower},{SCORED}"
            rows.append(Row(name, values, keys, "umg_clip", args, {"steps": 0} | split, after, AS_IS))
        else:
            rows.append(Row(name, values, why=CLIPS))
    return rows


def dense_rows(text: str, keys: tuple[str, ...]) -> list[Row]:
    """Returns the rows of Table 4 or 5."""
    rows = []
    for name, values in read(text).items():
        family, _, size = name.rpartition("-")
        if size in TOWERS:
            weights = f",weights=data/umg_clip/{size}" if family == "UMG-CLIP" else ""
            args = f"{DENSE},tower={TOWERS[size]}{weights}" + ",loop=true" * (size in SPLIT)
            rows.append(Row(name, values, keys, "umg_clip", args, SPLIT.get(size, {}), differs=HEAD))
        else:
            why = {"FC-CLIP": FCCLIP, "CAT-Seg-L": CATSEG, "CAT-Seg-G": CATSEG}.get(name, CITED)
            why = BIGDET if size == "BigDet" else ODISE if name == "ODISE" and len(keys) == 9 else why
            rows.append(Row(name, values, why=why))
    return rows


def ablation(
    name: str, values: tuple[float, ...], losses: str = "all", tags: str = "", **weights: float
) -> list[Row]:
    """Returns the two rows of a line of Tables 7 to 9: of a pre-training, and of the masks that follow it."""
    args = f"{UMG41M},{SCORED},tower={TOWERS['L14']},loop=true,pairs={PART},losses={losses}"
    differs = PRETRAINED
    if tags:
        args, differs = f"{args},tags={tags}", f"{differs}; {CONTRASTIVE}"
    overrides = {"steps": round(2 * PART / BATCH)} | SPLIT["L14"]
    overrides |= {f"loss.{key}": x for key, x in weights.items()}
    keys = (f"{SUITE}umg_clip/accuracy", "&".join(f"retrieval_{each}/R@1" for each in RETRIEVAL), "")
    run = f"data/umg_clip/ablation-{name}"
    dense = f"{DENSE},tower={TOWERS['L14']},weights={run},adapters=false,size=384,part=0.2"
    *first, last = values
    return [
        Row(name, (*first, None), keys, "umg_clip", args, overrides, AFTER, differs),
        Row(f"{name}-dense", (None, None, last), ("", "", "&".join(MIOU)), "umg_clip", dense, differs=FIFTH),
    ]


MIOU = tuple(f"{name}/miou" for name in SIX)
RECALL = tuple(
    f"retrieval_{name}/{way}_R@{k}"
    for name in RETRIEVAL
    for way in ("image_to_text", "text_to_image")
    for k in (1, 5, 10)
)
QUALITY = ("PQ", "AP", "mIoU")
ADE20K, COCO = (
    ("ADE20K-panoptic_panoptic/pq", "ADE20K-panoptic_instances/ap", "A-150/miou"),
    ("panoptic/pq", "instances/ap", "validation/miou"),
)
THREE = ("Classification", "Retrieval", "Segmentation")
TABLES = (
    PaperTable(
        "umg_clip",
        2,
        "zero-shot accuracy at 336 pixels",
        (*UMG_CLIP, "average"),
        global_rows(
            """
OpenAI-CLIP-B16 82.1 90.8 67.0 22.9 44.9 55.9 46.3 43.5 48.2 49.9 77.7
    61.9 52.1 55.3 50.7 60.7 58.3 98.3 62.6 40.3 78.3 59.4
Open-CLIP-B16 83.2 88.2 63.7 20.2 56.3 37.5 50.3 37.3 52.7 38.4 76.4
    60.9 48.7 54.0 52.3 56.6 58.4 96.5 68.1 50.1 75.4 58.3
EVA-02-CLIP-B16 85.9 96.8 82.3 22.6 52.2 63.0 49.7 41.1 55.9 61.9 80.7
    67.7 41.1 63.2 53.1 54.2 59.6 99.4 68.3 26.1 78.5 62.1
UMG-CLIP-B16 83.3 97.3 84.2 20.5 52.1 64.4 50.2 39.4 55.4 64.3 83.4
    66.5 39.7 63.9 58.5 50.8 61.4 99.4 70.5 28.0 78.5 62.5
OpenAI-CLIP-L14 83.4 94.9 74.4 34.4 55.7 61.4 49.2 52.5 61.0 77.5 89.0
    70.9 79.0 72.0 60.8 70.6 63.8 99.4 66.6 50.3 78.1 68.8
Open-CLIP-L14 84.1 93.8 71.4 24.1 61.4 52.6 46.9 45.0 57.0 46.4 81.7
    64.2 65.2 58.2 57.1 55.7 61.8 97.8 70.6 50.5 76.7 63.0
EVA-02-CLIP-L14 86.5 98.9 89.8 33.5 64.7 71.4 51.0 57.7 68.9 82.9 93.2
    73.8 64.2 78.4 54.8 64.6 69.0 99.7 72.5 45.8 82.7 71.6
UMG-CLIP-L14 84.5 98.4 88.6 31.1 63.9 68.5 55.4 57.9 66.1 79.1 93.2
    71.6 73.1 73.7 72.2 62.9 69.1 99.5 73.3 51.4 81.4 72.1
EVA-02-CLIP-E14 86.1 99.2 91.5 34.9 67.6 69.0 56.7 66.8 69.9 81.7 93.4
    75.4 76.4 76.6 48.0 56.9 72.1 99.0 73.2 70.5 80.8 73.6
UMG-CLIP-E14 86.2 98.6 90.2 35.0 67.9 69.3 56.4 71.0 67.9 83.3 94.5
    72.7 84.4 76.8 50.8 61.4 71.0 99.6 75.1 76.0 79.3 74.6
""",
            tuple(f"{SUITE}{name}/accuracy" for name in (*UMG_CLIP, "umg_clip")),
            AFTER,
        ),
    ),
    PaperTable(
        "umg_clip",
        3,
        "zero-shot retrieval at 336 pixels",
        [
            f"{name} {way} R@{k}"
            for name in ("COCO", "Flickr30k")
            for way in ("I2T", "T2I")
            for k in (1, 5, 10)
        ],
        global_rows(
            """
OpenAI-CLIP-B16 52.4 76.8 84.7 33.1 58.4 69.0 81.9 96.2 98.8 62.1 85.6 91.8
Open-CLIP-B16 59.4 81.8 88.6 42.3 66.7 77.1 86.3 97.9 99.4 69.8 90.4 94.6
EVA-02-CLIP-B16 58.7 80.7 88.2 42.2 66.9 76.3 85.7 96.7 98.9 71.2 91.0 94.7
UMG-CLIP-B16 64.7 85.9 91.7 51.6 76.4 84.4 91.4 98.9 99.6 78.6 94.2 96.7
OpenAI-CLIP-L14 58.0 81.2 87.9 37.1 61.7 71.5 87.4 98.3 99.3 67.4 89.0 93.3
Open-CLIP-L14 61.3 83.3 89.6 45.5 70.0 79.0 87.7 98.8 99.5 74.1 92.7 95.3
EVA-02-CLIP-L14 64.2 85.2 90.8 47.9 71.7 80.0 89.2 98.9 99.6 77.9 94.2 96.8
UMG-CLIP-L14 68.9 89.0 94.1 54.6 78.5 86.1 93.4 99.5 99.9 83.1 96.0 98.1
EVA-02-CLIP-E14 66.4 87.4 92.3 50.5 74.4 82.5 91.5 99.4 99.8 78.7 94.6 97.2
UMG-CLIP-E14 71.7 89.8 94.3 57.5 80.4 87.3 93.1 99.7 99.9 81.2 95.7 97.7
""",
            RECALL,
        ),
    ),
    PaperTable(
        "umg_clip",
        4,
        "open-vocabulary panoptic segmentation; -BigDet: adapted with BigDet Panoptic, all others with COCO Panoptic",
        [f"{data} {metric}" for data in ("ADE20K", "COCO zero-shot", "COCO") for metric in QUALITY],
        dense_rows(
            """
MaskCLIP 15.1 6.0 23.7 - - - - - -
FreeSeg 16.3 6.5 24.6 - - - - - -
ODISE 12.6 14.4 29.9 - - - 55.4 46.0 65.2
FC-CLIP 26.8 16.8 34.1 - - - 54.4 44.6 63.7
EVA-02-CLIP-B16 19.5 12.2 27.3 - - - 54.8 44.1 65.9
UMG-CLIP-B16 23.7 14.9 30.8 - - - 54.8 44.6 66.0
EVA-02-CLIP-L14 23.5 15.9 30.3 - - - 58.1 48.7 68.6
UMG-CLIP-L14 25.2 17.4 34.4 - - - 58.0 48.5 68.9
EVA-01-CLIP-g14 22.8 15.3 29.7 - - - 57.6 47.6 67.5
UMG-CLIP-g14 26.2 17.3 34.2 - - - 57.7 48.2 67.9
EVA-02-CLIP-E14 24.9 17.6 31.9 - - - 58.8 49.2 68.2
UMG-CLIP-E14 26.2 19.1 34.9 - - - 59.0 50.2 69.5
UMG-CLIP-B16-BigDet 27.1 19.6 34.6 44.3 35.4 57.3 56.0 45.7 67.1
UMG-CLIP-L14-BigDet 29.1 22.7 36.1 46.0 37.7 59.1 58.9 49.7 68.9
UMG-CLIP-g14-BigDet 30.0 23.5 36.0 46.4 39.8 58.8 58.5 49.6 68.5
UMG-CLIP-E14-BigDet 31.6 24.2 38.2 48.0 40.1 61.3 59.5 50.7 69.7
""",
            (*ADE20K, "", "", "", *COCO),
        ),
    ),
    PaperTable(
        "umg_clip",
        5,
        "open-vocabulary semantic segmentation, mIoU; -BigDet as in Table 4",
        SIX,
        dense_rows(
            """
SPNet - - 24.3 - 18.3 -
ZS3Net - - 19.4 - 38.3 -
LSeg - - - - 47.4 -
SimBaseline 15.3 - - - 74.5 -
ZegFormer 16.4 - - - 73.3 -
LSeg+ 18.0 3.8 46.5 7.8 - -
OVSeg 29.6 9.0 55.7 12.4 - 94.5
SAN 33.3 13.7 60.2 17.1 - 95.5
CAT-Seg-L 31.5 11.4 62.0 20.4 81.8 96.6
CAT-Seg-G 36.2 13.3 61.5 21.4 81.4 97.1
OpenSeg 21.1 6.3 42.1 9.0 - -
MaskCLIP 23.7 8.2 45.9 10.0 - -
ODISE 29.9 11.1 57.3 14.5 84.6 -
FC-CLIP 34.1 14.8 58.4 18.2 81.8 95.4
EVA-02-CLIP-B16 27.3 8.3 54.0 14.3 82.7 96.3
UMG-CLIP-B16 30.8 11.8 58.5 18.2 82.8 96.3
EVA-02-CLIP-L14 30.3 11.2 57.1 17.6 84.5 97.9
UMG-CLIP-L14 34.4 13.7 61.0 19.7 85.2 97.9
EVA-01-CLIP-g14 29.7 9.3 54.8 15.9 84.5 97.6
UMG-CLIP-g14 34.2 13.6 60.6 18.9 85.2 97.4
EVA-02-CLIP-E14 31.9 12.4 55.7 18.0 84.8 98.0
UMG-CLIP-E14 34.9 13.9 60.2 19.2 85.3 97.3
UMG-CLIP-B16-BigDet 34.6 13.8 58.2 21.1 80.2 96.3
UMG-CLIP-L14-BigDet 36.1 15.4 58.7 23.2 83.5 96.1
UMG-CLIP-g14-BigDet 36.0 16.3 59.1 22.7 84.1 96.3
UMG-CLIP-E14-BigDet 38.2 17.3 60.5 25.2 85.4 96.9
""",
            MIOU,
        ),
    ),
    PaperTable(
        "umg_clip",
        6,
        "parameters of image tower, text tower and both: the pre-training that Tables 2 to 5 and 10 start from",
        ("image", "text", "total"),
        [
            Row(
                f"UMG-CLIP-{size}",
                values,
                ("",) * 3,
                "umg_clip",
                f"{UMG41M},tower={TOWERS[size]}" + ",loop=true" * (size in SPLIT),
                SPLIT.get(size, {}),
                differs=LACKS,
            )
            for size, values in (
                ("B16", ("86M", "63M", "149M")),
                ("L14", ("304M", "124M", "428M")),
                ("g14", ("1.0B", "124M", "1.1B")),
                ("E14", ("4.4B", "354M", "4.7B")),
            )
        ],
    ),
    PaperTable(
        "umg_clip",
        7,
        "losses, without adapters: averages of Table 2, of R@1 in Table 3, and with masks (-dense) of Table 5",
        THREE,
        [
            *ablation("image-captions", (71.7, 73.9, 47.7), "image_captions"),
            *ablation("captions", (71.3, 73.8, 49.9), "captions"),
            *ablation("image-tags", (71.3, 73.9, 50.4), "image_tags"),
            *ablation("all", (71.0, 73.9, 50.7)),
        ],
    ),
    PaperTable(
        "umg_clip",
        8,
        "the loss of tags, as Table 7",
        THREE,
        [
            *ablation("all", (71.0, 73.9, 50.7)),
            *ablation("contrastive", (70.1, 74.0, 50.6), tags="contrastive"),
        ],
    ),
    PaperTable(
        "umg_clip",
        9,
        "weights of the losses of images and of regions (α-β), as Table 7",
        THREE,
        [
            *ablation("1.0-0.5", (71.0, 73.9, 49.9), region_weight=0.5),
            *ablation("0.5-1.0", (69.8, 73.3, 50.6), image_weight=0.5),
            *ablation("all", (71.0, 73.9, 50.7)),
        ],
    ),
    PaperTable(
        "umg_clip",
        10,
        "size of images in pixels, with and without adapters, L/14 on COCO Panoptic",
        [f"{data} {metric}" for data in ("ADE20K", "COCO") for metric in QUALITY],
        [
            Row(
                f"{size}-{'with' if adapters else 'without'}",
                values,
                (*ADE20K, *COCO),
                "umg_clip",
                f"{DENSE},tower={TOWERS['L14']},weights=data/umg_clip/L14"
                + ("" if size == 896 else f",size={size}")
                + ("" if adapters else ",adapters=false"),
                differs=HEAD,
            )
            for size, adapters, values in (
                (384, False, (23.9, 14.3, 32.6, 52.6, 39.5, 66.7)),
                (640, False, (23.6, 14.7, 32.7, 54.2, 42.3, 65.3)),
                (896, False, (23.2, 14.3, 32.5, 53.2, 42.4, 65.2)),
                (384, True, (24.4, 15.5, 32.6, 54.7, 42.4, 67.3)),
                (640, True, (24.8, 16.9, 33.4, 56.5, 46.0, 68.0)),
                (896, True, (25.2, 17.4, 34.4, 58.0, 48.5, 68.9)),
            )
        ],
    ),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of a row: "table=4,row=UMG-CLIP-L14"."""
    return row_config(TABLES, arg)
