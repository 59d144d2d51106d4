"""Localized Narratives: one long caption or more for each image of COCO, Flickr30k and Open Images."""

import json
import posixpath
from collections.abc import Iterator
from typing import Any

from etils import epath

from ovseg_jax.datasets.base import Download, Entry, Option
from ovseg_jax.datasets.packed import MISSING, Packed
from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading, short, text

_BASE = "https://storage.googleapis.com/localized-narratives/annotations"


class LocalizedNarratives(Packed):
    """Localized Narratives of one image collection; the narratives of an image are its captions.

    OpenSeg (papers/004, section 4.1) leaves out the part on ADE20K, whose images it evaluates on, and so does this
    reader.
    """

    name = "localized_narratives"
    about = "134,272 narratives of COCO's training images, 30,546 of Flickr30k's, 507,444 of Open Images'"
    homepage = "https://google.github.io/localized-narratives/"
    licence = (
        "narratives: CC BY 4.0; images: those of COCO, Flickr30k (research only) and Open Images (CC BY 2.0)"
    )
    download = (
        Download("coco_train_localized_narratives-00000-of-00004.jsonl", f"{_BASE}/", "and its other parts"),
        Download(
            "coco_train_captions.jsonl",
            f"{_BASE}/",
            "or these, without traces, in their place; of each collection and split",
        ),
        Download("train2017.zip and val2017.zip", "http://images.cocodataset.org/zips/", "images=coco"),
        Download(
            "flickr30k-images.tar.gz", "https://shannon.cs.illinois.edu/DenotationGraph/", "images=flickr30k"
        ),
        Download(
            "train_0.tar.gz and others",
            "https://github.com/cvdfoundation/open-images-dataset",
            "images=open_images",
        ),
    )
    options = (
        Option("images", ("coco", "flickr30k", "open_images"), "the image collection"),
        MISSING,
    )
    splits: tuple[str, ...] = ("train", "val", "test")
    provides = frozenset({"image", "captions"})
    archives = (
        "train2017.zip val2017.zip flickr30k*.zip flickr30k*.tar flickr30k*.tar.gz train_*.tar.gz train_*.tar "
        "validation.tar.gz validation.tar test.tar.gz test.tar"
    ).split()

    def __init__(self, source: epath.PathLike, **options: str):
        if options.get("images") == "ade20k":
            raise UserError(
                "localized_narratives: the part on ADE20K is not read, since its images are those of the benchmark "
                "(papers/004, section 4.1)"
            )
        super().__init__(source, **options)
        if self.chosen["images"] == "coco":
            self.splits = ("train", "val")

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images that have a narrative, with all of them."""
        self.check_split(split)
        collection = self.chosen["images"]
        spelt = "validation" if (collection, split) == ("open_images", "val") else split
        start = f"{collection}_{spelt}"
        listings = [
            name for name in self.members.names(suffix=".jsonl") if _base(name).startswith(f"{start}_")
        ]
        if whole := [name for name in listings if "localized_narratives" in _base(name)]:
            _check_parts(whole, str(self.source))
        else:
            whole = [name for name in listings if "captions" in _base(name)]
        if not whole:
            raise UserError(self._missing(f"{start}_localized_narratives.jsonl"))
        captions: dict[str, list[str]] = {}
        for name in whole:
            self._read(name, captions)
        known = {posixpath.splitext(_base(path))[0]: path for path in self.members.names(suffix=".jpg")}
        wanted = {key: f"{int(key):012d}" if collection == "coco" else key for key in captions}
        there = set(self.present(split, wanted.values(), known))
        for key in sorted(captions):
            if wanted[key] in there:
                yield Entry(key, {"image": known[wanted[key]], "captions": captions[key]})

    def _read(self, name: str, captions: dict[str, list[str]]) -> None:
        where = self.members.where(name)
        for number, line in enumerate(self.lines(name), 1):
            with reading(f"{where}, line {number},"):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {short(row)}")
                key = text(row["image_id"], "'image_id'")
                if self.chosen["images"] == "coco" and not (key.isdecimal() and len(key) <= 12):
                    raise ValueError(f"'image_id': {short(key)} is no number of COCO")
                caption = " ".join(text(row["caption"], "'caption'").split())
            if caption:
                captions.setdefault(key, []).append(caption)

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `captions` of an image."""
        return {"image": self.members.read(entry.data["image"]), "captions": entry.data["captions"]}


def _base(name: str) -> str:
    return posixpath.basename(name)


def _check_parts(names: list[str], source: str) -> None:
    """Raises a UserError if a listing that is published in parts, NAME-00000-of-00004.jsonl, lacks one."""
    parts = [_base(name).removesuffix(".jsonl").rpartition("-of-") for name in names]
    counts = {int(count) for _, mark, count in parts if mark and count.isdecimal()}
    if counts and counts != {len(names)}:
        raise UserError(
            f"{source} holds {len(names)} of {max(counts)} parts, such as {_base(names[0])}: get the others"
        )
