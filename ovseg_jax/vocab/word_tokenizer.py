"""A tokeniser with one token per word, for small text towers that are trained from scratch."""

from pathlib import Path

from etils import epath

from ovseg_jax.errors import UserError
from ovseg_jax.files import record, verify
from ovseg_jax.vocab.tokenizers import PieceTokenizer, load_tokenizer
from ovseg_jax.vocab.words import WordList, split_words

WORDS_FILE = "words.json"  # in the folder of a run, or of a saved tokeniser


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

    def save(self, folder: epath.PathLike) -> None:
        """Writes its words into a folder, which is created if missing."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.words.save(folder / WORDS_FILE)
        record(folder / WORDS_FILE)

    def _ids(self, text: str) -> list[int]:
        found = split_words(text)
        if unknown := [word for word in found if word not in self.words]:
            raise UserError(
                f"the text {text!r} holds {unknown[0]!r}, which is not one of the {len(self.words) - 1} words "
                "that this model was trained with"
            )
        return self.words.ids(found).tolist()


def read_tokenizer(folder: Path, length: int, kind: str | None = None) -> PieceTokenizer:
    """Reads the tokeniser of a folder: one of words if it holds `words.json`, else a published one.

    Args:
      folder: its folder, or that of a run.
      length: tokens in each row.
      kind: of a published one, see `load_tokenizer`.

    Raises:
      UserError: there is none, or it is damaged.
    """
    if (folder / WORDS_FILE).exists():
        verify(folder / WORDS_FILE)
        return WordTokenizer(WordList.load(folder / WORDS_FILE), length)
    return load_tokenizer(folder, kind, length)
