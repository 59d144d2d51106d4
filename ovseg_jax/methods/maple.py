"""MaPLe (Khattak et al. 2023; papers/000, tables 1 and 2): prompts in both towers, the images' derived from the texts'.

    text    [SOS] [context x M] [fixed words] [name] [.] [EOT], with a new context before each of the first J blocks
    image   [class token] [patches] [M tokens], likewise; those of block j are a learned linear map of context j

As in muzairkhattak/multimodal-prompt-learning, the context is initialised by the first M words of `config.prompt.init`
("a photo of a"), and the other words stay fixed ("of a"); deeper contexts start from noise, and all their linear maps
from the same values. `config.prompt`: `length` M, `depth` J, `init`. `config.loss` is that of `PromptTuning`; the
authors take all classes in every step (`sample=0`).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.methods.prompt_tuning import NOISE, PromptTuning
from ovseg_jax.methods.vpt import prompted_tower
from ovseg_jax.models.linear import linear, linear_init
from ovseg_jax.protocols import Text, Variables
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.towers.prompt_file import is_prompt_file
from ovseg_jax.towers.prompt_layout import NameTokens
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList


class MaPLe(PromptTuning):
    """A method that trains contexts and the maps between them for frozen towers; see `PromptTuning`.

    Raises:
      UserError: the image tower is not a ViT, or a value in the config is invalid.
    """

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads; the prompt changes image features, so they cannot be cached."""
        del config
        return ("image", "label")

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        found = super().keys(config)
        fixed = keys("position specific", False) | keys("depth")
        return {**found, "prompt": found["prompt"] | fixed}

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        super().__init__(config, words, classes)
        self.depth, self._image_width = int(config.prompt.depth), prompted_tower(config, self.clip).width
        if self.depth > self.clip.text.layers:
            raise UserError(
                f"prompt.depth={self.depth} exceeds the {self.clip.text.layers} blocks of the text tower"
            )
        if self.layout.position != "end" or self.layout.specific:
            raise UserError(
                "MaPLe has one context before all names: set prompt.position=end and prompt.specific=False"
            )
        init = config.prompt.get("init", "")
        self._fixed = "" if is_prompt_file(init) else " ".join(init.split()[self.layout.length :])

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"prompt": {"context" [1 M d], "deep" [J-1 M d]}, "coupling": [J ...]}, and `towers`."""
        rng, deep_rng, first, rest = jax.random.split(rng, 4)
        variables = super().init(rng)
        prompt = dict(variables["params"]["prompt"])
        _, m, width = prompt["context"].shape
        if self.depth > 1:
            prompt["deep"] = NOISE * jax.random.normal(deep_rng, (self.depth - 1, m, width))
        maps = [linear_init(key, width, self._image_width) for key in (first, rest)]
        coupling = jax.tree.map(lambda a, b: jnp.stack([a, *[b] * (self.depth - 1)]), *maps)
        return {**variables, "params": {"prompt": prompt, "coupling": coupling}}

    def _from_words(self, words: str, table: np.ndarray) -> np.ndarray:
        return super()._from_words(" ".join(words.split()[: self.layout.length]), table)

    def _tokens(self, names: Sequence[str]) -> NameTokens:
        blank = lambda name: not name.replace("_", " ").strip()
        return super()._tokens([name if blank(name) else f"{self._fixed} {name}" for name in names])

    def embed_image(self, variables: Variables, image: UInt8[Array, "b h w 3"]) -> Float[Array, "b d"]:
        """Embeds images as unit vectors."""
        prompt = variables["params"]["prompt"]
        contexts = jnp.concatenate([prompt[key] for key in ("context", "deep") if key in prompt])
        tokens = jax.vmap(linear)(variables["params"]["coupling"], contexts)
        return self.clip.embed_image(variables["towers"], image, tokens)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names in the learned prompt as unit vectors."""
        prompt, tokens = variables["params"]["prompt"], self._tokens(texts)
        deep = prompt.get("deep")
        return {
            SPACE: self.clip.embed_names(variables["towers"], prompt["context"], self.layout, tokens, deep)
        }

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns no files, since the context of the text tower is not usable without the other prompts."""
        return {}
