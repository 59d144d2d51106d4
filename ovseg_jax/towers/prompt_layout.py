"""Positions of a soft prompt's vectors in a text (CoOp; papers/000, 3.1), and the tokens around them.

end     [SOS] [context x M] [name] [.] [EOT]
middle  [SOS] [context x M/2] [name] [context x M/2] [.] [EOT]
front   [SOS] [name] [context x M] [.] [EOT]
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.tokenizers import PieceTokenizer

POSITIONS = ("end", "middle", "front")


class NameTokens(NamedTuple):
    """The tokens of texts after their shared prefix.

    Attributes:
      ids: tokens, left-aligned; -1 - i stands for context vector i.
      length: number of tokens.
      row: the row of a class-specific context for the text; 0 for a shared context.
    """

    ids: Int[Any, "n l"]
    length: Int[Any, " n"]
    row: Int[Any, " n"]


class Layout(NamedTuple):
    """The position of the context in a text.

    Attributes:
      length: the number M of context vectors.
      position: the position of the name, one of POSITIONS: "end", "middle" or "front".
      specific: whether each class has a context of its own; the shared prefix of the texts is then only [SOS].
    """

    length: int
    position: str = "end"
    specific: bool = False

    @property
    def shared(self) -> int:
        """The number of context vectors before all names that are shared by all classes."""
        return 0 if self.specific else self.before

    @property
    def before(self) -> int:
        """The number of context vectors before a name."""
        return {"end": self.length, "middle": self.length // 2, "front": 0}[self.position]

    def tokens(self, tokenizer: PieceTokenizer, names: Sequence[str]) -> NameTokens:
        """Tokenises names as the authors' code does: with `_` as a space and a full stop at the end.

        Raises:
          UserError: a name is empty, or leaves no room for the context.
        """
        if not len(names):
            raise UserError("no class names were given")
        plain = [" ".join(name.replace("_", " ").split()) for name in names]
        if empty := [i for i, name in enumerate(plain) if not name]:
            raise UserError(f"the name of class {empty[0]} is empty")
        rows = []
        skip = len(tokenizer.start)
        for name, given in zip(plain, names, strict=True):
            whole, all_valid = tokenizer([name + "."])
            name_length = int(tokenizer([name])[1].sum()) - skip - 1
            # The tokens of the name, the full stop and the end.
            pieces = whole[0, skip : int(all_valid.sum())].tolist()
            own = range(self.shared, self.before), range(self.before, self.length)
            codes = [[-1 - i for i in part] for part in own]
            row = codes[0] + pieces[:name_length] + codes[1] + pieces[name_length:]
            if (taken := 1 + self.shared + len(row)) > tokenizer.length:
                raise UserError(
                    f"the class name {given!r} with a prompt of {self.length} takes {taken} tokens, more than the "
                    f"{tokenizer.length} of the text tower: shorten it"
                )
            rows.append(row)
        length = np.array([len(row) for row in rows], np.int32)
        ids_ = np.zeros((len(rows), int(length.max())), np.int32)
        for i, row in enumerate(rows):
            ids_[i, : len(row)] = row
        return NameTokens(ids_, length, np.arange(len(rows), dtype=np.int32) * self.specific)

    def whole(
        self, tokenizer: PieceTokenizer, names: Sequence[str]
    ) -> tuple[Int[np.ndarray, "n l"], Bool[np.ndarray, "n l"]]:
        """Returns the texts of `tokens` including their shared prefix, as ids and mask of a tokeniser.

        Raises:
          UserError: see `tokens`.
        """
        rest, length, _ = self.tokens(tokenizer, names)
        first = [tokenizer.start[0], *(-1 - i for i in range(self.shared))]
        ids = np.full((len(rest), tokenizer.length), tokenizer.pad, np.int32)
        valid = np.arange(tokenizer.length) < len(first) + length[:, None]
        ids[:, : len(first)] = first
        ids[:, len(first) : len(first) + rest.shape[1]] = rest
        return np.where(valid, ids, tokenizer.pad), valid
