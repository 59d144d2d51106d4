"""Image-text retrieval on COCO and Flickr30k, in the splits of Karpathy and Fei-Fei (CVPR 2015)."""

import posixpath
from collections.abc import Iterator
from typing import Any

from ovseg_jax.datasets.base import Download, Entry, Option
from ovseg_jax.datasets.packed import MISSING, Packed
from ovseg_jax.reading import column, objects, reading, text, whole

_JSON = Download(
    "caption_datasets.zip",
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    "dataset_coco.json and dataset_flickr30k.json",
)


class _Karpathy(Packed):
    listing: str
    provides = frozenset({"image", "captions"})
    splits = ("train", "val", "test")

    def entries(self, split: str) -> Iterator[Entry]:
        """Yields the images of a split with their captions, in the order of the listing."""
        self.check_split(split)
        name = self.need(self.listing)
        data = self.json(name)
        with reading(self.members.where(name)):
            rows = objects(data["images"], "'images'")
            parts = column(rows, "split", text, of="image")
            chosen = [row for row, part in zip(rows, parts, strict=True) if part in self._parts(split)]
            files = column(chosen, "filename", text, of="image")
            sentences = [objects(row["sentences"], "'sentences'") for row in chosen]
            captions = [
                [" ".join(raw.split()) for raw in column(own, "raw", text, of="sentence")]
                for own in sentences
            ]
            numbers = column(chosen, "cocoid", whole, default=None, of="image")
        images = {posixpath.basename(path): path for path in self.members.names(suffix=".jpg")}
        known = {}
        for file, number in zip(files, numbers, strict=True):
            # COCO 2017 holds the same images as 2014, under other names.
            path = images.get(file) or (images.get(f"{number:012d}.jpg") if number is not None else None)
            if path is not None:
                known[file] = path
        there = set(self.present(split, files, known))
        for file, own in zip(files, captions, strict=True):
            if file in there:
                yield Entry(file.removesuffix(".jpg"), {"image": known[file], "captions": own})

    def _parts(self, split: str) -> tuple[str, ...]:
        return (split,)

    def example(self, split: str, entry: Entry) -> dict[str, Any]:
        """Returns `image` and `captions` of an image."""
        return {"image": self.members.read(entry.data["image"]), "captions": entry.data["captions"]}


class CocoRetrieval(_Karpathy):
    """COCO with five captions an image or more; 1,000 of its 5,000 test images are the "1K" test of some papers."""

    name = "coco_retrieval"
    about = (
        "113,287 training, 5,000 validation and 5,000 test images of COCO 2014, with at least 5 captions each"
    )
    homepage = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
    licence = "captions: CC BY 4.0; images: Flickr's terms of use, each with a licence of its own"
    download = (
        _JSON,
        Download(
            "train2014.zip and val2014.zip",
            "http://images.cocodataset.org/zips/",
            "or train2017.zip, val2017.zip",
        ),
    )
    options = (
        Option("restval", ("train", "leave_out"), "the 30,504 images of val2014 that are in no other split"),
        MISSING,
    )
    listing = "dataset_coco.json"
    archives = ("caption_datasets.zip", "train2014.zip", "val2014.zip", "train2017.zip", "val2017.zip")

    def _parts(self, split: str) -> tuple[str, ...]:
        return ("train", "restval") if split == "train" and self.chosen["restval"] == "train" else (split,)


class Flickr30kRetrieval(_Karpathy):
    """Flickr30k with five captions an image."""

    name = "flickr30k_retrieval"
    about = "29,000 training, 1,014 validation and 1,000 test images with 5 captions each"
    homepage = "https://shannon.cs.illinois.edu/DenotationGraph/"
    licence = (
        "for non-commercial research and education (a form on the homepage); images: Flickr's terms of use"
    )
    download = (_JSON, Download("flickr30k-images.tar.gz", homepage, "images, after a form"))
    options = (MISSING,)
    listing = "dataset_flickr30k.json"
    archives = ("caption_datasets.zip", "flickr30k*.zip", "flickr30k*.tar", "flickr30k*.tar.gz")
