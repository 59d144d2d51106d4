"""The common part of methods with a text side of their own: a learned one, or a frozen tower beside the checkpoints."""

from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.protocols import Text, Variables
from ovseg_jax.towers.frozen_text import TEXT_TOWER, FrozenText
from ovseg_jax.towers.text_table import TextTable
from ovseg_jax.vocab.words import WordList

SPACE = "text"


def text_side(config: ConfigDict, words: WordList, dim: int) -> FrozenText | TextTable:
    """Returns the text side of `config.text`: a frozen tower if it names one."""
    side = FrozenText if config.text.get("tower") else TextTable
    return side(config.text, words, dim)


class TextSide:
    """A base class before `Trainable` and `Segmenting`; the parameters of `text` are `variables["params"]["text"]`."""

    text: FrozenText | TextTable

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves a frozen text tower, which checkpoints do not hold."""
        if isinstance(self.text, FrozenText) and not (workdir / TEXT_TOWER / "config.json").exists():
            self.text.save(workdir / TEXT_TOWER)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds names and phrases as unit vectors."""
        return {SPACE: self.text.encode(variables["params"]["text"], texts)}

    def kept_space(self) -> tuple[str, int] | None:
        """Returns the space of a frozen text tower; a learned text side is fast."""
        return (SPACE, self.text.dim) if isinstance(self.text, FrozenText) else None
