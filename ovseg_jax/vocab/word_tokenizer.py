"""One token a word: for small text towers that are trained from nothing, with no file to download."""

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.tokenizers import PieceTokenizer
from ovseg_jax.vocab.words import WordList, split_words


class WordTokenizer(PieceTokenizer):
    """Words of a list with CLIP's start and end around them: the end has the highest id, padding is 0.

    Args:
      words: the vocabulary.
      length: tokens in each row, start and end included.

    Calling it raises a UserError for a word that is not in the list.
    """

    def __init__(self, words: WordList, length: int):
        count = len(words)
        super().__init__(str, self._ids, (count,), count + 1, 0, length, count + 2)
        self.words = words

    def _ids(self, text: str) -> list[int]:
        found = split_words(text)
        if unknown := [word for word in found if word not in self.words]:
            raise UserError(
                f"the text {text!r} holds {unknown[0]!r}, which is none of the {len(self.words) - 1} words "
                "that this model was trained with"
            )
        return self.words.ids(found).tolist()
