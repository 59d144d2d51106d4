"""Label maps that a teacher predicts, as training data of another model: self-training (P-Seg+, papers/002, 3.3.4).

The model that was evaluated on a data set labels the images of its training split, by the names of its classes; see
`pseudo_masks.label_source` for the shards, and `data.sources.pseudo_masks` for the source that reads them.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int32

from ovseg_jax.data.source_base import check_provides
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.pseudo_masks import BINS, Statistics
from ovseg_jax.decisions.published import protocol as published
from ovseg_jax.decisions.rules import Decision, decision_of
from ovseg_jax.errors import UserError
from ovseg_jax.inference.pseudo_masks import SHARD_SIZE, Image, label_source, report
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.vocab.classes import ClassList, as_classes, with_names


def label_map_stage(
    folder: epath.Path,
    *,
    teacher: str,
    source: Mapping[str, Any],
    labels: str = "",
    decision: Any = "argmax",
    protocol: str = "",
    background: str = "",
    names: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 8,
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Runs a stage of kind "pseudo_label_maps": writes label maps for the images of a source into FOLDER.

    `masks="stage:NAME"` of that source reads them, see `data.sources.build`. The classes of the label maps have no
    groups "unseen" and "held_out", since they are labelled as all others.

    Args:
      folder: the folder of the stage; the other arguments are the keys of its config.
      teacher: a run's folder or "stage:NAME".
      source: as in `data.train`; it may provide masks, which are not read.
      labels: the classes, see `Segmenter.segment`; by default those of the source.
      decision: see `decisions.rules.decision_of`. Pixels without a category stay unlabelled, so
        dict(type="background_threshold", threshold=X) drops those below a confidence.
      protocol: in place of a decision, a name of `decisions.published.DECISIONS`: sliding windows, and its decision.
      background: the name of a class that is not asked for, but given to pixels without a category; "void" adds one
        with the name "background".
      names: names to ask for in place of a class's own, by its first name.
      batch_size: the number of images at once in each process.
      shard_size: the number of images of a shard.

    Raises:
      UserError: an image cannot be read, there are no classes, no class `background` (or one, with "void"), or the
        decision or protocol is unknown, or both are given; and see `label_source`.
    """
    images = make_source(source)
    check_provides(images, ("image",), "a stage of kind 'pseudo_label_maps'")
    classes = as_classes(labels) if labels else images.classes
    if not len(classes):
        raise UserError(f"the source {images.name} has no classes: give labels=")
    if background == "void":
        if "background" in classes.index:
            raise UserError("background='void' adds a class 'background', which there is: give its name")
        classes, background = classes.and_background(), "background"
    if background and background not in [own[0] for own in classes.names]:
        raise UserError(f"background={background!r} is not one of the classes")
    chosen = decision_of(decision)
    if protocol:
        published(protocol)  # refuses an unknown one
        if chosen != decision_of("argmax"):
            raise UserError(f"protocol={protocol!r} has a decision of its own: leave out decision")
    asked = with_names(classes, dict(names or {}))
    groups = {k: v for k, v in classes.groups.items() if k not in ("unseen", "held_out")}
    load = lambda: Segmenter.from_checkpoint(teacher, batch_size=batch_size, devices=jax.local_devices())
    rule = protocol or [type(chosen).__name__, dataclasses.asdict(chosen)]
    request = dict(
        teacher=str(teacher), source=source, background=background, names=asked.names, decision=rule
    )
    done = label_source(
        load,
        images,
        folder,
        partial(label_maps, classes=asked, decision=chosen, protocol=protocol, background=background),
        request,
        shard_size=shard_size,
        classes=dataclasses.replace(classes, groups=groups, examples=()),
    )
    report(done, images, folder)
    return {}


def label_maps(
    segmenter: Segmenter,
    images: Iterable[Any],
    *,
    classes: ClassList,
    decision: Decision,
    protocol: str = "",
    background: str = "",
) -> Iterator[Image]:
    """Labels the pixels of images with classes, numbered from 1; 0 where there is none.

    Args:
      segmenter: the teacher.
      images: see `read_image` for their forms.
      classes: all classes.
      decision: how scores become categories.
      protocol: see `label_map_stage`, as the next.
      background: of pixels without a category.
    """
    first = [own[0] for own in classes.names]
    kept = [k for k in range(len(classes)) if first[k] != background]
    # The number of each category that is asked for; the last entry is for pixels without one.
    number = np.array([*(k + 1 for k in kept), first.index(background) + 1 if background else 0], np.int32)
    asked = classes.subset(kept)
    maps: Iterable[tuple[Any, Any]] = segmenter.stream_maps(images, asked, decision=decision)
    if protocol:
        whole = segmenter.stream(images, asked, protocol=protocol)
        maps = ((found.label_map, found.confidence) for found in whole)
    for category, confidence in maps:
        segments = number[category]
        yield Image(segments, _statistics(segments, confidence))


def _statistics(segments: Int32[np.ndarray, "h w"], confidence: Float[np.ndarray, "h w"]) -> Statistics:
    """Counts the classes of an image by their mean confidence, which is limited to 0..1."""
    area = np.bincount(segments.ravel())
    area[0] = 0
    mean = np.bincount(segments.ravel(), confidence.ravel())[area > 0] / area[area > 0]
    bins = np.clip((mean * BINS).astype(int), 0, BINS - 1)
    return Statistics(
        images=1,
        masks=[0] * int((area > 0).sum()) + [1],
        confidence=np.bincount(bins, minlength=BINS).tolist(),
        dropped=[0, 0, 0, 0],
        covered=float((segments > 0).mean()),
    )
