"""Thousands of damaged files through all readers: each ends in a result or in one sentence, none in another exception.

More, and others: MUTANTS=20000 MUTATION_SEED=7 python -m pytest tests/test_mutation.py
"""

import ast
import atexit
import contextlib
import functools
import gzip
import io
import json
import logging
import os
import random
import shutil
import signal
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.annotation import outputs
from ovseg_jax.annotation import run as annotation
from ovseg_jax.annotation.statistics import Statistics as AnnotationStatistics
from ovseg_jax.annotation.workflow import Rules
from ovseg_jax.cli.outputs import Journal
from ovseg_jax.config import resolved, stages_of
from ovseg_jax.data import prepared_files
from ovseg_jax.data.images import read_header, read_image, read_mask, read_wide_mask
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Example, replaced
from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.data.sources.image_folder import ImageFolder, read_names
from ovseg_jax.data.sources.prepared import Prepared
from ovseg_jax.data.sources.pseudo_masks import PseudoMasks, Shard, Statistics, shard_name, write_shard
from ovseg_jax.data.sources.region_json import RegionJson
from ovseg_jax.data.sources.webdataset import WebDataset
from ovseg_jax.data.videos import VideoReader, VideoWriter
from ovseg_jax.datasets.ade20k import Ade20k150, Ade20kFull
from ovseg_jax.datasets.classification import FgvcAircraft, Gtsrb, ObjectNet, Resisc45, Voc2007
from ovseg_jax.datasets.coco import CocoPanoptic, CocoStuff
from ovseg_jax.datasets.coop import CoopSplit
from ovseg_jax.datasets.imagenet import ImageNet21k, ImageNetS
from ovseg_jax.datasets.lvis import Lvis
from ovseg_jax.datasets.members import Members
from ovseg_jax.datasets.narratives import LocalizedNarratives
from ovseg_jax.datasets.objects365 import Objects365
from ovseg_jax.datasets.pascal_context import PascalContext59, PascalContext459
from ovseg_jax.datasets.pixel_files import Cifar10, Fer2013, Mnist, Stl10, Svhn
from ovseg_jax.datasets.retrieval import CocoRetrieval
from ovseg_jax.datasets.voc import Voc2012
from ovseg_jax.errors import UserError
from ovseg_jax.evals import average_precision as ap
from ovseg_jax.evals.box_files import read_annotations, read_boxes
from ovseg_jax.experiment import stages
from ovseg_jax.experiment.features import kept_features
from ovseg_jax.experiment.load import read_classes, read_words
from ovseg_jax.experiment.mask_files import decode, read_mask_list, read_masks
from ovseg_jax.experiment.paper_report import read_scores, read_suite_scores
from ovseg_jax.experiment.run import _read_summary
from ovseg_jax.experiment.scores import read_suite
from ovseg_jax.inference.folder import image_files
from ovseg_jax.page.answers import read_picture
from ovseg_jax.pretrained.stated import stated_pixels
from ovseg_jax.scoring.answers import read_answers
from ovseg_jax.scoring.detections import read_results, score_precision
from ovseg_jax.scoring.files import Skips, read_list
from ovseg_jax.scoring.panoptic import read_panoptic
from ovseg_jax.scoring.retrieval import _read_owners, _read_scores
from ovseg_jax.towers.templates import read_templates
from ovseg_jax.train.checkpoints import load_variables, read_config, write_config
from ovseg_jax.train.metrics import _readable, read_metrics
from ovseg_jax.viz import curves
from ovseg_jax.vocab.class_files import read_class_file
from ovseg_jax.vocab.classes import parse_labels, read_label_file
from ovseg_jax.vocab.splits import load_split, read_categories
from ovseg_jax.vocab.tokenizers import load_tokenizer
from ovseg_jax.vocab.vectors import ClassVectors
from ovseg_jax.vocab.words import WordList
from tests.datasets.packing import as_json, jpeg, read_all, tarred, unpacked, zipped
from tests.datasets.test_ade20k import BENCH, FULL
from tests.datasets.test_captions import COCO, RETRIEVAL
from tests.datasets.test_classification_sets import CUT
from tests.datasets.test_classification_sets import FILES as CLASSIFIED
from tests.datasets.test_coco_sets import PANOPTIC, STUFF
from tests.datasets.test_coop_splits import PETS
from tests.datasets.test_imagenet import FILES as IMAGENET_S
from tests.datasets.test_imagenet import PROCESSED
from tests.datasets.test_instances import LVIS as LVIS_FILES
from tests.datasets.test_instances import OBJECTS
from tests.datasets.test_pascal_context import FILES_59, FILES_459
from tests.datasets.test_voc import FILES as VOC
from tests.extras import require
from tests.mutants import mutant
from tests.pretrained import damaged
from tests.pretrained.damaged import READERS as WEIGHTS

MUTANTS = int(os.environ.get("MUTANTS", "4000"))
SEED = int(os.environ.get("MUTATION_SEED", "0"))
SECONDS = 30  # which no reader needs, not even for a picture of as many pixels as Pillow allows
PACKAGE = Path(__file__).parents[1] / "ovseg_jax"


class Reader(NamedTuple):
    """A file and its reader.

    Attributes:
      write: writes a whole file into a folder, and what it needs beside it; returns its path.
      read: reads it.
      share: of the mutants, in parts of those of another reader: less for a slow one.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]
    share: float = 1.0


# What is damaged there is logged and computed anew.
SAID = (
    "done.json of features",
    "features",
    "summary.json",
    "config.json beside a run",
    "journal",
    "metrics.jsonl of a restart",
    "records of an annotation",
)


class Hang(BaseException):
    """A reader that takes too long; no Exception, so that no reader takes it for damage."""


def text(name: str, content: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(content, "utf-8")
        return folder / name

    return write


def picture(name: str, mode: str = "RGB", orientation: int = 1, **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        values = np.arange(12 * 16).reshape(12, 16) % 11
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
        image = image if mode == "I;16" else image.convert(mode)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(folder / name, **(options if orientation == 1 else {"exif": exif, **options}))
        return folder / name

    return write


def arrays(**found: np.ndarray) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "a.npz", **found)
        return folder / "a.npz"

    return write


def answers(path: Path) -> Any:
    return read_answers(path, "--pred:")


def halves(folder: Path) -> Path:
    mask = np.full((12, 16), 255, np.uint8)
    mask[:6], mask[6:9] = 1, 2
    _segments(mask, folder / "a.png")
    return folder / "a.png"


def _segments(mask: np.ndarray, path: Path) -> None:
    Image.fromarray(mask).save(path)


def shard(folder: Path) -> Path:
    masks = {k: picture("m.png", "P")(folder).read_bytes() for k in range(2)}
    shown = Shard({"threshold": 0.5}, [f"train-{k:06d}" for k in range(3)], [2], Statistics(2, [0, 2]))
    write_shard(folder / shard_name(0, 1), shown, masks)
    return folder / shard_name(0, 1)


def label_map_shard(folder: Path) -> Path:
    """Label maps of three classes; the picture has values above them."""
    labels = np.zeros((12, 16), np.uint8)
    labels[:4], labels[4:9] = 1, 3
    _segments(labels, folder / "m.png")
    maps = {k: (folder / "m.png").read_bytes() for k in range(2)}
    found = Statistics(2, [0, 2])
    ids = [f"train-{k:06d}" for k in range(3)]
    write_shard(
        folder / shard_name(0, 1),
        Shard({"decision": "argmax"}, ids, [2], found, parse_labels("a; b; c")),
        maps,
    )
    return folder / shard_name(0, 1)


def facts_of_shard(folder: Path) -> Path:
    with zipfile.ZipFile(shard(folder)) as archive:
        (folder / "shard.json").write_bytes(archive.read("shard.json"))
    return folder / "shard.json"


def with_facts(path: Path) -> None:
    if not path.is_file():
        return
    masks = picture("m.png", "P")(path.parent).read_bytes()
    with zipfile.ZipFile(path.parent / shard_name(0, 1), "w") as archive:
        archive.writestr("shard.json", path.read_bytes())
        archive.writestr("0.png", masks)
        archive.writestr("1.png", masks)
    masks_of_scenes(path.parent / shard_name(0, 1))


class Three(Scenes):
    """Images of the size of `picture`."""

    def __getitem__(self, index: int) -> Example:
        return replaced(super().__getitem__(index), image=np.zeros((12, 16, 3), np.uint8), class_ids=())


def masks_of_scenes(path: Path) -> None:
    source = PseudoMasks(Three(num_examples=3), path.parent)
    for index in range(3):
        dict(source[index])


def in_folder(write: Callable[[Path], Path], where: str = "") -> Callable[[Path], Path]:
    """The layout of `Folder` with two images, and one file of it anew."""

    def written(folder: Path) -> Path:
        for name in ("images", "masks"):
            (folder / name).mkdir()
        mask = np.zeros((12, 16), np.uint8)
        mask[2:5, 3:9], mask[6:9, 3:9] = 1, 2
        for name in ("a", "b"):
            picture(f"{name}.png")(folder / "images")
            _segments(mask, folder / f"masks/{name}.png")
        text("segments.json", '{"a.png": {"1": "red ball", "2": "grass"}, "b.png": {"1": "grass"}}')(folder)
        text("classes.txt", "1:red ball,ball\n2:grass,lawn\n7:invalid_class_id\n")(folder)
        return write(folder / where)

    return written


def all_of(source: Any) -> None:
    """Every field of every example, and what is read without them."""
    for index in range(len(source)):
        dict(source[index])
    source.extent()
    source.regions()
    list(source.captions())


def coco(name: str) -> Callable[[Path], Path]:
    """COCO's layout with two images; returns one file of it."""

    def write(folder: Path) -> Path:
        (folder / "annotations/panoptic_val").mkdir(parents=True)
        (folder / "val").mkdir()
        images, annotations, captions = [], [], []
        for k in (1, 2):
            picture(f"{k}.jpg")(folder / "val")
            colours = np.zeros((12, 16, 3), np.uint8)
            colours[:6], colours[6:] = (k, 1, 0), (9, 0, 2)
            _segments(colours, folder / f"annotations/panoptic_val/{k}.png")
            ids = (k + 256, 9 + 2 * 65536)
            infos = [
                {"id": n, "category_id": 3 + i, "iscrowd": 0, "area": 96, "bbox": [0, 6 * i, 16, 6]}
                for i, n in enumerate(ids)
            ]
            images.append({"id": k, "file_name": f"{k}.jpg", "height": 12, "width": 16})
            annotations.append({"image_id": k, "file_name": f"{k}.png", "segments_info": infos})
            captions.append({"image_id": k, "id": k, "caption": "a red ball on the grass"})
        categories = [
            {"id": 3, "name": "dog", "isthing": 1},
            {"id": 4, "name": "wall-other-merged", "isthing": 0},
        ]
        panoptic = {"images": images, "annotations": annotations, "categories": categories}
        text("annotations/panoptic_val.json", json.dumps(panoptic))(folder)
        text("annotations/captions_val.json", json.dumps({"images": images, "annotations": captions}))(folder)
        return folder / name

    return write


def root_of(path: Path, name: str) -> Path:
    return path.parents[name.count("/")]


def coco_reader(name: str, **arguments: Any) -> Reader:
    return Reader(coco(name), lambda path: all_of(Coco(root_of(path, name), "val", **arguments)), 1.5)


def folder_reader(write: Callable[[Path], Path], where: str = "", **arguments: Any) -> Reader:
    root = lambda path: path.parents[1] if where else path.parent
    return Reader(in_folder(write, where), lambda path: all_of(Folder(root(path), **arguments)))


def prepared(name: str) -> Reader:
    """A prepared folder with a shard that is not read; returns one of its other files."""

    def write(folder: Path) -> Path:
        provides = frozenset({"image", "class_ids", "boxes", "label", "captions", "region_tags"})
        row = {
            "size": (12, 16),
            "class_ids": [0, 1],
            "iscrowd": [False, True],
            "boxes": [[0, 0, 3, 4], [5, 5, 9, 9]],
            "label": 1,
            "captions": ["a dog"],
            "region_tags": [["dog"], []],
        }
        (folder / "toy-val.array_record-00000-of-00001").write_bytes(b"shard")
        index = prepared_files.make_index([row, row], provides)
        np.savez(folder / prepared_files.index_name("val"), allow_pickle=False, **index)
        files = [prepared_files.shard_name("toy", "val", 0, 1), prepared_files.index_name("val")]
        shard, listed = (
            {
                "file": file,
                "bytes": (folder / file).stat().st_size,
                "sha256": prepared_files.file_sha256(folder / file),
            }
            for file in files
        )
        entry = {"examples": 2, "extent": [12, 16, 2], "shards": [shard | {"examples": 2}], "index": listed}
        manifest = {
            "format": prepared_files.FORMAT,
            "dataset": "toy",
            "provides": sorted(provides),
            "splits": {"val": entry},
        }
        text(prepared_files.MANIFEST, json.dumps(manifest))(folder)
        text(prepared_files.CLASSES, CLASSES.to_json())(folder)
        return folder / name

    def read(path: Path) -> None:
        if name.endswith("npz"):  # whose size a manifest holds
            fields = frozenset({"class_ids", "boxes", "label", "captions", "region_tags"})
            index = prepared_files.read_index(path, 2, fields)
            for field in ("captions", "region_tags"):
                list(prepared_files.read_texts(index, field, path))
            return
        source = Prepared(path.parent, "val")
        source.extent()
        source.regions()
        list(source.captions())

    return Reader(write, read)


def class_folders(folder: Path) -> Path:
    for name in ("n01", "n02"):
        (folder / name).mkdir()
        picture("1.png")(folder / name)
    return text("names.txt", "n01: dog, hound\nn02\tcat\n")(folder)


def archive(name: str) -> Callable[[Path], Path]:
    """A tar that holds a file and a zip, or the zip itself."""

    def write(folder: Path) -> Path:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as inner:
            inner.writestr("a/1.txt", "one" * 50)
            inner.writestr("2.txt", "two")
        data = packed.getvalue()
        if ".tar" in name:
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as outer:
                for member in ("inner.zip", "3.txt"):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(data)
                    outer.addfile(entry, io.BytesIO(data))
            data = out.getvalue()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return folder / name

    return write


def download(files: dict[str, bytes], name: str, kind: Any, split: str = "train") -> Reader:
    """A whole download of a published data set, of which one file is damaged."""

    def write(folder: Path) -> Path:
        return unpacked(folder, files) / name

    return Reader(write, lambda path: read_all(kind(root_of(path, name)), split), 0.5)


def listed_images(folder: Path) -> Path:
    unpacked(folder, CLASSIFIED["resisc45"]())
    return text("list.txt", "wetland_001.jpg\nsea_ice_002.jpg\n")(folder)


def tars(folder: Path) -> Path:
    files = {
        f"{k}{suffix}": data for k in (1, 2) for suffix, data in ((".jpg", jpeg(5, 6)), (".txt", b"a dog"))
    }
    (folder / "0.tar").write_bytes(tarred(files))
    return folder / "0.tar"


def with_captions(folder: Path, told: bytes) -> Path:
    (folder / "0.tar").write_bytes(tarred({"1.json": told, "1.jpg": jpeg(2, 3)}))
    return folder / "0.tar"


def index_of_tars(folder: Path) -> Path:
    tars(folder)
    WebDataset(folder, index=folder / "i.npz")
    return folder / "i.npz"


def all_captions(folder: Path, **arguments: Any) -> None:
    source = WebDataset(folder, **arguments)
    for index in range(len(source)):
        dict(source[index])
    list(source.captions())


def regions(name: str) -> Callable[[Path], Path]:
    """An image, and its JSON file or a zip of it."""

    def write(folder: Path) -> Path:
        region = {"bbox": [0, 1, 4, 5], "captions": ["a paw"], "tags": ["paw"]}
        told = as_json({"captions": ["a dog"], "tags": ["dog"], "regions": [region]})
        (folder / "1.jpg").write_bytes(jpeg(5, 6))
        (folder / name).write_bytes(told if name.endswith(".json") else zipped({"1.json": told}))
        return folder / name

    return write


def all_regions(folder: Path) -> None:
    source = RegionJson(folder)
    for index in range(len(source)):
        dict(source[index])


def all_members(path: Path) -> None:
    members = Members(path.parent)
    for name in members.names():
        members.read(name)


BOXES = [
    {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 3},
    {"image_id": "x", "bbox": [0.5, 2, 3, 4], "score": 1, "category_id": 3},
]
ANNOTATIONS = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "height": 12, "width": 16},
        {"id": 2, "coco_url": "http://x/val2017/b.jpg", "height": 12, "width": 16},
    ],
    "annotations": [
        {"id": 0, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
    ],
    "categories": [{"id": 3, "name": "dog", "synonyms": ["hound"], "isthing": 1}, {"id": 4, "name": "cat"}],
}
LVIS = ANNOTATIONS | {
    "images": [
        image | {"file_name": "a.jpg", "neg_category_ids": [4], "not_exhaustive_category_ids": []}
        for image in ANNOTATIONS["images"]
    ],
    "categories": [{"id": k, "name": f"n{k}", "frequency": "r"} for k in (3, 4)],
}
RLE = {"size": [12, 16], "counts": "X14800000X3"}
OUTLINES = LVIS | {
    "annotations": [
        ANNOTATIONS["annotations"][0] | {"segmentation": mask, "area": None}
        for mask in ([[1, 2, 4, 2, 4.5, 6], [0, 0, 9, 0, 9, 9, 0, 9]], RLE, RLE | {"counts": [40, 4, 148]})
    ]
}
MASKS = [
    {"image_id": 1, "segmentation": mask, "score": 0.5, "category_id": 3}
    for mask in (RLE, RLE | {"counts": [20, 100, 72]})
]
CLASSES = parse_labels("dog,hound; cat; sky")
SPLIT = {"seen": [{"id": 3, "name": "dog", "isthing": 1}], "unseen": ["cat", "sky"]}
RECORDS = "".join(json.dumps({"step": k, "loss": 1 / (k + 1), "val/mIoU": 50.0}) + "\n" for k in range(4))


def vectors(folder: Path) -> Path:
    np.savez(
        folder / "v.npz",
        words=np.array(["dog", "cat"]),
        ids=np.array([3, 7]),
        vectors=np.eye(2, 5, dtype=np.float32),
    )
    return folder / "v.npz"


@functools.cache
def _bpe() -> bytes:
    """As many merges as are quickly read."""
    return b"#version\nh e\nl l\nhe ll\nhell o</w>\n"


def bpe(folder: Path) -> Path:
    require("tokenizers")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(_bpe()))
    return folder / "bpe_simple_vocab_16e6.txt.gz"


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    letters = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    merges = _bpe().decode().split("\n")[1:-1]
    pieces = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    return {piece: k for k, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}, merges


def clip_files(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        vocabulary, merges = clip_vocabulary()
        text("vocab.json", json.dumps(vocabulary))(folder)
        text("merges.txt", "\n".join(["#version: 0.2", *merges, ""]))(folder)
        return folder / name

    return write


def tokenizer_json(folder: Path) -> Path:
    vocabulary, merges = clip_vocabulary()
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "end_of_word_suffix": "</w>"}
    return text("tokenizer.json", json.dumps({"model": model}))(folder)


def word_pieces(folder: Path) -> Path:
    require("tokenizers")
    return text("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nred\n##b\n")(folder)


def unigram_json(folder: Path) -> Path:
    library = require("tokenizers")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in "▁abcdefgh")]
    library.Tokenizer(library.models.Unigram(pieces, 2, False)).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@functools.cache
def _sentences() -> bytes:
    model = io.BytesIO()
    require("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball on the grass", "the blue kite and a dog"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def sentences(folder: Path) -> Path:
    (folder / "spiece.model").write_bytes(_sentences())
    return folder / "spiece.model"


def tokens(path: Path) -> Any:
    return load_tokenizer(path)(["a red ball", "x\ud800 é", ""])


def run_file(name: str, content: str) -> Callable[[Path], Path]:
    return text(name, content)


def _config() -> str:
    from ovseg_jax.config import to_json
    from tests.tiny import get_config

    return to_json(get_config())


@functools.cache
def _run() -> Path:
    """A run of a few steps with a checkpoint."""
    import jax

    from ovseg_jax.parallel.sharding import make_mesh
    from ovseg_jax.train.loop import fit
    from tests.fakes import LinearMethod, make_batches, make_config

    workdir = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, workdir)
    config = make_config(steps=2, optimizer=dict(make_config().optimizer, schedule="constant"))
    fit(config, workdir, LinearMethod(), make_batches(config), [], make_mesh({"data": 1}, jax.devices()[:1]))
    write_config(workdir, config)
    return workdir


def of_run(pattern: str, read: Callable[[Path], Any], share: float = 0.3) -> Reader:
    """A file of a run, its checksums included."""

    def write(folder: Path) -> Path:
        shutil.copytree(_run(), folder / "run")
        return max((folder / "run").rglob(pattern), key=lambda path: path.stat().st_size)

    return Reader(write, lambda path: read(next(p for p in path.parents if p.name == "run")), share)


DONE = {"examples": 2, "views": 1, "data": 7}


def features(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "features.npy", np.zeros((2, 1, 3), np.float32))
        return text("done.json", json.dumps(DONE))(folder).with_name(name)

    return write


def scored(kind: ap.Kind, annotations: dict[str, Any] | None = None) -> Callable[[Path], Any]:
    """A reader of annotations, with AP by them; or of results for the annotations."""

    def read(path: Path) -> None:
        beside = path.parent / "beside.json"
        files = (str(beside), str(path)) if annotations is None else (str(path), str(beside))
        beside.write_text(json.dumps(annotations or {"bbox": BOXES[:1], "segm": MASKS}[kind]))
        truth = read_annotations(files[1], kind=kind)
        found = read_results(*files, truth, kind, Skips("skip"))
        score_precision(truth, found, kind, truth.rule, Skips(), 1)

    return read


STAGED = {"method": "linear", "steps": 3, "optimizer": {"learning_rate": 0.1}}


def staged() -> ConfigDict:
    return ConfigDict({"stages": [{"name": "a", "kind": "train", "config": STAGED}]})


def marker(folder: Path) -> Path:
    (folder / "a").mkdir()
    found = {"hash": stages._hash(stages_of(staged())["a"]), "kind": "train", "config": STAGED}
    return text("a/stage.json", json.dumps(found))(folder)


def written(path: Path, *records: dict[str, Any]) -> Path:
    """A journal."""
    journal = Journal(path)
    journal.start({"a": 1})
    for record in records:
        journal.append(record)
    journal.close()
    return path


def no_other_record(path: Path) -> None:
    """A record that is damaged is dropped, not read as another one."""
    assert all(record in ({"image": "a"}, {"image": "b"}) for record in Journal(path).records)


JOB = annotation.Job(
    {"name": "scenes"}, {"captions": [{"name": "x"}]}, Rules(score_regions=True), "", batch=1
)


def records(name: str) -> Callable[[Path], Path]:
    """The records of two images, and what they depend on; returns one of the files."""

    def write(folder: Path) -> Path:
        require("pycocotools")
        things = {"bbox": [0, 1, 9, 5.5], "label": "red ball", "score": 0.9, "isthing": True}
        things |= {"captions": [["a ball", "x", 0.25]], "label_score": 0.5}
        steady = things | {"mask": RLE["counts"], "stability": 0.9}
        found = {
            "image": "a",
            "size": [12, 16],
            "tags": ["ball"],
            "captions": [["a red ball", "x", 0.5], ["grass", "y", 0.25]],
            "regions": [steady, things | {"isthing": False}],
            "stuff": [{"label": "grass", "score": 0.7, "mask": RLE["counts"]}],
        }
        job = JOB._replace(out=str(folder))
        annotation._check_request(job)
        written(folder / "records/00000.jsonl", found, found | {"image": "b"}, {"image": "c", "error": "no"})
        return folder / "records" / name

    return write


def finished(path: Path) -> None:
    """What is made of the records of a folder."""
    rows = lambda: (r for r in annotation.read_records(epath.Path(path.parents[1])) if "error" not in r)
    floors, things = outputs.floors_of(rows(), JOB.rules)
    statistics = AnnotationStatistics()
    for record in rows():
        final = outputs.finish(record, floors, JOB.rules)
        statistics.add(final.record, final.dropped)
        outputs.regions_json(final.record)
        outputs.panoptic_rows(final, {name: k for k, name in enumerate(things)})
        outputs._quality(final.record)
    json.dumps(statistics.result(), allow_nan=False)


PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25], "rescale_factor": 1 / 255}


def pixels(path: Path) -> None:
    found = stated_pixels(path.parent)
    assert found is None or (np.isfinite(found).all() and min(found.std) > 0)


def video(folder: Path) -> Path:
    require("av")
    with VideoWriter(folder / "a.mp4", 10) as writer:
        for shade in range(0, 250, 50):
            writer.add(Image.new("RGB", (48, 32), (shade, 90, 250 - shade)))
    return folder / "a.mp4"


READERS: dict[str, Reader] = {
    **{
        f"image {name} {mode}": Reader(
            picture(name, mode, **options), lambda path: (read_image(path), read_header(path))
        )
        for name, mode, options in (
            ("a.png", "RGBA", {}),
            ("a.png", "P", {"transparency": 0}),
            ("a.png", "I;16", {}),
            ("a.png", "RGB", {"orientation": 6}),
            ("a.jpg", "RGB", {"orientation": 6}),
            ("a.jpg", "CMYK", {}),
            ("a.gif", "P", {}),
            ("a.tif", "RGB", {"orientation": 3}),
            ("b.tif", "L", {"compression": "tiff_lzw"}),
            ("c.tif", "I;16", {}),
            ("a.webp", "RGB", {}),
            ("a.bmp", "P", {}),
            ("a.ppm", "RGB", {}),
            ("a.jp2", "RGB", {}),
            ("a.tga", "RGB", {}),
            ("a.ico", "RGB", {"sizes": [(8, 8)]}),
            ("a.pcx", "RGB", {}),
            ("a.dds", "RGB", {}),
            ("a.sgi", "RGB", {}),
        )
    },
    **{
        f"mask {name} {mode}": Reader(picture(name, mode, **options), read_mask)
        for name, mode, options in (
            ("a.png", "L", {}),
            ("a.png", "P", {"bits": 4}),
            ("a.png", "I;16", {}),
            ("a.tif", "L", {}),
            ("a.bmp", "L", {}),
            ("a.pgm", "L", {}),
        )
    },
    **{
        f"wide mask {name} {mode}": Reader(picture(name, mode, **options), read_wide_mask)
        for name, mode, options in (
            ("a.png", "L", {}),
            ("a.png", "P", {}),
            ("a.png", "I;16", {}),
            ("b.tif", "I", {}),
        )
    },
    "uploaded picture": Reader(picture("a.png", "RGBA"), read_picture),
    "records of an annotation": Reader(records("00000.jsonl"), finished, 2),
    "request.json of an annotation": Reader(
        records("request.json"),
        lambda path: annotation._check_request(JOB._replace(out=str(path.parents[1]))),
    ),
    "preprocessor_config.json": Reader(
        text("preprocessor_config.json", json.dumps(PIXELS | {"do_rescale": True, "do_normalize": True})),
        pixels,
    ),
    "COCO's panoptic JSON": coco_reader("annotations/panoptic_val.json"),
    "panoptic results": Reader(
        coco("annotations/panoptic_val.json"),
        lambda path: read_panoptic(str(path), read_panoptic(str(path))[0]),
    ),
    "COCO's captions": coco_reader("annotations/captions_val.json", masks=False),
    "COCO's PNG": coco_reader("annotations/panoptic_val/1.png"),
    "COCO's image": coco_reader("val/1.jpg"),
    "mask of a folder": folder_reader(picture("a.png", "P", bits=4), "masks"),
    "semantic mask of a folder": folder_reader(halves, "masks", kind="semantic"),
    "turned image of a folder": folder_reader(picture("a.png", orientation=6), "images"),
    "segments.json": folder_reader(text("segments.json", '{"a.png": {"1": "ball"}, "b": {"2": "lawn"}}')),
    "classes.txt": folder_reader(text("classes.txt", "1:red ball,ball\n2:grass,lawn\n7:invalid_class_id\n")),
    "captions.json": folder_reader(text("captions.json", '{"a.png": ["a red ball", "x"], "b": "one text"}')),
    "captions.jsonl": folder_reader(
        text(
            "captions.jsonl", '{"image_id": "a", "caption": "x"}\n{"file": "b.png", "captions": ["y", "z"]}\n'
        )
    ),
    "captions.tsv": folder_reader(text("captions.tsv", "a.png\ta red ball\nb\tone text\n")),
    "names of class folders": Reader(class_folders, lambda path: all_of_labels(path)),
    "names as JSON": Reader(text("names.json", '{"n01": ["dog", "hound"], "n02": "cat"}'), read_names),
    "label file": Reader(
        text("l.txt", "3:airplane,aeroplane\n# things: 9\n# x\n7:invalid_class_id\n9: car\n"), read_label_file
    ),
    "class list": Reader(text("c.txt", "tench, Tinca tinca\nbow (weapon)\n"), read_class_file),
    "class list as JSON": Reader(text("c.json", '["airplane", ["car", "automobile"]]'), read_class_file),
    "categories": Reader(text("c.json", json.dumps(ANNOTATIONS)), read_class_file),
    "class list of a run": Reader(text("c.json", CLASSES.to_json()), read_class_file),
    "classes.json": Reader(
        text("classes.json", CLASSES.to_json()), lambda path: read_classes(epath.Path(path.parent))
    ),
    "words.json": Reader(
        text("words.json", '["<pad>", "dog", "red"]'), lambda path: read_words(epath.Path(path.parent))
    ),
    "list of words": Reader(text("w.json", '["<pad>", "dog", "red"]'), WordList.load),
    "split": Reader(text("s.json", json.dumps({"data": SPLIT})), lambda path: load_split(CLASSES, str(path))),
    "list of categories": Reader(text("s.json", json.dumps(SPLIT["unseen"])), read_categories),
    "vectors": Reader(vectors, lambda path: ClassVectors.of(str(path))),
    "CLIP's merges": Reader(bpe, tokens),
    "CLIP's vocab.json": Reader(clip_files("vocab.json"), tokens),
    "CLIP's merges.txt": Reader(clip_files("merges.txt"), tokens),
    "CLIP's tokenizer.json": Reader(tokenizer_json, tokens),
    "BERT's vocab.txt": Reader(word_pieces, tokens),
    "SigLIP's tokenizer.json": Reader(unigram_json, tokens),
    "SigLIP's model": Reader(sentences, tokens),
    "templates": Reader(
        text("t.json", '["a photo of a {}.", "a {}"]'), lambda path: read_templates(str(path))
    ),
    "config.json": Reader(
        lambda folder: text("config.json", _config())(folder), lambda path: read_config(path.parent)
    ),
    "config.json of a run": of_run("config.json", read_config),
    "sums of a checkpoint": of_run("checkpoints/*/checksums.json", load_variables),
    "metadata of a checkpoint": of_run("variables/_METADATA", load_variables),
    "manifest of a checkpoint": of_run("variables/manifest.ocdbt", load_variables),
    "arrays of a checkpoint": of_run("variables/**/d/*", load_variables),
    "done.json of features": Reader(
        features("done.json"), lambda path: kept_features(epath.Path(path.parent), DONE)
    ),
    "features": Reader(features("features.npy"), lambda path: kept_features(epath.Path(path.parent), DONE)),
    "stage.json": Reader(marker, lambda path: stages.check_finished(staged(), epath.Path(path.parents[1]))),
    "config.json beside a run": Reader(
        text(
            "config.json",
            json.dumps({"stages": [{"name": "b", "kind": "train", "config": staged().to_dict()}]}),
        ),
        lambda path: resolved(ConfigDict({"x": "stage:a"} | staged().to_dict()), path.parent / "b"),
    ),
    "summary.json": Reader(
        text("summary.json", '{"steps": 3, "seconds": 2.5, "images_per_second": 3, "data_wait_seconds": 0}'),
        lambda path: _read_summary(epath.Path(path.parent)),
    ),
    "JSON of masks": Reader(
        text(
            "m.json",
            '[{"image_id": 3, "segmentation": {"size": [3, 4], "counts": "42102"}, "score": 0.5}, '
            '{"image_id": "a", "segmentation": {"size": [3, 4], "counts": [4, 2, 6]}}]',
        ),
        lambda path: [decode(found, str(path)) for found in read_mask_list(path).values()],
    ),
    "masks of an image": Reader(arrays(masks=np.eye(4)[None], scores=np.ones(1)), read_masks),
    "summary.json of a report": Reader(
        text("summary.json", '{"steps": 3, "a/miou": 2.5, "drawn": 3}'), read_scores
    ),
    "scores of a suite": Reader(
        text("s.csv", 'set,prompt,accuracy,per_class\npets,,3.5,4\npets,hard,7,"2"\n'), read_suite_scores
    ),
    "list of images": Reader(
        text("l.txt", "a.png\nb/c.png\nd\n"), lambda path: read_list(str(path), (".png",))
    ),
    "answers as JSON": Reader(text("a.json", '{"a": [0.5, 1, 2], "b": [3, -1, 2e3]}'), answers),
    "classes as JSON": Reader(text("a.json", '{"a": "dog", "b": 4}'), answers),
    "answers as CSV": Reader(text("a.csv", 'image,dog,"a cat"\na,0.5,1\nb,-1,2e3\n'), answers),
    "classes as CSV": Reader(text("a.csv", "image,class\na,dog\nb,7\n"), answers),
    "answers as arrays": Reader(
        arrays(scores=np.ones((2, 3)), names=np.array(["a", "b"]), columns=np.arange(3)), answers
    ),
    "vectors of images and texts": Reader(
        arrays(images=np.ones((2, 3), np.float32), texts=np.ones((4, 3))),
        lambda path: _read_scores(str(path), False),
    ),
    "image of each text": Reader(
        arrays(image_ids=np.array(["a", "b"]), text_image_ids=np.array(["b", "b", "a"])),
        lambda path: _read_owners(str(path), (2, 3)),
    ),
    "boxes": Reader(text("b.json", json.dumps(BOXES)), read_boxes),
    "annotations": Reader(text("a.json", json.dumps(ANNOTATIONS)), scored("bbox")),
    "annotations of LVIS": Reader(text("a.json", json.dumps(LVIS)), scored("bbox")),
    "annotations of masks": Reader(text("a.json", json.dumps(OUTLINES)), scored("segm")),
    "results": Reader(text("r.json", json.dumps(BOXES[:1])), scored("bbox", LVIS)),
    "results of masks": Reader(text("r.json", json.dumps(MASKS)), scored("segm", OUTLINES)),
    "objectInfo150.txt": download(BENCH, "ADEChallengeData2016/objectInfo150.txt", Ade20k150),
    "index of ADE20K": download(FULL, "ADE20K_2021_17_01/index_ade20k.pkl", Ade20kFull),
    "merged JSON of PASCAL Context": download(FILES_59, "trainval_merged.json", PascalContext59),
    "label map of PASCAL Context": download(FILES_459, "trainval/2008_000002.mat", PascalContext459),
    "words.txt of ImageNet-21K": download(PROCESSED, "words.txt", ImageNet21k),
    "mask of ImageNet-S": download(
        IMAGENET_S,
        next(k for k in IMAGENET_S if "n-seg" in k),
        functools.partial(ImageNetS, size="50"),
        "val",
    )._replace(share=0.1),
    "LVIS": download(LVIS_FILES, "lvis_v1_train.json", Lvis),
    "Objects365": download(OBJECTS, "train/zhiyuan_objv2_train.json", Objects365),
    "Localized Narratives": download(
        {k: v for k, v in COCO.items() if "00001" not in k}
        | {"coco_train_localized_narratives-00000-of-00001.jsonl": COCO["coco_val_captions.jsonl"]},
        "coco_val_captions.jsonl",
        LocalizedNarratives,
        "val",
    ),
    "panoptic JSON of a download": download(PANOPTIC, "annotations/panoptic_train2017.json", CocoPanoptic),
    "captions of a download": download(PANOPTIC, "annotations/captions_train2017.json", CocoPanoptic),
    "PNG of panoptic segments": download(
        PANOPTIC, "annotations/panoptic_train2017/000000000009.png", CocoPanoptic
    ),
    "CoOp's split": download(PETS, "split_zhou_OxfordPets.json", CoopSplit),
    "map of COCO-Stuff": download(STUFF, "stuffthingmaps/train2017/000000000009.png", CocoStuff),
    "map of SBD": download(VOC, "benchmark_RELEASE/dataset/cls/2008_000002.mat", Voc2012, "trainaug"),
    "list of SBD": download(VOC, "benchmark_RELEASE/dataset/train.txt", Voc2012, "trainaug"),
    **{
        f"{kind.name}, classified": download(CLASSIFIED[kind.name](), CUT[kind.name], kind, "test")._replace(
            share=0.2
        )
        for kind in (Cifar10, Fer2013, FgvcAircraft, Gtsrb, Mnist, ObjectNet, Stl10, Svhn, Voc2007)
    },
    "list of aerial images": Reader(
        listed_images, lambda path: read_all(Resisc45(path.parent, list=str(path)), "test"), 0.5
    ),
    "Karpathy's splits": download(RETRIEVAL, "dataset_coco.json", CocoRetrieval),
    "manifest of a prepared set": prepared(prepared_files.MANIFEST),
    "classes of a prepared set": prepared(prepared_files.CLASSES),
    "index of a prepared set": prepared("index-val.npz"),
    "tar of images and captions": Reader(tars, lambda path: all_captions(path.parent)),
    "caption in a tar": Reader(
        lambda folder: with_captions(folder, b'{"caption": ["a dog", "x"], "url": null}'),
        lambda path: all_captions(path.parent),
    ),
    "regions in JSON": Reader(regions("1.json"), lambda path: all_regions(path.parent)),
    "zip of regions": Reader(regions("1.zip"), lambda path: all_regions(path.parent)),
    "index of tars": Reader(index_of_tars, lambda path: all_captions(path.parent, index=path)),
    "zip": Reader(archive("a.zip"), all_members),
    "zip in a tar": Reader(archive("a.tar"), all_members),
    "zip in a tar.gz": Reader(archive("a.tar.gz"), all_members, 0.5),
    "suite": Reader(
        text("s.json", '{"sets": {"pets": {"metric": "mean", "prompts": {"hard": "a {}."}, "limit": 3}}}'),
        lambda path: read_suite(str(path)),
    ),
    "video": Reader(video, lambda path: list(VideoReader(path)), 0.5),
    "list of paths": Reader(
        lambda folder: text("a.txt", f"{folder / 'a.txt'}\n")(folder), lambda path: image_files(f"@{path}")
    ),
    "journal": Reader(
        lambda folder: written(folder / "p.jsonl", {"image": "a"}, {"image": "b"}), no_other_record
    ),
    "metrics.jsonl of curves": Reader(text("metrics.jsonl", RECORDS), curves._read),
    **{name: Reader(write, read, 0.3) for name, (write, read) in damaged.READERS.items()},
    "pseudo-masks": Reader(shard, masks_of_scenes),
    "pseudo-label maps": Reader(label_map_shard, masks_of_scenes),
    "shard.json": Reader(facts_of_shard, with_facts),
    "metrics.jsonl": Reader(text("metrics.jsonl", RECORDS), lambda path: read_metrics(path.parent)),
    "metrics.jsonl of a restart": Reader(text("metrics.jsonl", RECORDS), lambda path: _readable(path.parent)),
}


# Of published weights; those of PyTorch need that extra.
READERS |= {name: Reader(write, read, 0.5) for name, (write, read) in WEIGHTS.items()}


def all_of_labels(path: Path) -> None:
    source = ImageFolder(path.parent, names=path)
    for index in range(len(source)):
        dict(source[index])


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def complaint(read: Callable[[Path], Any], path: Path) -> str:
    """What a reader says of a damaged file; "" where it reads it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"), limited(SECONDS):
        warnings.simplefilter("ignore")
        try:
            read(path)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused(name, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    reader = READERS[name]
    path = reader.write(tmp_path)
    assert not complaint(reader.read, path)
    whole, refused, failures = path.read_bytes(), 0, []
    count = max(1, round(MUTANTS * reader.share / sum(r.share for r in READERS.values())))
    for k in range(count):
        data = b"" if k == 0 else mutant(random.Random(f"{SEED} {name} {k}"), path.name, whole)
        path.write_bytes(data)
        try:
            said = complaint(reader.read, path)
        except (Exception, Hang) as error:
            failures.append(f"mutant {k}: {type(error).__name__}: {str(error)[:200]}")
            continue
        refused += bool(said)
        # A whole model of other words refuses the label, not the file.
        named = path.name in said or str(tmp_path) in said or said.startswith("label ")
        if "\n" in said or (said and not named):
            failures.append(f"mutant {k}: the sentence names no file, or is several: {said}")
    assert not failures, f"{len(failures)} of {count}: " + "\n".join(failures[:5])
    assert refused or name in SAID
    path.unlink()
    path.mkdir()
    complaint(reader.read, path)  # a folder in the file's place
    path.rmdir()
    os.mkfifo(path)
    complaint(reader.read, path)  # a named pipe without a writer


# Functions that open files: the readers above that go through each, or why none does.
OPENERS: dict[str, str] = {
    "__main__.py:verbs": "none: a module of the package",
    "annotation/plugs/hugging_face.py:__init__": "none: transformers reads the files",
    "annotation/run.py:_annotate_shard": "records of an annotation",
    "annotation/run.py:_check_request": "request.json of an annotation",
    "annotation/run.py:_load": "none: written anew by each call",
    "annotation/run.py:_raise_error": "none: the sentence of a worker",
    "annotation/run.py:_read_todo": "none: written by the call that reads it",
    "annotation/run.py:read_records": "records of an annotation",
    "cli/console.py:guarded": "none: opens the null device",
    "cli/outputs.py:__init__": "journal",
    "cli/outputs.py:_entry": "journal",
    "cli/outputs.py:start": "none: a request in memory",
    "config.py:_places": "config.json beside a run",
    "config.py:from_json": "config.json of a run",
    "data/images.py:_content": "wide mask a.png L",
    "data/images.py:_open": "image a.png RGBA",
    "data/prepared_files.py:file_sha256": "none: computes a checksum",
    "data/prepared_files.py:read_index": "index of a prepared set",
    "data/prepared_files.py:read_manifest": "manifest of a prepared set",
    "data/prepared_files.py:read_prepared_classes": "classes of a prepared set",
    "data/prepared_files.py:read_texts": "index of a prepared set",
    "data/sources/coco.py:_read_lists": "COCO's panoptic JSON",
    "data/sources/folder.py:_from_lines": "captions.jsonl",
    "data/sources/folder.py:_from_table": "captions.tsv",
    "data/sources/folder.py:_read_entries": "segments.json",
    "data/sources/image_folder.py:read_names": "names of class folders",
    "data/sources/pseudo_masks.py:_read": "pseudo-masks",
    "data/sources/pseudo_masks.py:read_shard": "shard.json",
    "data/sources/pseudo_masks.py:write_shard": "none: writes a zip",
    "data/sources/region_json.py:_content": "regions in JSON",
    "data/sources/region_json.py:_members": "zip of regions",
    "data/sources/region_json.py:read": "zip of regions",
    "data/sources/webdataset.py:_captions": "caption in a tar",
    "data/sources/webdataset.py:_member": "tar of images and captions",
    "data/sources/webdataset.py:_read_index": "index of tars",
    "data/sources/webdataset.py:_tar_members": "tar of images and captions",
    "data/videos.py:_open": "video",
    "datasets/ade20k.py:full_ids": "none: a file of the package",
    "datasets/classification.py:_package_names": "none: a file of the package",
    "datasets/classification.py:listed": "list of aerial images",
    "datasets/members.py:_add_archive": "zip in a tar",
    "datasets/members.py:_zip_entries": "zip",
    "datasets/members.py:open": "mnist, classified",
    "datasets/members.py:read": "zip in a tar",
    "datasets/narratives.py:_read": "Localized Narratives",
    "datasets/packed.py:json": "LVIS",
    "datasets/pixel_files.py:entries": "mnist, classified",
    "datasets/pixel_files.py:pixels": "fer2013, classified",
    "datasets/prepare.py:_check_folder": "none: tests/datasets/test_prepare.py",
    "datasets/prepare.py:_finish": "none: copies what was just written",
    "datasets/prepare.py:_load_job": "none: written anew by each call",
    "datasets/prepare.py:_plan": "none: tests/datasets/test_prepare.py",
    "datasets/prepare.py:_prepare_split": "none: the sentence of a worker",
    "datasets/prepare.py:_read_entries": "none: tests/datasets/test_prepare.py",
    "datasets/prepare.py:_read_mark": "none: tests/datasets/test_prepare.py",
    "datasets/prepare.py:_whole_file": "none: makes a file durable",
    "demo.py:_run": "none: a run's or published weights",
    "evals/box_files.py:read_annotations": "annotations",
    "evals/box_files.py:read_boxes": "boxes",
    "experiment/box_classes.py:classify_boxes": "journal",
    "experiment/features.py:kept_features": "features",
    "experiment/load.py:read_classes": "classes.json",
    "experiment/load.py:read_words": "words.json",
    "experiment/mask_files.py:read_mask_list": "JSON of masks",
    "experiment/mask_files.py:read_masks": "masks of an image",
    "experiment/paper_report.py:_lines": "scores of a suite",
    "experiment/paper_report.py:read_run": "config.json of a run",
    "experiment/paper_report.py:read_scores": "summary.json of a report",
    "experiment/paper_report.py:read_suite_scores": "scores of a suite",
    "experiment/run.py:_read_summary": "summary.json",
    "experiment/scores.py:read_suite": "suite",
    "experiment/scores.py:score_suite": "journal",
    "experiment/stages.py:_hash": "none: a config in memory",
    "experiment/stages.py:check_finished": "stage.json",
    "experiment/stages.py:kept": "none: a config in memory",
    "export.py:_run": "none: a run's or published weights",
    "export.py:load": "none: a run's or published weights",
    "files.py:_lock": "none: the holder's name is taken as it is",
    "files.py:_sums": "sums of a checkpoint",
    "files.py:checksum": "arrays of a checkpoint",
    "files.py:read_recorded": "config.json of a run",
    "inference/command.py:_loader": "none: a run's or published weights",
    "inference/command.py:load": "none: a run's or published weights",
    "inference/export.py:to_folder": "none: a class list in memory",
    "inference/folder.py:_listed": "list of paths",
    "inference/folder.py:image_files": "journal",
    "inference/folder.py:segment_files": "journal",
    "inference/kept_texts.py:_head": "none: the bytes are hashed",
    "inference/kept_texts.py:digest": "none: the bytes are hashed",
    "inference/pictures.py:_prompt_points": "none: read_json and numbers",
    "inference/pseudo_masks.py:label_source": "none: a request in memory",
    "page/answers.py:download": "none: writes a zip",
    "pretrained/files.py:_header": "safetensors",
    "pretrained/files.py:_npz": "npz",
    "pretrained/files.py:_pickled": "detectron2's pickle",
    "pretrained/files.py:_safetensors": "safetensors",
    "pretrained/files.py:_shards": "index of shards",
    "pretrained/files.py:_torch": "PyTorch's zip",
    "pretrained/files.py:npz_names": "npz",
    "pretrained/hub.py:_copied": "none: copies bytes",
    "pretrained/stated.py:check": "none: a description in memory",
    "pretrained/stated.py:read_config": "config.json beside weights",
    "reading.py:open_binary": "arrays of a checkpoint",
    "reading.py:parse_json": "captions.jsonl",
    "reading.py:read_bytes": "sums of a checkpoint",
    "reading.py:read_json": "segments.json",
    "reading.py:read_lines": "label file",
    "reading.py:read_npz": "vectors",
    "reading.py:read_text": "CLIP's merges.txt",
    "reading.py:tar_files": "zip in a tar",
    "scoring/answers.py:read_answers": "answers as JSON",
    "scoring/detections.py:read_results": "results",
    "scoring/files.py:read_list": "list of images",
    "scoring/panoptic.py:read_panoptic": "panoptic results",
    "scoring/retrieval.py:_read_owners": "image of each text",
    "scoring/retrieval.py:_read_scores": "vectors of images and texts",
    "torch/segmenter.py:__init__": "config.json of an exported model",
    "torch/segmenter.py:load": "config.json of an exported model",
    "torch/segmenter.py:read_json": "config.json of an exported model",
    "towers/prompt_file.py:_listing": "prompt",
    "towers/prompt_file.py:_original": "original prompt",
    "towers/templates.py:read_templates": "templates",
    "train/checkpoints.py:find_damage": "sums of a checkpoint",
    "train/checkpoints.py:read_config": "config.json of a run",
    "train/checkpoints.py:read_sums": "none: the checkpoint's checksums are looked at before",
    "train/checkpoints.py:write_config": "none: compares bytes",
    "train/metrics.py:__init__": "none: an identifier, which Weights & Biases checks",
    "train/metrics.py:_readable": "metrics.jsonl of a restart",
    "train/metrics.py:read_metrics": "metrics.jsonl",
    "viz/curves.py:_read": "metrics.jsonl of curves",
    "vocab/class_files.py:_read_lines": "class list",
    "vocab/class_files.py:read_class_file": "categories",
    "vocab/classes.py:from_json": "classes.json",
    "vocab/classes.py:read_label_file": "label file",
    "vocab/classes.py:read_words": "label file",
    "vocab/splits.py:read_categories": "split",
    "vocab/tokenizers.py:_load": "BERT's vocab.txt",
    "vocab/tokenizers.py:_read_bpe": "CLIP's merges",
    "vocab/tokenizers.py:_sentencepiece": "SigLIP's model",
    "vocab/tokenizers.py:_tokenizer_json": "CLIP's tokenizer.json",
    "vocab/tokenizers.py:save": "none: copies bytes",
    "vocab/vectors.py:_ids": "vectors",
    "vocab/vectors.py:read_vectors": "vectors",
    "vocab/words.py:load": "list of words",
}


def opens_a_file(call: ast.Call) -> bool:
    """Whether a call reads a file, or parses what was read of one."""
    name = ast.unparse(call.func)
    own = "read_text read_bytes open_binary read_json read_lines read_npz read_recorded parse_json"
    own += " memmap deserialize loads Journal ZipFile GzipFile fromstring DictReader from_pretrained"
    if name.split(".")[-1] in own.split() or name in ("np.load", "torch.load", "torch.jit.load", "json.load"):
        return True
    modes = {
        str(arg.value)
        for arg in [*call.args, *(k.value for k in call.keywords)]
        if isinstance(arg, ast.Constant)
    }
    return name.split(".")[-1] == "open" and not modes & {"w", "wb", "a", "ab", "x"}


def functions_that_open_files() -> set[str]:
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)
        ]
        for function in functions:
            if any(isinstance(n, ast.Call) and opens_a_file(n) for n in ast.walk(function)):
                found.add(f"{path.relative_to(PACKAGE)}:{function.name}")
    return found


def test_every_function_that_opens_a_file_is_tried_here():
    found = functions_that_open_files()
    assert found == OPENERS.keys(), "put what is new into READERS and OPENERS"
    unknown = {name for name, by in OPENERS.items() if by not in READERS and not by.startswith("none: ")}
    assert not unknown
