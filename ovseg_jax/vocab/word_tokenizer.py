"""A tokeniser with one token per word, for small text towers that are trained from scratch."""

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.tokenizers import PieceTokenizer
from ovseg_jax.vocab.words import WordList, split_words


class WordTokenizer(PieceTokenizer):
    """A tokeniser of a word list, with CLIP's start and end: the end has the highest id, padding is 0.

    Args:
      words: the vocabulary.
      length: tokens in each row, start and end included.

    Calling it raises a UserError for a text with a word that is not in the list.
    """

    def __init__(self, words: WordList, length: int):
        count = len(words)
        super().__init__(str, self._ids, (count,), count + 1, 0, length, count + 2)
        self.words = words

    def _ids(self, text: str) -> list[int]:
        found = split_words(text)
        if unknown := [word for word in found if word not in self.words]:
            raise UserError(
                f"the text {text!r} holds {unknown[0]!r}, which is not one of the {len(self.words) - 1} words "
                "that this model was trained with"
            )
        return self.words.ids(found).tolist()
