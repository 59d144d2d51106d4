"""The data side of methods on CLIP's towers: images of one class, or texts by the towers' tokeniser."""

from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from ovseg_jax.data.fields import batch_fields
from ovseg_jax.data.source_base import Source
from ovseg_jax.protocols import Classifier, Trainable
from ovseg_jax.towers.clip import SPACE, Clip
from ovseg_jax.towers.vocabulary import spoken_words
from ovseg_jax.vocab.tokenizers import PieceTokenizer, keep_tokenizer


class OnClip(Trainable, Classifier):
    """A base class for methods on the towers `clip`."""

    clip: Clip

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads: cached features in place of images, if there are any."""
        return ("feature" if config.data.get("cache_features", 0) else "image", "label")

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words that a tokeniser of words needs; those of texts only if it is built from them."""
        own = config.towers.get("tokenizer", "") == "words"
        return spoken_words(config.data, source, batch_fields(cls, config) if own else ()).words

    def kept_space(self) -> tuple[str, int] | None:
        """Returns the space of the towers, see `protocols.Segmenting`."""
        return SPACE, self.clip.dim

    @property
    def tokenizer(self) -> PieceTokenizer:
        """The tokeniser of the text tower, read at the first access."""
        return self.clip.tokenizer

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves the tokeniser, unless it is one of the run's own words."""
        if self.clip.config.get("tokenizer", "") != "words":
            keep_tokenizer(self.tokenizer, workdir)
