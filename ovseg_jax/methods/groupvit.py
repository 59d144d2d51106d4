"""GroupViT as published, without training: the baseline of papers/002.

`config.groupvit`: `image` and `text`, fields of `models.groupvit.GroupVitImage` and of its text tower that differ from
the published model's; `init`, the weights (see `pretrained.hub`); `tokenizer`, the folder of CLIP's tokeniser if it is
not with the weights; `mean` and `std` of pixels; `prompt`, the templates of class names, see
`towers.templates.read_templates`; `normalise`, whether a name's embeddings are unit vectors before they are averaged
over the templates (published: no).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.groupvit import SHARPNESS, GroupVitImage, GroupVitText
from ovseg_jax.models.text_towers import CLIPText
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Trainable, Variables
from ovseg_jax.towers.features import embed_in_chunks
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import fill, read_templates
from ovseg_jax.towers.vocabulary import spoken_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.tokenizers import PieceTokenizer, keep_tokenizer, load_tokenizer
from ovseg_jax.vocab.words import WordList

SPACE = "groupvit"


class GroupViT(Trainable, Segmenting):
    """A method that is not trained: `config.steps` is 0. Its proposals are the groups.

    Args:
      config: `groupvit`, see above.
      words: not used.
      classes: not used.

    Raises:
      UserError: a value in the config is invalid.
    """

    modes = ("predicted",)
    frozen = ("^groupvit/",)

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that a training step would read."""
        del config
        return ("image",)

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        return {"groupvit": keys("image text init tokenizer mean std prompt normalise")}

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of the class names; the text side has pieces of its own."""
        return spoken_words(config.data, source).words

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del words, classes
        if config.steps:
            raise UserError(f"steps={config.steps}: the method groupvit is not trained, so its steps are 0")
        self.config = config.groupvit
        fields: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in self.config.image.items()
        }
        try:
            self.image = GroupVitImage(**fields)
            tower = CLIPText(**{**dict(width=256, heads=4, embed_dim=0), **self.config.text.to_dict()})
        except TypeError as error:
            raise UserError(f"config.groupvit: {error}") from error
        self.text = GroupVitText(tower, self.image.embed_dim, self.image.projection)
        templates = read_templates(self.config.prompt)
        if isinstance(templates, Prompt):
            raise UserError(
                f"groupvit.prompt={self.config.prompt}: the method groupvit takes no learned prompt"
            )
        self._templates = templates
        self._encode = jax.jit(self.text.apply)
        self._tokenizer: PieceTokenizer | None = None

    @property
    def tokenizer(self) -> PieceTokenizer:
        """The tokeniser of the text side, read at the first access."""
        if self._tokenizer is None:
            from ovseg_jax.pretrained.hub import find

            where = self.config.get("tokenizer", "") or self.config.init
            if not where:
                raise UserError("GroupViT needs a tokeniser: set groupvit.tokenizer or groupvit.init")
            path = find(where)
            folder = path if path.is_dir() else path.parent
            self._tokenizer = load_tokenizer(folder, length=self.text.tower.length)
        return self._tokenizer

    def init(self, rng: jax.Array) -> Variables:
        """Creates `groupvit` {"image", "text"}, and no parameters."""
        image_rng, text_rng = jax.random.split(rng)
        side = self.image.patch * self.image.grid[0]
        image = self.image.init(image_rng, jnp.zeros((1, side, side, 3)))
        text = self.text.init(text_rng, jnp.zeros((1, 2), jnp.int32))
        return {"params": {}, "groupvit": {"image": dict(image), "text": dict(text)}}

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights that `init` of the config names; {} if it names none."""
        if not self.config.init:
            return {}
        from ovseg_jax.pretrained.load import load

        own = jax.eval_shape(self.init, jax.random.key(0))["groupvit"]
        pixels = tuple(self.config.mean), tuple(self.config.std)
        image = load(self.config.init, self.image, own["image"], pixels=pixels)
        return {"groupvit": {"image": image, "text": load(self.config.init, self.text, own["text"])}}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Raises an error, since there are no steps."""
        raise UserError("the method groupvit is not trained")

    def save_assets(self, workdir: epath.Path) -> None:
        """Saves the tokeniser."""
        keep_tokenizer(self.tokenizer, workdir)

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s s 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts the groups; padding beyond `image_size` is the mean colour."""
        mean, std = (jnp.asarray(list(self.config[name]), jnp.float32) for name in ("mean", "std"))
        at = [jnp.arange(side) < image_size[:, i, None] for i, side in enumerate(image.shape[1:3])]
        inside = at[0][:, :, None, None] & at[1][:, None, :, None]
        x = jnp.where(inside, (image.astype(jnp.float32) / 255 - mean) / std, 0)
        out: Any = self.image.apply(variables["groupvit"]["image"], x)
        logits = SHARPNESS * (out.assignment - 0.5)
        scale = jnp.broadcast_to(out.scale, image.shape[:1])
        return Prediction(logits, {SPACE: unit(out.groups)}, {}, None, {SPACE: unit(out.pooled)}, scale)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names by the mean over the templates as unit vectors."""
        weights = variables["groupvit"]["text"]

        def embed(filled: Sequence[str]) -> Array:
            ids, _ = self.tokenizer(list(filled))
            return jnp.asarray(self._encode(weights, jnp.asarray(np.asarray(ids))))

        total: Any = 0
        for template in self._templates:
            one = embed_in_chunks(embed, [fill(template, name) for name in texts])
            total = total + (unit(one) if self.config.normalise else one)
        return {SPACE: unit(total)}
