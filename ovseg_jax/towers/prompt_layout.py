"""Where the learned vectors of a soft prompt stand (CoOp; papers/000, 3.1), and the tokens around them.

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
    """What stands behind the common beginning of each text.

    Attributes:
      ids: tokens, from the left; -1 - i stands for context vector i.
      length: how many.
      row: which row of a class-specific context belongs to the text; 0 for one that all share.
    """

    ids: Int[Any, "n l"]
    length: Int[Any, " n"]
    row: Int[Any, " n"]


class Layout(NamedTuple):
    """Where the context stands.

    Attributes:
      length: M.
      position: of the name, in POSITIONS: "end", "middle" or "front".
      specific: each class has a context of its own, so that the texts begin alike with [SOS] only.
    """

    length: int
    position: str = "end"
    specific: bool = False

    @property
    def shared(self) -> int:
        """Returns how many context vectors stand in front of all names, the same for all."""
        return 0 if self.specific else self.before

    @property
    def before(self) -> int:
        """Returns how many context vectors stand in front of a name."""
        return {"end": self.length, "middle": self.length // 2, "front": 0}[self.position]

    def tokens(self, tokenizer: PieceTokenizer, names: Sequence[str]) -> NameTokens:
        """Returns tokens of names as the original writes them: `_` is a space, a full stop behind.

        Raises:
          UserError: an empty name, or one that leaves no room for the context.
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
            pieces = whole[0, skip : int(all_valid.sum())].tolist()  # With the end.
            own = range(self.shared, self.before), range(self.before, self.length)
            codes = [[-1 - i for i in part] for part in own]
            row = codes[0] + pieces[:name_length] + codes[1] + pieces[name_length:]
            if (taken := 1 + self.shared + len(row)) > tokenizer.length:
                raise UserError(
                    f"the class name {given!r} with a prompt of {self.length} takes {taken} tokens; the text tower has "
                    f"{tokenizer.length}: shorten it"
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
        """Returns the texts that `tokens` gives without their common beginning, as a tokeniser gives them.

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
