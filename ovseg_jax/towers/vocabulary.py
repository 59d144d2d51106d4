"""The words that a text side has to know before it is made: counted in captions, or all that are spoken."""

import itertools
from collections.abc import Iterable
from typing import Any

from ovseg_jax.data.source_base import Source
from ovseg_jax.vocab.lexicon import FUNCTION_WORDS
from ovseg_jax.vocab.words import WordList, build_words, keep_of, split_words

SPOKEN = {"tokens": "captions", "box_tokens": "region_captions", "tags": "tags", "box_tags": "region_tags"}
"""Of each batch field of whole texts the source's field that it is made of."""


def counted_words(data: Any, source: Source, captions: bool = True) -> WordList:
    """Returns the words to ground: those of the captions that pass `caption_filter` in `min_count` or more captions.

    `data.words` names a file written by `WordList.save` to use instead; `data.extra_words` and the words of the class
    names are listed in any case, so that every class has an embedding; `data.count_captions` bounds the number of
    captions that are counted. They are read one by one and not kept.

    Args:
      data: `config.data`.
      source: of the captions and the class names.
      captions: False lists no word for its captions, and reads none.
    """
    if data.get("words"):
        return WordList.load(data["words"])
    return build_words(
        source.captions() if captions else (),
        keep_of(data.get("caption_filter", "noun+adj")),
        int(data.get("min_count", 1)),
        [*(data.get("extra_words") or ()), *(word for word in _names(source) if word not in FUNCTION_WORDS)],
        tagger=data.get("tagger", "pattern"),
        limit=data.get("count_captions"),
    )


def spoken_words(data: Any, source: Source, fields: Iterable[str] = ()) -> WordList:
    """Returns all words of class names and of the whole texts in a batch, by alphabet.

    Args:
      data: `config.data`; `words`, `extra_words` and `count_captions` (for each field) are those of `counted_words`.
      source: of the texts and the class names.
      fields: of the batch; those in `SPOKEN` are read.
    """
    if data.get("words"):
        return WordList.load(data["words"])
    words = set(_names(source))
    for field in SPOKEN.keys() & set(fields):
        for text in itertools.islice(source.texts(SPOKEN[field]), data.get("count_captions")):
            words.update(split_words(text))
    return WordList([*sorted(words), *(data.get("extra_words") or ())])


def _names(source: Source) -> list[str]:
    return [word for name in source.classes.flat()[0] for word in split_words(name)]
