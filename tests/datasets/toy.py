"""A data set of drawn pictures with every field, which Beam's workers import."""

import io
import json

import numpy as np
from PIL import Image

from ovseg_jax.datasets.base import Dataset, Download, Entry, Option
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.classes import ClassList

SIZES = ((12, 16), (20, 8), (9, 9))


class Toy(Dataset):
    """Reads pictures from toy.json, which holds the number of pictures."""

    name = "toy"
    about = "pictures"
    homepage = "https://example.org"
    licence = "CC0"
    download = (Download("toy.json", "https://example.org/toy.json"),)
    options = (
        Option("texts", ("yes", "no"), "whether there are texts"),
        Option("wide", ("no", "yes"), "16 bits"),
    )
    splits = ("train", "val")
    classes = ClassList((("dog", "hound"), ("sky",), ("sky",)), (7, 3, 9), (True, False, False))

    def __init__(self, source, **options):
        super().__init__(source, **options)
        texts = {"captions", "tags", "region_captions", "region_tags"}
        self.provides = frozenset({"image", "segments", "class_ids", "label"}) | (
            texts if self.chosen["texts"] == "yes" else set()
        )
        self.wide = self.chosen["wide"] == "yes"

    def entries(self, split):
        count = json.loads((self.source / "toy.json").read_text())[split]
        self.notes.append(f"{count} pictures")
        for k in range(count):
            yield Entry(f"{split} {k}", {"k": k})

    def example(self, split, entry):
        return example(self, split, entry.data["k"])


def example(toy, split, k):
    """The fields of one picture: the second of two pictures is a PNG, and the third has no segment."""
    if k == 5 and (toy.source / "broken").exists():
        raise UserError(f"the picture {k} is broken")
    rng = np.random.default_rng([k, split == "val"])
    size = SIZES[k % 3]
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(file, ("JPEG", "PNG")[k % 2])
    count = k % 3
    segments = np.zeros(size, np.int32)
    for row in range(count):
        segments[2 * row : 2 * row + 3, row : row + 4] = row + 1
    found = {
        "image": file.getvalue(),
        "segments": segments,
        "class_ids": np.arange(count, dtype=np.int32) - 1,
        "label": k % 3,
    }
    if "captions" in toy.provides:
        found |= {
            "captions": [f"caption {k}", "über\n\u2028 ein Bild"][: k % 3],
            "tags": ["a"] * (k % 2),
            "region_captions": [[f"region {row}"] * row for row in range(count)],
            "region_tags": [["red", "ball"][: row + 1] for row in range(count)],
        }
    return found
