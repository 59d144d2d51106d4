"""Pseudo-masks in shards, as the segments of the images of a source.

A shard is a zip archive of consecutive examples: shard.json, and for each image INDEX.png, whose values number its
segments from 1, 0 = void. `inference.pseudo_masks` writes them.
"""

import io
import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from ovseg_jax.data.images import read_mask
from ovseg_jax.data.source_base import Example, Extent, Source, Wrapped, replaced
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.errors import UserError
from ovseg_jax.reading import reading

FACTS = "shard.json"
_FIELDS = ("segments", "class_ids", "boxes")


def shard_name(number: int, count: int) -> str:
    """Returns the file name of a shard."""
    return f"masks-{number:05d}-of-{count:05d}.zip"


def shard_content(masks: Mapping[int, bytes], facts: Mapping[str, Any]) -> bytes:
    """Returns the content of a shard.

    Args:
      masks: the PNG of each image by its index in the source.
      facts: plain values, among them `first`, the index of the first image, `image_ids` of all images and `skipped`,
        the indices of those without a mask.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(FACTS, json.dumps(facts))
        for index, png in masks.items():
            archive.writestr(f"{index}.png", png)
    return content.getvalue()


def read_facts(path: epath.PathLike) -> dict[str, Any]:
    """Reads shard.json of a shard.

    Raises:
      UserError: the file is damaged.
    """
    with reading(path, "the pseudo-masks"), epath.Path(path).open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            facts = json.loads(archive.read(FACTS))
        first, ids, skipped = facts["first"], facts["image_ids"], facts["skipped"]
        if not (type(first) is int and first >= 0 and isinstance(skipped, list)):
            raise ValueError("first or skipped in shard.json is not valid")
        if not (isinstance(ids, list) and ids and all(isinstance(name, str) for name in ids)):
            raise ValueError("image_ids in shard.json is not a list of names")
    return facts
