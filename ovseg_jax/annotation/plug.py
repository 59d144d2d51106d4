"""The protocol of annotators: each is a named plug that implements one or more of the `KINDS`.

A plug takes a list of pictures and returns a list of the same length. A new one is a class that derives from `Plug`, or
one function of the same arguments and result as the method of its kind, named "module:function":

    def captions(pictures):
        return [[describe(picture.pixels)] for picture in pictures]

The results of a plug are checked by the function of its kind in `CHECKS`; an invalid one is an error of its image.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from ovseg_jax.annotation.steps import clean_texts
from ovseg_jax.errors import UserError
from ovseg_jax.reading import short

Texts = list[str]

KINDS = ("tags", "captions", "scores", "boxes", "region_captions", "masks", "stuff")
"""The methods of a plug, in the order in which they are called."""


class Picture(NamedTuple):
    """An image, or a part of one, and its name."""

    name: str
    pixels: UInt8[np.ndarray, "h w 3"]


def crop(picture: Picture, box: Any) -> Picture:
    """Cuts a box out of an image, at whole pixels and at least one."""
    height, width = picture.pixels.shape[:2]
    left, top = min(int(box[0]), width - 1), min(int(box[1]), height - 1)
    right, bottom = max(left + 1, int(np.ceil(box[2]))), max(top + 1, int(np.ceil(box[3])))
    return Picture(picture.name, np.ascontiguousarray(picture.pixels[top:bottom, left:right]))


class Boxes(NamedTuple):
    """The objects in an image.

    Attributes:
      boxes: x0, y0, x1, y1 in pixels, exclusive ends.
      labels: the class of each.
      scores: the confidence of each, 0 to 1.
    """

    boxes: Float[np.ndarray, "n 4"]
    labels: Texts
    scores: Float[np.ndarray, "n"]


class Stuff(NamedTuple):
    """The backgrounds in an image.

    Attributes:
      masks: their pixels.
      labels: the class of each.
      scores: the confidence of each, 0 to 1.
    """

    masks: Bool[np.ndarray, "n h w"]
    labels: Texts
    scores: Float[np.ndarray, "n"]


class Plug:
    """The base class of annotators. A subclass implements the methods of its kinds; its arguments are options."""

    def tags(self, pictures: Sequence[Picture]) -> list[Texts]:
        """Returns words for each image."""
        raise NotImplementedError

    def captions(self, pictures: Sequence[Picture]) -> list[Texts]:
        """Returns one or more sentences for each image."""
        raise NotImplementedError

    def scores(self, pictures: Sequence[Picture], texts: Sequence[Texts]) -> list[Float[np.ndarray, "n"]]:
        """Returns a score of each image with each of its texts, such as a cosine; a better match has a higher one."""
        raise NotImplementedError

    def boxes(self, pictures: Sequence[Picture]) -> list[Boxes]:
        """Returns the objects in each image."""
        raise NotImplementedError

    def region_captions(self, pictures: Sequence[Picture], boxes: Sequence[Boxes]) -> list[list[Texts]]:
        """Returns one or more sentences for each box of each image."""
        raise NotImplementedError

    def masks(self, pictures: Sequence[Picture], boxes: Sequence[Boxes]) -> list[Bool[np.ndarray, "n h w"]]:
        """Returns the mask of the object in each box of each image, at the size of the image."""
        raise NotImplementedError

    def stuff(self, pictures: Sequence[Picture]) -> list[Stuff]:
        """Returns the backgrounds in each image."""
        raise NotImplementedError


PLUGS = {
    "blip2": "ovseg_jax.annotation.plugs.blip2:Blip2",
    "florence2": "ovseg_jax.annotation.plugs.florence2:Florence2",
    "qwen_vl": "ovseg_jax.annotation.plugs.qwen_vl:QwenVL",
    "grounding_dino": "ovseg_jax.annotation.plugs.grounding_dino:GroundingDino",
    "owlv2": "ovseg_jax.annotation.plugs.owlv2:Owlv2",
    "rt_detr": "ovseg_jax.annotation.plugs.rt_detr:RTDetr",
    "sam": "ovseg_jax.annotation.plugs.sam:Sam",
    "sam2": "ovseg_jax.annotation.plugs.sam:Sam2",
    "sam3": "ovseg_jax.annotation.plugs.sam:Sam3",
    "mask2former": "ovseg_jax.annotation.plugs.mask2former:Mask2Former",
    "oneformer": "ovseg_jax.annotation.plugs.oneformer:OneFormer",
    "towers": "ovseg_jax.annotation.plugs.towers:Towers",
}
"""The class of each plug, imported when it is used."""


def parse_plug(text: str) -> dict[str, Any]:
    """Parses "NAME,key=value,..."; a value may hold commas where no `key=` follows them.

    Raises:
      UserError: it is not of that form.
    """
    name, *rest = re.split(r",(?=[A-Za-z_]\w*=)", text)
    pairs = [part.partition("=") for part in rest]
    found = {key: value for key, _, value in pairs}
    if not name or "=" in name or len(found) < len(pairs):
        raise UserError(f"{text!r} is not of the form NAME,key=value,... with each key once")
    return {"name": name, **found}


def make_plug(spec: Mapping[str, Any], kind: str) -> Plug:
    """Creates a plug.

    Args:
      spec: `name`, a key of `PLUGS` or "module:Class" or "module:function", and its options, which may be texts.
      kind: one of `KINDS`, which it has to implement.

    Raises:
      UserError: the plug is unknown, has no such option, needs one, or is of another kind.
    """
    options = dict(spec)
    name = str(options.pop("name", ""))
    module, colon, attribute = PLUGS.get(name, name).partition(":")
    if not colon:
        raise UserError(f"the plug {name!r} is unknown: take {', '.join(PLUGS)}, or 'module:function'")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the plug {name!r} cannot be imported: {error}") from error
    own = isinstance(made, type) and issubclass(made, Plug)
    if own and getattr(made, kind) is getattr(Plug, kind):
        kinds = [k for k in KINDS if getattr(made, k) is not getattr(Plug, k)]
        raise UserError(f"the plug {name!r} makes no {kind}, but {', '.join(kinds)}")
    if not callable(made):
        raise UserError(f"the plug {name!r} is neither a class that derives from Plug nor a function")
    # The options of a function come after the arguments of the method of its kind.
    taken = len(inspect.signature(getattr(Plug, kind)).parameters) - 1
    known = dict([*inspect.signature(made).parameters.items()][0 if own else taken :])
    if unknown := sorted(options.keys() - known.keys()):
        raise UserError(f"the plug {name!r} has no option {unknown[0]!r}; its options: {', '.join(known)}")
    if missing := [k for k, p in known.items() if p.default is p.empty and k not in options]:
        raise UserError(f"the plug {name!r} needs the option {missing[0]}=")
    typed = {key: _typed(name, key, value, known[key].default) for key, value in options.items()}
    if own:
        return made(**typed)
    plug = Plug()
    setattr(plug, kind, lambda *given: made(*given, **typed))
    return plug


def _typed(name: str, key: str, value: Any, default: Any) -> Any:
    """Converts the text of an option to the type of its default."""
    if not isinstance(value, str) or type(default) not in (int, float):
        return value
    try:
        return type(default)(value)
    except ValueError:
        raise UserError(f"the plug {name!r}: {key}={value} is not a number") from None


def check_texts(found: Any, picture: Picture) -> Texts:
    """Checks tags or captions, and returns them without extra spaces and duplicates.

    Raises:
      ValueError: `found` is not a list of texts, or a text is empty.
    """
    del picture
    texts = _list(found, "texts")
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"expected a text, got {short(wrong[0])}")
    return clean_texts(texts)


def check_scores(found: Any, picture: Picture, given: Texts) -> Float[np.ndarray, "n"]:
    """Checks that there is a finite score for each of the given texts.

    Raises:
      ValueError: their number differs, or one is not finite.
    """
    del picture
    return _finite(found, (len(given),), "scores")


def check_boxes(found: Any, picture: Picture) -> Boxes:
    """Checks boxes, and returns them inside the image, without those that have no pixel there.

    Raises:
      ValueError: lengths differ, a number is not finite, corners are in the wrong order, or a label is empty.
    """
    boxes, labels, scores = _three(found, "boxes")
    boxes = _finite(boxes, (len(labels), 4), "boxes")
    if (boxes[:, 2:] < boxes[:, :2]).any():
        raise ValueError("a box has its corners in the wrong order")
    height, width = picture.pixels.shape[:2]
    boxes = np.clip(boxes, 0, [width, height, width, height])
    kept = np.flatnonzero((boxes[:, 2:] - boxes[:, :2]).min(1, initial=width + height) >= 1)
    return Boxes(boxes[kept], [labels[k] for k in kept], scores[kept])


def check_region_captions(found: Any, picture: Picture, given: Boxes) -> list[Texts]:
    """Checks the captions of the given boxes, see `check_texts`.

    Raises:
      ValueError: there are not as many lists as boxes, or one holds no texts.
    """
    regions = _list(found, "lists of texts")
    if len(regions) != len(given.labels):
        raise ValueError(f"captions of {len(regions)} regions for {len(given.labels)} boxes")
    return [check_texts(texts, picture) for texts in regions]


def check_masks(found: Any, picture: Picture, given: Boxes) -> Bool[np.ndarray, "n h w"]:
    """Checks that there is a mask of the image's size for each of the given boxes.

    Raises:
      ValueError: the shape differs, or the type is not bool.
    """
    masks, shape = np.asarray(found), (len(given.labels), *picture.pixels.shape[:2])
    if masks.shape != shape or masks.dtype != bool:
        raise ValueError(f"masks of shape {list(masks.shape)}, {masks.dtype}, not {list(shape)}, bool")
    return masks


def check_stuff(found: Any, picture: Picture) -> Stuff:
    """Checks backgrounds.

    Raises:
      ValueError: lengths differ, a mask has another size, a score is not finite, or a label is empty.
    """
    masks, labels, scores = _three(found, "stuff")
    masks = check_masks(masks, picture, Boxes(np.zeros((len(labels), 4)), labels, scores))
    return Stuff(masks, labels, scores)


CHECKS: dict[str, Callable[..., Any]] = {
    "tags": check_texts,
    "captions": check_texts,
    "scores": check_scores,
    "boxes": check_boxes,
    "region_captions": check_region_captions,
    "masks": check_masks,
    "stuff": check_stuff,
}
"""Checks what a plug of each kind returns for one image: (found, picture), and what it was given, if anything."""


def call(plug: Plug, kind: str, pictures: Sequence[Picture], given: Sequence[Any] | None = None) -> list[Any]:
    """Calls a plug and checks what it returns.

    Args:
      plug: the plug.
      kind: one of `KINDS`.
      pictures: the images.
      given: the texts or boxes of each image, for a kind that takes them.

    Raises:
      ValueError: its result is invalid.
    """
    more = () if given is None else (given,)
    found = getattr(plug, kind)(pictures, *more)
    if not isinstance(found, list | tuple) or len(found) != len(pictures):
        raise ValueError(f"expected a list with an entry for each of {len(pictures)} images")
    return [CHECKS[kind](*row) for row in zip(found, pictures, *more, strict=True)]


def _list(found: Any, what: str) -> list[Any]:
    if not isinstance(found, list | tuple):
        raise ValueError(f"expected a list of {what}, got {short(found)}")
    return list(found)


def _finite(found: Any, shape: tuple[int, ...], what: str) -> Float[np.ndarray, "..."]:
    values = np.asarray(found, np.float64)
    values = values.reshape(shape) if values.size == 0 == np.prod(shape) else values
    if values.shape != shape:
        raise ValueError(f"{what} of shape {list(values.shape)}, not {list(shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} that are not finite numbers")
    return values


def _three(found: Any, what: str) -> tuple[Any, Texts, Float[np.ndarray, "n"]]:
    if not isinstance(found, tuple) or len(found) != 3:
        raise ValueError(f"expected {what} as a tuple with labels and scores, got {short(found)}")
    # A comma separates the names of a class in a label file, and detectors differ in the case of letters.
    labels = [" ".join(str(label).lower().replace(",", " ").split()) for label in _list(found[1], "labels")]
    if not all(labels):
        raise ValueError("a label is empty")
    scores = _finite(found[2], (len(labels),), "scores")
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1 + 1e-6):
        raise ValueError(f"a score is outside of 0 to 1: {scores.min():.3g} to {scores.max():.3g}")
    return found[0], labels, scores
