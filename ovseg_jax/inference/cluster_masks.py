"""Pseudo-masks made before training: the clusters of each image (papers/002, 3.3.1) in shards, as segments of a source.

A method that calls `models.pseudo_masks` in its step clusters each image anew after augmentation, as the paper's
pseudo-code does. Here an image is clustered once, and flips and crops then move its masks as any segments.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from ovseg_jax.data.images import fit_canvas, read_image
from ovseg_jax.data.source_base import check_provides
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.pseudo_masks import BINS, HIDDEN, Statistics
from ovseg_jax.errors import UserError
from ovseg_jax.inference.pseudo_masks import SHARD_SIZE, Image, label_source, report
from ovseg_jax.models.pseudo_masks import PseudoMaskGenerator, build_generator
from ovseg_jax.parallel.sharding import batch_sharding, make_mesh, replicated
from ovseg_jax.pretrained.generator import generator_weights
from ovseg_jax.protocols import Variables


def cluster_images(
    generator: PseudoMaskGenerator,
    variables: Variables,
    size: int,
    images: Iterable[Any],
    *,
    batch_size: int = 8,
    devices: Sequence[jax.Device] = (),
) -> Iterator[Image]:
    """Clusters images, see `read_image` for their forms; several devices share each batch.

    An image is scaled to fit a square of `size` pixels; its segments are scaled back by nearest neighbour. In the
    statistics every cluster has the confidence 1.
    """
    mesh = make_mesh(devices=devices) if len(devices) > 1 else None
    batch_size = -(-batch_size // max(len(devices), 1)) * max(len(devices), 1)
    where = mesh and batch_sharding(mesh)
    variables = jax.device_put(variables, mesh and replicated(mesh))
    segments = jax.jit(functools.partial(generator.apply, method="segments"))

    def start(images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> tuple[Any, ...]:
        canvases = np.zeros((batch_size, size, size, 3), np.uint8)
        sizes = np.zeros((batch_size, 2), np.int32)
        for i, image in enumerate(images):
            canvases[i], sizes[i] = fit_canvas(image, size)
        return segments(variables, *jax.device_put((canvases, sizes), where)), sizes, images

    def finish(labels: Any, sizes: np.ndarray, images: Sequence[np.ndarray]) -> Iterator[Image]:
        for own, fitted, image in zip(np.asarray(labels), sizes, images, strict=False):
            yield _scaled_back(own[: fitted[0], : fitted[1]], image.shape[:2])

    waiting: tuple[Any, ...] | None = None
    pictures = map(read_image, images)
    while batch := list(itertools.islice(pictures, batch_size)):
        started = start(batch)  # before the previous batch is fetched, so that host and devices work at once
        if waiting:
            yield from finish(*waiting)
        waiting = started
    if waiting:
        yield from finish(*waiting)


def _scaled_back(labels: UInt8[np.ndarray, "h w"], size: tuple[int, ...]) -> Image:
    """Returns segments at an image's own size, numbered without gaps."""
    rows, columns = (
        ((np.arange(n) + 0.5) * fitted / n).astype(int) for n, fitted in zip(size, labels.shape, strict=True)
    )
    numbers, places = np.unique(labels[rows][:, columns], return_inverse=True)
    segments = places.reshape(size).astype(np.int32) + 1
    count = len(numbers)
    confidence = [0] * (BINS - 1) + [count]
    return Image(segments, Statistics(1, [0] * count + [1], confidence, [0] * HIDDEN, 1.0))


def cluster_stage(
    folder: epath.Path,
    *,
    generator: Mapping[str, Any],
    source: Mapping[str, Any],
    image_size: int,
    batch_size: int = 32,
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Runs a stage of kind "cluster": writes the clusters of the images of a source into FOLDER.

    `masks="stage:NAME"` of that source reads them, see `data.sources.build`; `fields=["image", "captions"]` hides the
    masks that it may have of its own.

    Args:
      folder: the folder of the stage; the other arguments are the keys of its config.
      generator: see `models.pseudo_masks.build_generator`, without `mask_stride`; `backbone.init` names the weights of
        a tower.
      source: as in `data.train`.
      image_size: the side in pixels of the square that an image is scaled to fit.
      batch_size: the number of images at once in each process.
      shard_size: the number of images of a shard.

    Raises:
      UserError: a tower has no weights, an image cannot be read; and see `inference.pseudo_masks.label_source`.
    """
    if "mask_stride" in generator:
        raise UserError(
            "generator.mask_stride has no effect in a stage of kind 'cluster': it keeps every pixel"
        )
    built = build_generator(generator)
    init = (generator.get("backbone") or {}).get("init", "")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is less than 1")

    images = make_source(source)
    check_provides(images, ("image",), "a stage of kind 'cluster'")

    def label(variables: Variables, pictures: Iterable[Any]) -> Iterator[Image]:
        devices = jax.local_devices()
        return cluster_images(built, variables, image_size, pictures, batch_size=batch_size, devices=devices)

    load = lambda: generator_weights(built, init)
    request = dict(generator=generator, image_size=image_size, source=source)
    report(label_source(load, images, folder, label, request, shard_size=shard_size), images, folder)
    return {}
