"""Classification of a detector's boxes by a classifier of whole images, as ViLD classifies cropped regions.

Each box is cropped at its own size and 1.5 times as large, and resized to the square input of the image tower. The mean
of both unit vectors, normalised, is classified by a softmax (Gu et al. 2022, 3.2). The score of a class is the
geometric mean of the detector's objectness and that probability (CenterNet2, Zhou et al. 2021, and Detic:
MULT_PROPOSAL_SCORE in their code). Within a class, boxes with an IoU above 0.5 with a better box are dropped (Detic).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from PIL import Image

from ovseg_jax.data.images import read_image
from ovseg_jax.evals.box_files import Proposals
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.kernels.unit import host_unit
from ovseg_jax.protocols import Variables

CONTEXT = (1.0, 1.5)
OVERLAP = 0.5


class Detection(NamedTuple):
    """A box with a class: the indices of both, and the score."""

    box: int
    category: int
    score: float


def crop(
    image: Image.Image, box: Float[np.ndarray, "4"], context: float, size: int
) -> UInt8[np.ndarray, "z z 3"]:
    """Crops a box, enlarged about its centre by `context`, and resizes it to a square; bicubic, antialiased."""
    left, top, width, height = box
    grow = (context - 1) / 2
    spans = []
    for start, length, end in ((left, width, image.width), (top, height, image.height)):
        low = min(max(start - grow * length, 0), end - 1)
        spans.append((low, min(max(start + (1 + grow) * length, low + 1), end)))
    (x0, x1), (y0, y1) = spans
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (x0, y0, x1, y1)))


def region_features(
    embed: Callable[[Variables, UInt8[Array, "b z z 3"]], Float[Array, "b d"]],
    variables: Variables,
    images: Sequence[tuple[epath.PathLike, Float[np.ndarray, "_ 4"]]],
    mesh: Mesh,
    *,
    size: int,
    batch: int,
) -> Iterator[Float[np.ndarray, "n d"]]:
    """Yields the unit vectors of the boxes of each image, [n D], one image at a time.

    Args:
      embed: a classifier's `embed_image`, which returns unit vectors.
      variables: its variables.
      images: the path and the boxes of each image.
      mesh: the devices.
      size: the side z of the images that `embed` takes.
      batch: number of crops to embed at once.
    """
    jobs = (
        (image, box, context, size)
        for path, boxes in images
        for image in [Image.fromarray(read_image(path))]
        for box in boxes
        for context in CONTEXT
    )
    with ThreadPoolExecutor() as pool:

        def batches() -> Iterator[dict[str, np.ndarray]]:
            while part := list(islice(jobs, batch)):
                crops = np.zeros((batch, size, size, 3), np.uint8)
                crops[: len(part)] = list(pool.map(lambda job: crop(*job), part))
                yield {"image": crops, "example_mask": np.arange(batch) < len(part)}

        step = partial(jax.jit(lambda variables, batch: embed(variables, batch["image"])), variables)
        vectors = (vector for part in each_batch(batches(), step, mesh) for vector in part[:batch])
        for _, boxes in images:
            views = np.stack(list(islice(vectors, len(CONTEXT) * len(boxes))))
            yield host_unit(views.reshape(len(boxes), len(CONTEXT), -1).mean(1))


def class_probability(
    regions: Float[np.ndarray, "n d"], text: Float[np.ndarray, "c d"], scale: float
) -> Float[np.ndarray, "n c"]:
    """Computes the softmax over classes of cosines times `scale`, which is 1/τ."""
    logits = scale * (regions @ text.T)
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def detect(proposals: Proposals, probability: Float[np.ndarray, "n c"], limit: int) -> list[Detection]:
    """Selects the best boxes with their classes, at most `limit` over all classes; a box may have several classes.

    Args:
      proposals: the boxes.
      probability: the probability of each class for each box.
      limit: the maximum number of detections.
    """
    score = np.sqrt(proposals.objectness[:, None] * probability)
    overlap = _iou(proposals.boxes)
    found: list[Detection] = []
    kept: dict[int, list[int]] = {}
    for box, category in zip(
        *np.unravel_index(np.argsort(-score, axis=None, kind="stable"), score.shape), strict=True
    ):
        if len(found) == limit or score[box, category] == 0:
            break
        better = kept.setdefault(int(category), [])
        if not (overlap[box, better] > OVERLAP).any():
            better.append(box)
            found.append(Detection(int(box), int(category), float(score[box, category])))
    return found


def _iou(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n n"]:
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inside = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    shared = np.maximum(inside, 0).prod(-1)
    area = boxes[:, 2:].prod(-1)
    return shared / (area[:, None] + area - shared)
