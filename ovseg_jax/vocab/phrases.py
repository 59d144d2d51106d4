"""Lookup of the words of a phrase in a vocabulary."""

import difflib
from collections.abc import Mapping

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.lexicon import FUNCTION_WORDS
from ovseg_jax.vocab.words import split_words


def word_ids(text: str, index: Mapping[str, int]) -> list[int]:
    """Returns the vocabulary ids of a text's words.

    If the vocabulary holds the whole text, it is one word. Otherwise the text is split, plurals fall back to singulars,
    and words that no vocabulary holds (articles, prepositions) are skipped.

    Args:
      text: a name or phrase.
      index: word -> id; the first word is padding.

    Raises:
      UserError: the text is empty, or holds an unknown word (the message suggests similar ones).
    """
    phrase = " ".join(text.lower().split())
    if not phrase:
        raise UserError("an empty label was given: every label needs at least one word")
    if phrase in index:
        return [index[phrase]]
    found, unknown = [], []
    for token in split_words(phrase):
        if token in FUNCTION_WORDS:
            continue
        known = next((form for form in _forms(token) if form in index), None)
        if known is not None:
            found.append(index[known])
        else:
            unknown.append(token)
    if unknown or not found:
        word = (unknown or [phrase])[0]
        close = difflib.get_close_matches(word, list(index)[1:], 3, 0.6)
        hint = f"; close ones are: {', '.join(close)}" if close else ""
        raise UserError(
            f"label '{text}': this model's text side has never seen '{word}' (it knows {len(index) - 1} words{hint})"
        )
    return found


def _forms(token: str) -> list[str]:
    """Returns the token and its possible singulars."""
    forms = [token]
    if token.endswith("ies"):
        forms.append(token[:-3] + "y")
    if token.endswith("es"):
        forms.append(token[:-2])
    if token.endswith("s"):
        forms.append(token[:-1])
    return forms
