"""Examples of a reader, checked and completed, and their form in TensorFlow Datasets."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ovseg_jax.data.images import Encoded, check_image, encode_image
from ovseg_jax.data.source_base import FIELDS, TEXTS
from ovseg_jax.data.transforms import segment_boxes
from ovseg_jax.datasets.base import Dataset
from ovseg_jax.errors import UserError

_REGIONS = ("segments", "boxes", "region_captions", "region_tags")
_ALONG = ("isthing", "iscrowd")


def fields_of(dataset: Dataset) -> frozenset[str]:
    """Returns the fields that are written: those that the reader provides, and boxes where it has segments.

    Raises:
      UserError: the reader names an unknown field, or lacks one that every data set needs.
    """
    provides = frozenset(dataset.provides)
    if unknown := sorted(provides - FIELDS):
        raise UserError(f"{dataset.name} provides an unknown field {unknown[0]!r}")
    if "image" not in provides or (provides.intersection(_REGIONS) and "class_ids" not in provides):
        raise UserError(f"{dataset.name} must provide 'image', and 'class_ids' with any field of segments")
    if "class_ids" in provides and not provides & {"segments", "boxes"}:
        raise UserError(f"{dataset.name} provides 'class_ids' but neither 'segments' nor 'boxes'")
    if "feature" in provides:
        raise UserError(f"{dataset.name} provides 'feature', which cannot be prepared")
    return provides | {"boxes"} if "segments" in provides else provides


def complete(dataset: Dataset, key: str, example: dict[str, Any]) -> dict[str, Any]:
    """Fills in what follows from the other fields, and checks an example against `data.source_base`.

    Args:
      dataset: its reader.
      key: the entry's key, for errors.
      example: the fields that `Dataset.example` returns.

    Returns:
      The fields of `fields_of` with NumPy types, `isthing` and `iscrowd` beside `class_ids`, and `size`, the height and
      width of the upright image.

    Raises:
      UserError: the image is damaged, or a field is missing or does not fit the others.
    """
    where = f"{dataset.name}, example {key}"
    provides = fields_of(dataset)
    if surplus := sorted(example.keys() - provides - {*_ALONG, "image_id"}):
        raise UserError(f"{where}: the reader returns {surplus[0]!r}, which it does not provide")
    if missing := sorted(provides - example.keys() - {"boxes" if "segments" in provides else ""}):
        raise UserError(f"{where}: the reader returns no {missing[0]!r}")
    whole = {k: v for k, v in example.items() if k in provides}
    whole["size"] = size = check_image(Encoded(f"of {where}", example["image"]))
    try:
        if "class_ids" in provides:
            whole |= _regions(dataset, example, size)
        if "label" in provides and not 0 <= int(whole["label"]) < len(dataset.classes):
            raise ValueError(f"the label {whole['label']} is none of its {len(dataset.classes)} classes")
        for field in provides.intersection(TEXTS):
            _check_texts(field, whole[field], len(whole["class_ids"]) if field[:6] == "region" else None)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return whole


def _regions(dataset: Dataset, example: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    class_ids = np.asarray(example["class_ids"], np.int32).reshape(-1)
    count, total = len(class_ids), len(dataset.classes)
    if ((class_ids < -1) | (class_ids >= total)).any():
        raise ValueError(f"class_ids has a value outside -1..{total - 1}")
    found: dict[str, Any] = {
        "class_ids": class_ids,
        "isthing": np.array([*dataset.classes.isthing, True], bool)[class_ids],
        "iscrowd": np.zeros(count, bool),
    }
    found |= {key: np.asarray(example[key], bool) for key in _ALONG if key in example}
    if "segments" in example:
        segments = found["segments"] = np.asarray(example["segments"])
        if segments.shape != size:
            raise ValueError(f"its segments are {segments.shape} but the upright image is {size}")
        if segments.min(initial=0) < 0 or segments.max(initial=0) > count:
            raise ValueError(f"its segments have values outside 0..{count}")
        if count > (65535 if dataset.wide else 255):
            raise ValueError(f"it has {count} segments: set `wide` in the reader, for at most 65535")
        found["boxes"] = segment_boxes(segments.astype(np.int32), count)
    if "boxes" in example:
        found["boxes"] = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    if not np.isfinite(found["boxes"]).all():
        raise ValueError("a box is not finite")
    if wrong := [key for key in (*_ALONG, "boxes") if len(found[key]) != count]:
        raise ValueError(f"{wrong[0]} has {len(found[wrong[0]])} rows for {count} segments")
    return found


def _check_texts(field: str, value: Any, count: int | None) -> None:
    if count is not None and len(value) != count:
        raise ValueError(f"{field} has {len(value)} lists for {count} segments")
    for own in value if count is not None else [value]:
        if not isinstance(own, list | tuple) or not all(isinstance(item, str) for item in own):
            raise ValueError(f"{field}: expected a list of texts, got {own!r:.60}")


def tfds_features(dataset: Dataset) -> Any:
    """Returns the `tfds.features.FeaturesDict` of a data set.

    TensorFlow Datasets needs TensorFlow to write nested lists, so texts of regions are one list, with the number of
    each segment's texts in `region_captions_count`.
    """
    import tensorflow_datasets as tfds

    make, provides = tfds.features, fields_of(dataset)
    count = Counter(dataset.classes.display(k) for k in range(len(dataset.classes)))
    names = [
        name if count[name] == 1 else f"{name} ({dataset.classes.ids[k]})"
        for k, name in enumerate(map(dataset.classes.display, range(len(dataset.classes))))
    ]
    label = make.ClassLabel(names=names) if names else make.Scalar(np.int32)
    kinds: dict[str, Any] = {
        "image": make.Image(shape=(None, None, 3), doc="The published file, unchanged."),
        "segments": make.Image(
            shape=(None, None, 1),
            dtype=np.uint16 if dataset.wide else np.uint8,
            encoding_format="png",
            doc="0 is void, else the 1-based row of the segment in the other features.",
        ),
        "class_ids": make.Sequence(label, doc="-1 means unlabelled."),
        "boxes": make.Sequence(
            make.Tensor(shape=(4,), dtype=np.float32), doc="(x0, y0, x1, y1) in pixels, exclusive ends."
        ),
        "label": label,
    }
    kinds |= {key: make.Sequence(make.Scalar(np.bool_)) for key in _ALONG}
    kinds |= {key: make.Sequence(make.Text()) for key in TEXTS}
    chosen = {key: kinds[key] for key in provides}
    if "class_ids" in provides:
        chosen |= {key: kinds[key] for key in _ALONG}
    for key in provides & {"region_captions", "region_tags"}:
        chosen[f"{key}_count"] = make.Sequence(
            make.Scalar(np.int32), doc=f"The number of {key} of each segment."
        )
    return make.FeaturesDict({"image_id": make.Text(), **dict(sorted(chosen.items()))})


def encode(key: str, example: dict[str, Any], wide: bool) -> dict[str, Any]:
    """Returns a completed example as `tfds_features` encodes it, with the segments as a PNG."""
    encoded = {k: v for k, v in example.items() if k != "size"} | {"image_id": key}
    encoded["image"] = io.BytesIO(example["image"])
    if "segments" in example:
        segments = example["segments"].astype(np.uint16 if wide else np.uint8)
        encoded["segments"] = io.BytesIO(encode_image(segments))
    for field in ("region_captions", "region_tags"):
        if field in example:
            encoded[field] = [text for own in example[field] for text in own]
            encoded[f"{field}_count"] = [len(own) for own in example[field]]
    return encoded


def serializer(features: Any) -> Callable[[dict[str, Any]], bytes]:
    """Returns a function from the result of `encode` to the bytes that TensorFlow Datasets stores.

    Unlike `features.serialize_example` it writes the features in one order, so that equal examples have equal bytes.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    inner = ExampleSerializer(features.get_serialized_info())
    return lambda example: inner.get_tf_example(features.encode_example(example)).SerializeToString(
        deterministic=True
    )
