"""Rows of training batches, made from examples: geometry once, then each field of the batch."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ovseg_jax.data.batch_augment import BatchAugment, choose, parse_batch_augments
from ovseg_jax.data.fields import FIELDS, Sample, Settings, Tokenize
from ovseg_jax.data.geometry import Geometry, ScaleJitter, geometry_of
from ovseg_jax.data.source_base import replaced
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.lexicon import LEXICON
from ovseg_jax.vocab.words import WordList, split_words

# Separate the random draws of a row from those of the batch or the mixture with the same number.
_STREAM, _REGION_STREAM = 0, 3
_MOVED = ("image", "segments", "boxes")  # fields that geometry transforms
_READ = ("class_ids",)  # fields that geometry reads
# Fields of whole texts, from which no word can be dropped.
_WHOLE = ("tokens", "prompts", "box_tokens", "tags", "box_tags")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Makes training rows; a row depends only on (seed, index, example).

    Only the needed fields of an example are read. The row has the arrays of each field, see `fields`, and
    `example_mask`, True. If a text that is kept whole mentions left or right, the image is not mirrored.
    """

    settings: Settings
    geometry: Geometry
    augments: tuple[BatchAugment, ...]
    steps: int
    batch_size: int

    @classmethod
    def from_config(
        cls,
        config: Any,
        fields: Iterable[str],
        words: WordList | None = None,
        tokenize: Tokenize | None = None,
    ) -> "Rows":
        """Creates it from `seed`, `steps`, `batch_size` and `data` of a config.

        Args:
          config: in `data`: `image_size`, `mask_stride`, `max_masks`, `max_boxes` (by default equal to `max_masks`),
            `max_tags`, `max_box_tags`, `box_draw`, `max_box_tokens`, `max_tag_tokens`, `max_words`,
            `caption_text`, `max_prompts`, `caption_filter`, `keep_prob`, `tagger`,
            `batch_augment`, `views`, and the keys of `geometry.geometry_of`.
          fields: names of `FIELDS` that a row holds.
          words: the vocabulary, for fields of words.
          tokenize: the text side's tokeniser, for fields of tokens.

        Raises:
          UserError: a field is unknown or lacks its vocabulary or tokeniser, or a value is invalid.
        """
        data = config["data"]
        settings = Settings.from_config(config, fields, words, tokenize)
        augments = parse_batch_augments(data.get("batch_augment") or ())
        whole = [name for name in settings.fields if name in _WHOLE]
        if whole and any(augment.drop for augment in augments):
            raise UserError(
                f"data.batch_augment drops words from captions, but the batch field {whole[0]!r} keeps texts whole"
            )
        return cls(
            settings,
            geometry_of(data, bool(settings.needs & {"segments", "boxes"})),
            augments,
            int(config["steps"]),
            int(config["batch_size"]),
        )

    @property
    def needs(self) -> frozenset[str]:
        """The fields that are read from the source."""
        return self.settings.needs

    def __call__(self, index: int, example: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns row `index % batch_size` of batch `index // batch_size`.

        Raises:
          UserError: a file of the example cannot be read, or the tokeniser refuses its text.
        """
        seed, needs = self.settings.seed, self.needs
        rng = np.random.default_rng([seed, index, _STREAM])
        caption, augment, flipped = "", None, False
        if "captions" in needs:
            captions = example["captions"]
            caption = captions[int(rng.integers(len(captions)))] if len(captions) else ""
        elif isinstance(self.geometry, ScaleJitter):
            rng.integers(2)  # in place of the caption's draw: images are the same without captions
        spoken = self._region_captions(index, example)
        if moved := {name: example[name] for name in _MOVED if name in needs}:
            batch = index // self.batch_size
            augment = choose(self.augments, seed, batch, batch / max(self.steps, 1))
            may_flip = not self._mentions_side(example, caption, spoken)
            if "segments" in moved:
                moved |= {name: example[name] for name in _READ if name in needs}
            moved, flipped = self.geometry(moved, rng, may_flip)
        sample = Sample(
            self.settings, index, replaced(example, **moved), caption, spoken, flipped, augment, rng
        )
        row = {"example_mask": np.asarray(True)}
        for name in self.settings.fields:
            row |= FIELDS[name].make(sample)
        return row

    def _region_captions(self, index: int, example: Mapping[str, Any]) -> list[str]:
        """Draws one caption for each segment; "" if it has none."""
        if "region_captions" not in self.needs:
            return []
        rng = np.random.default_rng([self.settings.seed, index, _REGION_STREAM])
        draw = lambda texts: texts[int(rng.integers(len(texts)))] if len(texts) else ""
        return [draw(texts) for texts in example["region_captions"]]

    def _mentions_side(
        self, example: Mapping[str, Any], caption: str, region_captions: Sequence[str]
    ) -> bool:
        """Tells whether a text that is kept whole mentions left or right."""
        fields = self.settings.fields
        texts = [caption] if {"tokens", "prompts"} & set(fields) else []
        texts += region_captions if "box_tokens" in fields else []
        texts += example["tags"] if "tags" in fields else []
        texts += [tag for tags in example["region_tags"] for tag in tags] if "box_tags" in fields else []
        return not all(LEXICON["side"].isdisjoint(split_words(text)) for text in texts)
