"""The vocabulary of a text side: words counted in captions, or all words of the texts."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.vocab.lexicon import FUNCTION_WORDS
from ovseg_jax.vocab.templates import IMAGENET, PLACE
from ovseg_jax.vocab.words import WordList, build_words, keep_of, split_words

SPOKEN = {
    "tokens": "captions",
    "prompts": "captions",
    "box_tokens": "region_captions",
    "tags": "tags",
    "box_tags": "region_tags",
}
"""The source's field for each batch field of whole texts."""


def counted_words(data: Any, source: Source, captions: bool = True) -> WordList:
    """Lists the words to ground: those that pass `caption_filter` in at least `min_count` captions.

    `data.words` names a file written by `WordList.save` to use instead; `data.extra_words` and the words of the class
    names are always listed, so that every class has an embedding; `data.count_captions` limits the number of captions.
    Captions are read one by one and not kept.

    Args:
      data: `config.data`.
      source: the source of the captions and the class names.
      captions: whether to read the captions.
    """
    if data.get("words"):
        return _given(data["words"])
    return build_words(
        source.captions() if captions else (),
        keep_of(data.get("caption_filter", "noun+adj")),
        int(data.get("min_count", 1)),
        [*(data.get("extra_words") or ()), *(word for word in _names(source) if word not in FUNCTION_WORDS)],
        tagger=data.get("tagger", "pattern"),
        limit=data.get("count_captions"),
    )


def spoken_words(data: Any, source: Source, fields: Iterable[str] = ()) -> WordList:
    """Lists all words of class names and of the whole texts in a batch, templates included, alphabetically.

    Args:
      data: `config.data`; `words`, `extra_words` and `count_captions` (of each kind of text) as in `counted_words`.
      source: the source of the texts and the class names.
      fields: the batch fields; the texts of those in `SPOKEN` are read.
    """
    if data.get("words"):
        return _given(data["words"])
    fields = set(fields)
    words = set(_names(source)) | template_words(data, fields)
    for kind in {SPOKEN[field] for field in SPOKEN.keys() & fields}:
        for text in itertools.islice(source.texts(kind), data.get("count_captions")):
            words.update(split_words(text))
    return WordList([*sorted(words), *(data.get("extra_words") or ())])


def template_words(data: Any, fields: Collection[str]) -> set[str]:
    """Returns the words of CLIP's templates if a batch field fills these with words of captions, else none."""
    if "prompts" in fields or ("tokens" in fields and data.get("caption_text") == "prompt"):
        return {word for template in IMAGENET for word in split_words(template.replace(PLACE, " "))}
    return set()


def _given(path: Any) -> WordList:
    """Reads `data.words`, which must list at least one word besides the padding."""
    words = WordList.load(path)
    if len(words) < 2:
        raise UserError(f"data.words: {path} lists no word")
    return words


def _names(source: Source) -> list[str]:
    return [word for name in source.classes.flat()[0] for word in split_words(name)]
