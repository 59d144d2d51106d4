"""The fields of a training batch: their arrays, what they read from an example, and how they are made.

    field            arrays of a row
    image            image u8 [S S 3], image_size (height, width of the part that is not padding)
    masks            masks u8 [M h w], mask_valid [M], mask_weight (0 for an image without masks)
    mask_classes     [M] class of each mask, -1 for none and for padding
    mask_isthing     [M]
    mask_iscrowd     [M]; crowds are among the masks only if this field is requested
    pixel_classes    [h w] class at the centre of each cell, -1 for none
    boxes            boxes f32 [R 4] (x0, y0, x1, y1 in pixels of the canvas), box_valid [R]
    box_tokens       [R L], box_token_valid: a caption of each box by the text side's tokeniser
    box_words        box_word_ids [R W], box_word_valid: its words by the vocabulary
    box_tags         [R T L], box_tag_valid: the tags of each box
    tags             [T L], tag_valid: the tags of the image
    words            word_ids [W], word_valid: words of one caption, filtered and sampled (OpenSeg, 3.2)
    tokens           [L], token_valid: one caption by the text side's tokeniser, whole or in part, see `caption_text`;
                     all invalid without a caption
    prompts          [P L], prompt_valid: up to P nouns and verbs of the caption, each in a template, then the caption
    label, feature   as in the example; if a feature has several views, one of them

Slot k of masks and of boxes is the same segment; the largest come first. With `box_draw` "random", an image that has
more than R boxes shows R of them, drawn anew in each row. Captions of boxes have L tokens, or `max_box_tokens` if it is
set, and tags `max_tag_tokens`. The function of a field takes a `Sample`, an example after the geometry and the random
draws that several fields share, and returns arrays.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ovseg_jax.data import transforms
from ovseg_jax.data.batch_augment import BatchAugment
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.templates import IMAGENET, PLACE
from ovseg_jax.vocab.words import FILTERS, WordList, extract_words, keep_of, split_words, without_spoiled

Arrays = dict[str, np.ndarray]
Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""A function from texts to token ids i32 [n L] and a mask, False at padding; it is copied to worker processes."""

CAPTION_TEXTS = ("caption", "nouns_verbs", "prompt")
"""What `tokens` holds of a caption: all of it; its nouns and verbs (papers/002, C.1); one of these in a template."""

BOX_DRAWS = ("largest", "random")
"""Which boxes are taken where an image has more than fit."""

FLIP_DROP = ("lexicon:side",)  # a flip invalidates these words (left, right)
_BOX_STREAM = 4  # of random numbers, beside those of `rows`


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a batch's fields: keys of `config.data`, the vocabulary and the tokeniser.

    Attributes:
      fields: names of `FIELDS`, in the order of `FIELDS`.
      known: the vocabulary that word ids index.
      max_box_tags: the number of tags of a box.
      box_draw: one of `BOX_DRAWS`.
      max_box_tokens: the number of tokens of a box's caption; 0 keeps the tokeniser's.
      max_tag_tokens: the same of a tag.
      caption_text: one of `CAPTION_TEXTS`, for tokens.
      max_prompts: P, the number of prompts of an image (3 in GroupViT for YFCC).
      tokenize: the text side's tokeniser, for tokens, prompts and tags.
      views: the number of consecutive rows that show one example.
    """

    fields: tuple[str, ...]
    seed: int
    mask_stride: int
    max_masks: int
    max_boxes: int
    max_tags: int
    max_box_tags: int
    box_draw: str
    max_box_tokens: int
    max_tag_tokens: int
    max_words: int
    keep: tuple[str, ...]
    keep_prob: Mapping[str, float]
    tagger: str
    caption_text: str
    max_prompts: int
    views: int
    known: WordList
    tokenize: Tokenize | None

    @classmethod
    def from_config(
        cls, config: Any, fields: Iterable[str], words: WordList | None, tokenize: Tokenize | None
    ) -> "Settings":
        """Creates the settings from `seed` and `data` of a config; see `Rows.from_config`."""
        data, named = config["data"], set(fields)
        if unknown := sorted(named - FIELDS.keys()):
            raise UserError(f"data.fields: {unknown[0]!r} is not one of {', '.join(FIELDS)}")
        if named & {"words", "box_words"} and words is None:
            raise UserError(
                "the batch fields 'words' and 'box_words' need a vocabulary, which this method lacks"
            )
        if named & {"tokens", "prompts", "box_tokens"} and tokenize is None:
            raise UserError(
                "the batch fields 'tokens', 'prompts' and 'box_tokens' need a tokeniser, which this method lacks"
            )
        caption_text, prompts = data.get("caption_text", "caption"), int(data.get("max_prompts", 3))
        if caption_text not in CAPTION_TEXTS:
            raise UserError(f"data.caption_text={caption_text!r} is not one of {', '.join(CAPTION_TEXTS)}")
        if prompts < 1:
            raise UserError(f"data.max_prompts={prompts} is less than 1")
        size, stride = int(data["image_size"]), int(data.get("mask_stride", 4))
        if named & {"masks", "pixel_classes"} and size % stride:
            raise UserError(f"data.image_size={size} is not a multiple of data.mask_stride={stride}")
        views, masks = int(data.get("views", 1)), int(data.get("max_masks", 64))
        if views < 1:
            raise UserError(f"data.views={views} is less than 1")
        draw = data.get("box_draw", "largest")
        if draw not in BOX_DRAWS:
            raise UserError(f"data.box_draw={draw!r} is not one of {', '.join(BOX_DRAWS)}")
        if draw == "random" and (both := sorted(n for n in named if n.startswith("mask"))):
            raise UserError(
                f"data.box_draw=random does not fit the batch field {both[0]!r}, whose slots are those of the boxes"
            )
        lengths = {key: int(data.get(key, 0)) for key in ("max_box_tokens", "max_tag_tokens")}
        for key, length in lengths.items():
            if length < 0 or length in (1, 2):
                raise UserError(f"data.{key}={length} is neither 0 nor at least 3: start, one piece and end")
        max_tags = int(data.get("max_tags", 16))
        return cls(
            fields=tuple(name for name in FIELDS if name in named),
            seed=int(config["seed"]),
            mask_stride=stride,
            max_masks=masks,
            max_boxes=int(data.get("max_boxes", masks)),
            max_tags=max_tags,
            max_box_tags=int(data.get("max_box_tags", max_tags)),
            box_draw=draw,
            **lengths,
            max_words=int(data.get("max_words", 24)),
            keep=keep_of(data.get("caption_filter", "noun+adj")),
            keep_prob=_keep_prob(data.get("keep_prob", 0.5)),
            tagger=data.get("tagger", "pattern"),
            caption_text=caption_text,
            max_prompts=prompts,
            views=views,
            known=WordList([]) if words is None else words,
            tokenize=tokenize,
        )

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """The fields that are read from the source."""
        return frozenset(need for name in self.fields for need in FIELDS[name].needs)

    def token_rows(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Tokenises texts to ids and a mask [n L]; a text of nothing but spaces has no valid token."""
        assert self.tokenize is not None
        ids, valid = self.tokenize(list(texts))
        return ids, valid & np.array([bool(text.strip()) for text in texts], bool)[:, None]

    def short_rows(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Tokenises texts to at most `length` tokens, 0 for any; a longer text keeps its end token."""
        ids, valid = self.token_rows(texts)
        if not 0 < length < ids.shape[1]:
            return ids, valid
        kept, longer = ids[:, :length].copy(), valid[:, length]
        kept[longer, length - 1] = ids[longer, valid[longer].sum(1) - 1]
        return kept, valid[:, :length]

    def word_row(self, words: Sequence[str]) -> tuple[Int[np.ndarray, "w"], Bool[np.ndarray, "w"]]:
        """Returns the ids i32 [W] of the first `max_words` words, padded, and a mask, False at padding."""
        words = words[: self.max_words]
        ids = np.zeros(self.max_words, np.int32)
        ids[: len(words)] = self.known.ids(words)
        return ids, np.arange(self.max_words) < len(words)


@dataclasses.dataclass
class Sample:
    """An example after geometry and shared random draws, from which each field makes its arrays.

    Attributes:
      settings: the settings of the fields.
      index: the number of the row.
      example: `image`, `segments` and `boxes` after geometry, with `image_size`; the rest as the source returns it.
      caption: the sampled caption, or "".
      region_captions: the sampled caption of each segment, or "".
      flipped: whether the image was mirrored.
      augment: the augmentation of the whole batch.
      rng: the row's random generator, after the draws of geometry.
    """

    settings: Settings
    index: int
    example: Mapping[str, Any]
    caption: str
    region_captions: Sequence[str]
    flipped: bool
    augment: BatchAugment | None
    rng: np.random.Generator

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """The box of each segment, f32 [n 4]: around its visible pixels if segments are read, else as transformed."""
        if "segments" in self.settings.needs:
            return transforms.segment_boxes(self.example["segments"], len(self.example["class_ids"]))
        return self.example["boxes"]

    @functools.cached_property
    def chosen(self) -> Int[np.ndarray, "n"]:
        """Indices (from 0) of the visible segments, the largest first; crowds only if `mask_iscrowd` is requested."""
        segments = "segments" in self.settings.needs
        crowd = np.zeros(len(self.example["class_ids"] if segments else self.boxes), bool)
        if "mask_iscrowd" not in self.settings.fields and "iscrowd" in self.example:
            crowd = self.example["iscrowd"]
        if segments:
            return transforms.chosen_segments(self.example["segments"], crowd, len(crowd)) - 1
        area = np.where(crowd, 0, (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1))
        order = np.argsort(-area, kind="stable")
        return order[area[order] > 0]

    @functools.cached_property
    def boxed(self) -> Int[np.ndarray, "r"]:
        """Indices (from 0) of the segments in the box slots."""
        count = self.settings.max_boxes
        if self.settings.box_draw == "largest" or len(self.chosen) <= count:
            return self.chosen[:count]
        rng = np.random.default_rng([self.settings.seed, self.index, _BOX_STREAM])
        return self.chosen[np.sort(rng.permutation(len(self.chosen))[:count])]

    def of_boxes(self, values: Sequence[Any], empty: Any) -> list[Any]:
        """Returns the values of the segments in the box slots, and `empty` for unused slots."""
        count = self.settings.max_boxes
        found = [values[k] if k < len(values) else empty for k in self.boxed]
        return found + [empty] * (count - len(found))


class Field(NamedTuple):
    """The fields that a batch field needs from an example, and the function that makes its arrays."""

    needs: frozenset[str]
    make: Callable[[Sample], Arrays]


def _image(sample: Sample) -> Arrays:
    image = sample.example["image"]
    if sample.augment is not None:
        image = sample.augment.apply(image, sample.example["image_size"], sample.rng)
    return {"image": image, "image_size": sample.example["image_size"]}


def _masks(sample: Sample) -> Arrays:
    count, ids = sample.settings.max_masks, sample.chosen[: sample.settings.max_masks] + 1
    weight = (sample.augment.mask_weight if sample.augment else 1.0) if len(ids) else 0.0
    return {
        "masks": transforms.segment_masks(
            sample.example["segments"], ids, count, sample.settings.mask_stride
        ),
        "mask_valid": np.arange(count) < len(ids),
        "mask_weight": np.asarray(weight, np.float32),
    }


def _of_masks(name: str, of: str, empty: Any) -> Callable[[Sample], Arrays]:
    def make(sample: Sample) -> Arrays:
        ids = sample.chosen[: sample.settings.max_masks]
        values = np.asarray(sample.example[of])
        padded = np.full(sample.settings.max_masks, empty, values.dtype)
        padded[: len(ids)] = values[ids]
        return {name: padded}

    return make


def _pixel_classes(sample: Sample) -> Arrays:
    example, stride = sample.example, sample.settings.mask_stride
    return {"pixel_classes": transforms.class_map(example["segments"], example["class_ids"], stride)}


def _boxes(sample: Sample) -> Arrays:
    count, ids = sample.settings.max_boxes, sample.boxed
    boxes = np.zeros((count, 4), np.float32)
    boxes[: len(ids)] = sample.boxes[ids]
    return {"boxes": boxes, "box_valid": np.arange(count) < len(ids)}


def _box_tokens(sample: Sample) -> Arrays:
    ids, valid = sample.settings.short_rows(
        sample.of_boxes(sample.region_captions, ""), sample.settings.max_box_tokens
    )
    return {"box_tokens": ids, "box_token_valid": valid}


def _box_words(sample: Sample) -> Arrays:
    settings = sample.settings
    spoken = [_true_words(sample, text) for text in sample.of_boxes(sample.region_captions, "")]
    made = [settings.word_row([word for word, _ in words]) for words in spoken]
    ids, valid = (np.stack(column) for column in zip(*made, strict=True))
    return {"box_word_ids": ids, "box_word_valid": valid}


def _tags(sample: Sample) -> Arrays:
    ids, valid = _tag_rows(sample, sample.example["tags"], sample.settings.max_tags)
    return {"tags": ids, "tag_valid": valid}


def _box_tags(sample: Sample) -> Arrays:
    count = sample.settings.max_box_tags
    made = [_tag_rows(sample, tags, count) for tags in sample.of_boxes(sample.example["region_tags"], ())]
    ids, valid = (np.stack(column) for column in zip(*made, strict=True))
    return {"box_tags": ids, "box_tag_valid": valid}


def _tag_rows(
    sample: Sample, tags: Sequence[str], count: int
) -> tuple[Int[np.ndarray, "t l"], Bool[np.ndarray, "t l"]]:
    """Tokenises `count` tags; without a tokeniser, returns word ids."""
    settings = sample.settings
    texts = [*tags[:count], *[""] * (count - len(tags))]
    if settings.tokenize is not None:
        return settings.short_rows(texts, settings.max_tag_tokens)
    made = [
        settings.word_row([word for word in split_words(text) if word in settings.known]) for text in texts
    ]
    ids, valid = (np.stack(column) for column in zip(*made, strict=True))
    return ids, valid


def _words(sample: Sample) -> Arrays:
    """Keeps each word with its probability kp (section 3.2); if all are dropped, the one with the lowest draw stays."""
    words = _true_words(sample, sample.caption)
    if words:
        draws = sample.rng.random(len(words))
        keep = sample.settings.keep_prob
        kept = [word for (word, pos), u in zip(words, draws, strict=True) if u < keep[pos]]
        words = [(word, "") for word in kept] or [words[int(draws.argmin())]]
    ids, valid = sample.settings.word_row([word for word, _ in words])
    return {"word_ids": ids, "word_valid": valid}


def _true_words(sample: Sample, text: str) -> list[tuple[str, str]]:
    """Returns the known words of a text, with parts of speech, that flip and augmentation leave true."""
    settings = sample.settings
    if not text:
        return []
    words = [
        (word, pos)
        for word, pos in extract_words(text, settings.keep, settings.tagger)
        if word in settings.known
    ]
    if sample.flipped:
        words = without_spoiled(words, FLIP_DROP)
    if sample.augment is not None:
        words = without_spoiled(words, sample.augment.drop, sample.augment.spare)
    return words


def _tokens(sample: Sample) -> Arrays:
    text = sample.caption
    if sample.settings.caption_text == "nouns_verbs":
        text = " ".join(_nouns_and_verbs(sample)) or text
    elif sample.settings.caption_text == "prompt":
        text = _drawn_prompts(sample, 1)[0]
    ids, valid = sample.settings.token_rows([text])
    return {"tokens": ids[0], "token_valid": valid[0]}


def _prompts(sample: Sample) -> Arrays:
    ids, valid = sample.settings.token_rows(_drawn_prompts(sample, sample.settings.max_prompts))
    return {"prompts": ids, "prompt_valid": valid}


def _nouns_and_verbs(sample: Sample) -> list[str]:
    return [word for word, _ in extract_words(sample.caption, ("noun", "verb"), sample.settings.tagger)]


def _drawn_prompts(sample: Sample, count: int) -> list[str]:
    """Draws words without repetition, and for each one of CLIP's templates, as GroupViT's builder does."""
    words = _nouns_and_verbs(sample)
    drawn = sample.rng.permutation(len(words))[:count]
    templates = sample.rng.integers(len(IMAGENET), size=len(drawn))
    texts = [IMAGENET[t].replace(PLACE, words[w]) for w, t in zip(drawn, templates, strict=True)]
    return texts + [sample.caption] * (count - len(texts))


def _label(sample: Sample) -> Arrays:
    return {"label": np.asarray(sample.example["label"], np.int32)}


def _feature(sample: Sample) -> Arrays:
    """Returns the feature; consecutive rows of one example get different views of it."""
    feature = np.asarray(sample.example["feature"], np.float32)
    if feature.ndim == 2:
        group, place = divmod(sample.index, sample.settings.views)
        order = np.random.default_rng([sample.settings.seed, group, 0]).permutation(len(feature))
        feature = feature[order[place % len(order)]]
    return {"feature": feature}


def _field(needs: str, make: Callable[[Sample], Arrays]) -> Field:
    return Field(frozenset(needs.split()), make)


FIELDS: dict[str, Field] = {
    # In the order of their random draws: those for the image come before those for the words.
    "image": _field("image", _image),
    "words": _field("captions", _words),
    "tokens": _field("captions", _tokens),
    "prompts": _field("captions", _prompts),
    "masks": _field("image segments class_ids", _masks),
    "mask_classes": _field("image segments class_ids", _of_masks("mask_classes", "class_ids", -1)),
    "mask_isthing": _field("image segments class_ids", _of_masks("mask_isthing", "isthing", False)),
    "mask_iscrowd": _field("image segments class_ids", _of_masks("mask_iscrowd", "iscrowd", False)),
    "pixel_classes": _field("image segments class_ids", _pixel_classes),
    "boxes": _field("image boxes", _boxes),
    "box_tokens": _field("image boxes region_captions", _box_tokens),
    "box_words": _field("image boxes region_captions", _box_words),
    "box_tags": _field("image boxes region_tags", _box_tags),
    "tags": _field("tags", _tags),
    "label": _field("label", _label),
    "feature": _field("feature", _feature),
}
"""Every field by its name."""


def batch_fields(method: Any, config: Any) -> tuple[str, ...]:
    """Returns the fields that a method's loss reads and those that `config.data.fields` adds.

    Args:
      method: a method, whose `fields(config)` is called.
      config: the whole config of a run.
    """
    return tuple(dict.fromkeys((*method.fields(config), *(config.data.get("fields") or ()))))


def _keep_prob(value: Any) -> dict[str, float]:
    """Returns kp for each part of speech from one number, or from a mapping with an optional "default"."""
    parts = FILTERS["all"]
    if hasattr(value, "items"):
        given = {key: float(p) for key, p in value.items()}
        if unknown := sorted(set(given) - {*parts, "default"}):
            raise UserError(
                f"data.keep_prob has no key {unknown[0]!r}; known keys: {', '.join(parts)} and default"
            )
        keep = {pos: given.get(pos, given.get("default", 1.0)) for pos in parts}
    else:
        keep = dict.fromkeys(parts, float(value))
    if not all(0 <= p <= 1 for p in keep.values()):
        raise UserError(f"data.keep_prob={value} is outside 0..1")
    return keep
