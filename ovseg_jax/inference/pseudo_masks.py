"""Pseudo-masks: a teacher's proposals as non-overlapping segments of each image.

`label_folder` writes a PNG for each image of a user's folder. `label_source` writes shards for any source: each
process labels its part of them on all its devices, and a shard that exists is not made again.
"""

import concurrent.futures
import dataclasses
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int32
from tqdm import tqdm

from ovseg_jax.data.images import encode_mask, list_images, read_image
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.pseudo_masks import (
    ANY_SHARD,
    BINS,
    DOUBLE,
    KEPT,
    SMALL,
    UNSURE,
    PseudoMasks,
    Rules,
    Shard,
    Statistics,
    read_shard,
    shard_name,
    write_shard,
)
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked, write_whole
from ovseg_jax.inference.folder import ImageReader
from ovseg_jax.inference.result import sigmoid
from ovseg_jax.inference.segmenter import Batch, Segmenter
from ovseg_jax.inference.tiles import upsampling_matrix
from ovseg_jax.viz.segments import write_sheet
from ovseg_jax.vocab.classes import ClassList

SHARD_SIZE = 256  # images: some megabytes, some seconds to some minutes of a device
SHEET = 16  # images


class Labelled(NamedTuple):
    """What `label_folder` or `label_source` did.

    Attributes:
      written: the number of images that got masks.
      there: the number of those that had some.
      skipped: the number of images that could not be read.
      statistics: of the written ones; in `label_source` of all.
    """

    written: int
    there: int
    skipped: int
    statistics: Statistics


def choose(
    logits: Float[Array, "n h w"], cells: Int32[Array, " 2"], rules: Rules
) -> tuple[Int32[Array, " n"], Float[Array, " n"]]:
    """Applies the rules to the proposals of one image, the most confident first (mask NMS).

    Args:
      logits: of the proposals.
      cells: the height and width of the image on their grid, from the upper left corner; the rest is padding.
      rules: the rules.

    Returns:
      The outcome of each proposal, KEPT or the reason why it is dropped, and its confidence.
    """
    inside = (jnp.arange(logits.shape[1]) < cells[0])[:, None] & (jnp.arange(logits.shape[2]) < cells[1])
    probability = jax.nn.sigmoid(logits.astype(jnp.float32))
    binary = ((probability > rules.threshold) & inside).reshape(len(logits), -1).astype(jnp.float32)
    area = binary.sum(1)
    confidence = (probability.reshape(binary.shape) * binary).sum(1) / jnp.maximum(area, 1)
    outcome = jnp.where(confidence < rules.min_confidence, UNSURE, KEPT)
    outcome = jnp.where((area < 1) | (area < rules.min_area * inside.sum()), SMALL, outcome)
    order = jnp.argsort(-confidence, stable=True)
    overlap = (binary @ binary.T)[order][:, order]
    iou = overlap / jnp.maximum(area[order, None] + area[order] - overlap, 1)

    def judge(outcome: Int32[Array, " n"], i: Array) -> tuple[Int32[Array, " n"], None]:
        doubles = (iou[i] > rules.max_overlap) & (jnp.arange(len(logits)) > i) & (outcome == KEPT)
        return jnp.where((outcome[i] == KEPT) & doubles, DOUBLE, outcome), None

    judged, _ = jax.lax.scan(judge, outcome[order], jnp.arange(len(logits)))
    return outcome.at[order].set(judged), confidence


@partial(jax.jit, static_argnames="rules")
def _choose_all(logits: Array, cells: Array, rules: Rules) -> Any:
    return jax.vmap(partial(choose, rules=rules))(logits, cells)


class Image(NamedTuple):
    """The labels of one image.

    Attributes:
      segments: at the image's size: the chosen proposals, or the classes of a label map, numbered from 1; 0 is void.
      statistics: of the image.
    """

    segments: Int32[np.ndarray, "H W"]
    statistics: Statistics


Label = Callable[[Any, Iterable[Any]], Iterator[Image]]
"""A function that labels images by a teacher, in their order."""


def label_images(segmenter: Segmenter, images: Iterable[Any], rules: Rules) -> Iterator[Image]:
    """Labels images, see `read_image` for their forms; devices and processor work at the same time.

    Raises:
      UserError: the teacher is a per-pixel model without proposals.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting: deque[Iterator[Image]] = deque()
        for batch in segmenter.stream_batches(images):
            work = [*_chosen(batch, segmenter.canvas, rules)]
            waiting.append(pool.map(_paint, *zip(*work, strict=True)))
            if len(waiting) > 1:
                yield from waiting.popleft()
        for rest in waiting:
            yield from rest


def _chosen(batch: Batch, canvas: int, rules: Rules) -> Iterator[tuple[Any, ...]]:
    """Applies the rules to a batch; yields the arguments of `_paint` for each image."""
    logits = batch.prediction.mask_logits
    if logits is None:
        raise UserError(
            "the teacher is a per-pixel model without mask proposals: use an OpenSeg run as teacher"
        )
    stride = canvas // logits.shape[2]
    cells = np.full((len(logits), 2), logits.shape[2], np.int32)
    cells[: len(batch.fitted)] = -(-np.array(batch.fitted) // stride)
    logits, judged = jax.device_get((logits, _choose_all(logits, cells, rules)))
    for i, (size, fitted) in enumerate(zip(batch.sizes, batch.fitted, strict=True)):
        outcome, confidence = (x[i] for x in judged)
        kept = np.asarray(logits[i, outcome == KEPT, : cells[i, 0], : cells[i, 1]], np.float32)
        yield kept, confidence[outcome == KEPT], outcome, size, fitted, stride, rules


def _paint(
    logits: Float[np.ndarray, "n h w"],
    confidence: Float[np.ndarray, " n"],
    outcome: Int32[np.ndarray, " m"],
    size: tuple[int, int],
    fitted: tuple[int, int],
    stride: int,
    rules: Rules,
) -> Image:
    """Draws the chosen masks, small ones in front, so that a part is not covered by its surroundings."""
    axes = zip(size, logits.shape[1:], fitted, strict=True)
    rows, columns = (upsampling_matrix(pixels, n, n * stride, fit) for pixels, n, fit in axes)
    masks = sigmoid(np.einsum("Hh,nhw,Ww->nHW", rows, logits, columns, optimize=True)) > rules.threshold
    area = masks.sum((1, 2))
    order = np.argsort(-area, kind="stable")
    drawn = np.zeros(size, np.int32)
    for number, mask in enumerate(masks[order], 1):
        drawn[mask] = number
    visible = np.bincount(drawn.ravel(), minlength=len(masks) + 1)[1:]
    kept = visible >= np.maximum(rules.min_visible * area[order], 1)
    segments = np.append(0, np.cumsum(kept) * kept)[drawn].astype(np.int32)
    bins = np.minimum((confidence[order][kept] * BINS).astype(int), BINS - 1)
    dropped = [int((outcome == reason).sum()) for reason in (SMALL, UNSURE, DOUBLE)]
    return Image(
        segments,
        Statistics(
            images=1,
            masks=[0] * int(kept.sum()) + [1],
            confidence=np.bincount(bins, minlength=BINS).tolist(),
            dropped=[*dropped, int((~kept).sum())],
            covered=float((segments > 0).mean()),
        ),
    )


def label_folder(load: Callable[[], Segmenter], root: epath.PathLike, rules: Rules) -> Labelled:
    """Writes ROOT/masks/NAME.png for each image ROOT/images/NAME.* that has no mask, and ROOT/pseudo_masks.png.

    Args:
      load: loads the teacher; called only if an image is left to label.
      root: a folder in the layout of `data.sources.folder`.
      rules: the masks to keep.

    Raises:
      UserError: a rule is invalid, there are no images, two of them share a mask's name, or a mask cannot be written.
    """
    rules.check()
    root = epath.Path(root)
    images, masks = root / "images", root / "masks"
    if not images.is_dir():
        raise UserError(f"--data_dir={root} has no folder images/")
    files = list_images(images)
    if not files:
        raise UserError(f"{images} holds no readable image")
    by_stem: dict[str, epath.Path] = {}
    for path in files:
        if (other := by_stem.setdefault(path.stem, path)) != path:
            raise UserError(f"{images}: {other.name} and {path.name} would share the mask {path.stem}.png")
    with locked(root):
        masks.mkdir(exist_ok=True)
        done = {path.stem for path in list_images(masks)}
        reader = ImageReader([path for path in files if path.stem not in done])
        there, found = len(files) - len(reader.files), Statistics()
        shown: list[tuple[epath.Path, np.ndarray]] = []
        if reader.files:
            with tqdm(total=len(files), initial=there, unit="image", disable=None) as bar:
                reader.report = lambda error: (bar.update(), bar.write(f"skipped: {error}", sys.stderr))
                for image in label_images(load(), reader, rules):
                    path, _ = reader.done.popleft()
                    write_whole(masks / f"{path.stem}.png", encode_mask(image.segments))
                    found += image.statistics
                    shown += [(path, image.segments)] if len(shown) < SHEET else []
                    bar.update()
            if shown:
                write_sheet(root / "pseudo_masks.png", [(read_image(path), drawn) for path, drawn in shown])
    return Labelled(found.images, there, reader.skipped, found)


def label_source(
    load: Callable[[], Any],
    source: Source,
    out: epath.PathLike,
    label: Label,
    request: Mapping[str, Any],
    *,
    shard_size: int = SHARD_SIZE,
    classes: ClassList | None = None,
) -> Labelled:
    """Labels the images of a source into shards, which `data.sources.pseudo_masks` reads.

    All processes call this, and process p makes shards p, p + process_count, ... A shard is written whole; one that
    exists and has all its images is left as it is. At the end the first process writes statistics.json, and sheet.png
    with some of the images.

    Args:
      load: loads the teacher, any first argument of `label`, onto this process's devices.
      source: provides the images.
      out: the folder for the shards.
      label: labels images by the teacher.
      request: what the labels depend on, as plain values; kept in each shard.
      shard_size: number of images of a shard.
      classes: of label maps; None for masks without classes.

    Returns:
      The counts over all processes.

    Raises:
      UserError: `shard_size` is less than 1, an existing shard was made by another request, or another process failed.
    """
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size} is less than 1")
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(source), shard_size)
    paths = [out / shard_name(k, len(starts)) for k in range(len(starts))]
    request = json.loads(json.dumps({**request, "shard_size": shard_size}))
    problem, written = None, 0
    try:
        mine = range(jax.process_index(), len(paths), jax.process_count())
        indices = {k: range(starts[k], min(starts[k] + shard_size, len(source))) for k in mine}
        todo = [k for k in mine if not _is_finished(paths[k], source, indices[k], request)]
        # Several processes read a checkpoint together, even if one has nothing left to do.
        teacher = load() if todo or jax.process_count() > 1 else None
        size, left = (sum(len(indices[k]) for k in some) for some in (mine, todo))
        quiet = None if jax.process_index() == 0 else True
        with tqdm(total=size, initial=size - left, unit="image", disable=quiet, dynamic_ncols=True) as bar:
            for k in todo:
                assert teacher is not None
                written += _write_shard(
                    paths[k], partial(label, teacher), source, indices[k], request, classes, bar
                )
    except UserError as error:
        problem = error
    failed, counts = np.array(problem is not None), np.array(written)
    if jax.process_count() > 1:
        failed, counts = multihost_utils.process_allgather((failed, counts))
    if failed.any():
        raise problem or UserError("another process could not write its pseudo-masks, see its message")
    shards = [read_shard(path) for path in paths]
    found = sum((shard.statistics for shard in shards), Statistics())
    if jax.process_index() == 0:
        for path in set(out.glob(ANY_SHARD)) - set(paths):
            path.unlink()  # It is of a source with another number of images.
        write_whole(out / "statistics.json", json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        _write_sheet(
            out / "sheet.png", PseudoMasks(source, out), [i for shard in shards for i in shard.skipped]
        )
    written = int(counts.sum())
    return Labelled(written, found.images - written, len(source) - found.images, found)


def label_stage(
    folder: epath.Path,
    *,
    teacher: str,
    source: Mapping[str, Any],
    threshold: float = Rules().threshold,
    min_area: float = Rules().min_area,
    min_confidence: float = Rules().min_confidence,
    max_overlap: float = Rules().max_overlap,
    min_visible: float = Rules().min_visible,
    batch_size: int = 8,
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Runs a stage of kind "pseudo_label": writes masks for the images of a source into FOLDER, see `label_source`.

    `masks="stage:NAME"` of that source reads them, see `data.sources.build`.

    Args:
      folder: the folder of the stage; the other arguments are the keys of its config.
      teacher: a run's folder or "stage:NAME".
      source: as in `data.train`; it may provide masks, which are not read.
      threshold: see `Rules`, as the next four.
      min_area: of a mask.
      min_confidence: of a mask.
      max_overlap: of two masks.
      min_visible: of a mask.
      batch_size: the number of images at once in each process.
      shard_size: the number of images of a shard.

    Raises:
      UserError: an image cannot be read; and see `label_source`.
    """
    images = make_source(source)
    check_provides(images, ("image",), "a stage of kind 'pseudo_label'")
    load = lambda: Segmenter.from_checkpoint(teacher, batch_size=batch_size, devices=jax.local_devices())
    rules = Rules(threshold, min_area, min_confidence, max_overlap, min_visible)
    rules.check()
    request = dict(teacher=str(teacher), source=source, **rules._asdict())
    label = partial(label_images, rules=rules)
    report(label_source(load, images, folder, label, request, shard_size=shard_size), images, folder)
    return {}


def report(done: Labelled, images: Source, folder: epath.Path) -> None:
    """Prints what `label_source` did.

    Raises:
      UserError: some images could not be read.
    """
    if jax.process_index() == 0:
        print(
            f"{done.written} images labelled in {folder}, {done.there} before. {done.statistics}", flush=True
        )
    if done.skipped:
        raise UserError(
            f"{done.skipped} images of {images.name} could not be read: repair or remove them, and run it again"
        )


def _is_finished(
    path: epath.Path, source: Source, indices: Sequence[int], request: Mapping[str, Any]
) -> bool:
    """Tells whether a shard exists with all its images, and these are still those of the source.

    Raises:
      UserError: it was made by another request.
    """
    if not path.exists():
        return False
    shard = read_shard(path)
    before = shard.request
    if different := [key for key in {**request, **before} if request.get(key) != before.get(key)]:
        raise UserError(
            f"{path} was made with another {different[0]}: {before.get(different[0])!r}, not "
            f"{request.get(different[0])!r}; delete {path.parent} to label anew"
        )
    return not shard.skipped and shard.image_ids == _image_ids(source, indices)


def _image_ids(source: Source, indices: Sequence[int]) -> list[str]:
    return [str(source[index]["image_id"]) for index in indices]


def _write_shard(
    path: epath.Path,
    label: Callable[[Iterable[Any]], Iterator[Image]],
    source: Source,
    indices: Sequence[int],
    request: Mapping[str, Any],
    classes: ClassList | None,
    bar: tqdm,
) -> int:
    """Labels some images of a source and writes them as one shard; returns how many could be read."""
    skipped: list[int] = []
    found, masks = Statistics(), {}

    def read(index: int) -> Any:
        try:
            return source[index]["image"]
        except UserError as error:
            return error

    def readable(pool: concurrent.futures.Executor) -> Iterator[np.ndarray]:
        for index, image in zip(indices, pool.map(read, indices), strict=True):
            if isinstance(image, UserError):
                skipped.append(index)
                bar.write(f"skipped: {image}", sys.stderr)
                bar.update()
            else:
                order.append(index)
                yield image

    order: deque[int] = deque()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for labelled in label(readable(pool)):
            index = order.popleft()
            masks[index] = encode_mask(labelled.segments)
            found += labelled.statistics
            bar.update()
    write_shard(path, Shard(dict(request), _image_ids(source, indices), skipped, found, classes), masks)
    return len(masks)


def _write_sheet(path: epath.Path, source: Source, skipped: Sequence[int]) -> None:
    """Draws images from all over the source with their masks."""
    readable = sorted(set(range(len(source))) - set(skipped))
    chosen = [readable[k * len(readable) // SHEET] for k in range(min(SHEET, len(readable)))]
    if chosen:
        write_sheet(path, [(source[i]["image"], source[i]["segments"]) for i in sorted(set(chosen))])
