"""`score retrieval`: texts found by images, and images by texts."""

import argparse
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Shaped
from tqdm import tqdm

from ovseg_jax.errors import UserError
from ovseg_jax.evals.recall import Rows, recalls
from ovseg_jax.reading import read_npz, reading
from ovseg_jax.scoring.report import Report, add_report_flags, check_report_flags, publish

_DESCRIPTION = """\
Scores retrieval between images and texts: recall at 1, 5 and 10, both ways, in percent.

  python -m ovseg_jax.score retrieval --pred=FILE.npz --captions=5 --json=scores.json
  python -m ovseg_jax.score retrieval --pred=FILE.npz --gt=FILE2.npz

--pred is an .npz file with either
  images [N D], texts [M D]   vectors, whose cosine is the score (with --dot their product)
  scores [N M]                the score of each image with each text; higher is better
--gt is an .npz file, which may be the same, with either
  image_of_text [M]                      the row of the image that each text belongs to, from 0
  image_ids [N], text_image_ids [M]      the id of each image, and of the image that each text belongs to
--captions=K, in place of --gt, says that texts follow the images' order, K for each.

  image to text R@K   share of images with one of their texts among the K texts of the highest scores
  text to image R@K   share of texts whose image is among the K images of the highest scores
Of equal scores, those of other images and texts come first. An image without text is no query, but can be found.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the description and the flags."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("--pred", required=True, metavar="FILE.npz", help="vectors, or scores")
    add("--gt", metavar="FILE.npz", help="the image of each text")
    add("--captions", type=int, metavar="K", help="in place of --gt: the number of texts of each image")
    add("--dot", action="store_true", help="the score is the product of the vectors as they are")
    add_report_flags(parser, per_class=False)


def run(arguments: argparse.Namespace) -> None:
    """Scores the file and prints the report.

    Raises:
      UserError: a flag or a file is invalid.
    """
    check_report_flags(arguments, {"--pred": arguments.pred, "--gt": arguments.gt})
    if (arguments.gt is None) == (arguments.captions is None):
        raise UserError("give one of --gt=FILE.npz and --captions=K")
    by_image, by_text, shape = _read_scores(arguments.pred, arguments.dot)
    if arguments.gt is not None:
        owner = _read_owners(arguments.gt, shape)
    else:
        owner = np.arange(shape[1]) // max(arguments.captions, 1)
        if arguments.captions < 1 or shape[1] != shape[0] * arguments.captions:
            raise UserError(
                f"--captions={arguments.captions} does not fit the {shape[0]} images and {shape[1]} texts of "
                f"--pred={arguments.pred}"
            )
    publish(score(by_image, by_text, owner, shape[0]), arguments)


def score(by_image: Rows, by_text: Rows, owner: Int[np.ndarray, "m"], images: int) -> Report:
    """Computes the recalls.

    Args:
      by_image: the scores of images with all texts.
      by_text: the scores of texts with all images.
      owner: the image of each text.
      images: the number of images.
    """
    own = np.bincount(owner, minlength=images)
    with tqdm(total=images + len(owner), unit="query", disable=None) as bar:
        found = recalls(by_image, by_text, owner, images, bar.update)
    asked = own[own > 0]
    facts = {
        "images": images,
        "texts": len(owner),
        "texts of an image": int(asked[0])
        if (asked == asked[0]).all()
        else f"{asked.min()} to {asked.max()}",
        "images without text": int((own == 0).sum()),
    }
    return Report("retrieval", found, facts=facts)


def _read_scores(path: str, dot: bool) -> tuple[Rows, Rows, tuple[int, int]]:
    """Reads --pred.

    Returns:
      The scores of images with texts, of texts with images, and the numbers of both.
    """
    what = "--pred:"
    with reading(path, what):
        arrays = read_npz(path, what)
        if ("scores" in arrays) == bool({"images", "texts"} & arrays.keys()):
            raise ValueError(
                f"expected either 'scores' or 'images' and 'texts', found {', '.join(arrays) or 'no array'}"
            )
        if "scores" in arrays:
            if dot:
                raise ValueError("it holds scores: --dot is for vectors")
            scores = _matrix(arrays, "scores")
            rows: Rows = lambda first, last: scores[first:last]
            columns: Rows = lambda first, last: np.ascontiguousarray(scores[:, first:last].T)
            return rows, columns, scores.shape  # type: ignore[return-value]
        images, texts = (_matrix(arrays, name) for name in ("images", "texts"))
        if images.shape[1] != texts.shape[1]:
            raise ValueError(f"'images' has {images.shape[1]} dimensions and 'texts' {texts.shape[1]}")
        if not dot:
            images, texts = _unit(images, "images"), _unit(texts, "texts")
    return (
        lambda first, last: images[first:last] @ texts.T,
        lambda first, last: texts[first:last] @ images.T,
        (len(images), len(texts)),
    )


def _matrix(arrays: Mapping[str, np.ndarray], name: str) -> Float[np.ndarray, "n m"]:
    if name not in arrays:
        raise ValueError(f"it has no array {name!r}")
    found = arrays[name]
    if found.dtype.kind not in "fiu" or found.ndim != 2 or 0 in found.shape:
        raise ValueError(
            f"{name!r} has the dtype {found.dtype} and the shape {found.shape}, not two dimensions of numbers"
        )
    # float32 holds float16 exactly; other types go to float64.
    found = found.astype(np.float32 if found.dtype in (np.float16, np.float32) else np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{name!r} holds numbers that are not finite")
    return found


def _unit(vectors: Float[np.ndarray, "n d"], name: str) -> Float[np.ndarray, "n d"]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        raise ValueError(
            f"row {int(np.argmin(length))} of {name!r} has no direction: it is zero, or too long"
        )
    return vectors / length


def _read_owners(path: str, shape: tuple[int, int]) -> Int[np.ndarray, "m"]:
    """Reads --gt: the image of each text."""
    images, texts = shape
    with reading(path, "--gt:"):
        arrays = read_npz(path, "--gt:")
        if "image_of_text" in arrays:
            owner = arrays["image_of_text"]
            if owner.dtype.kind not in "iu" or owner.shape != (texts,):
                raise ValueError(
                    f"'image_of_text' has the dtype {owner.dtype} and the shape {owner.shape}, "
                    f"not {texts} whole numbers"
                )
            if owner.min() < 0 or owner.max() >= images:
                raise ValueError(f"'image_of_text' has a value outside 0..{images - 1}")
            return owner.astype(np.int64)
        if not {"image_ids", "text_image_ids"} <= arrays.keys():
            found = ", ".join(arrays) or "no array"
            raise ValueError(f"expected 'image_of_text', or 'image_ids' and 'text_image_ids', found {found}")
        ids = _ids(arrays["image_ids"], images, "image_ids")
        place = {key: k for k, key in enumerate(ids)}
        if len(place) < len(ids):
            raise ValueError("'image_ids' names an image twice")
        wanted = _ids(arrays["text_image_ids"], texts, "text_image_ids")
        if absent := [key for key in wanted if key not in place]:
            raise ValueError(
                f"{len(absent)} of 'text_image_ids' are not among 'image_ids', such as {absent[0]!r}"
            )
        return np.array([place[key] for key in wanted], np.int64)


def _ids(found: Shaped[np.ndarray, "..."], count: int, name: str) -> list[int | str]:
    if found.dtype.kind not in "iuU" or found.shape != (count,):
        raise ValueError(
            f"{name!r} has the dtype {found.dtype} and the shape {found.shape}, not {count} whole numbers or texts"
        )
    return found.tolist()
