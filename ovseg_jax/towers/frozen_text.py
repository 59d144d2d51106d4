"""A published text tower that is never trained, as in OpenSeg (papers/004, 3.2 and 4.1)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models.text_towers import CLIPText, TextOutput, text_tower
from ovseg_jax.towers.prompt_file import ANCHOR, FILE, Prompt, save_prompt
from ovseg_jax.towers.templates import fill, read_templates
from ovseg_jax.vocab.words import WordList

BATCH = 64
LENGTH = 77  # maximum of tokens, which suffices for names and captions; BERT would take 512


TEXT_TOWER = "text_tower"  # the folder for the frozen tower inside of a run


class FrozenText:
    """A text side with a frozen tower; words are embedded once and looked up in training.

    Other texts are embedded when they are used. The tower is not one of the variables, since it would only waste memory
    on the devices of a training run.

    Args:
      config: `tower`, a name of `text_towers.PRESETS`; `init`, its weights and its tokeniser, see `pretrained.hub`;
        `prompt` of every text: "", templates (`towers.templates`), whose unit embeddings are averaged, or for a
        `CLIPText` the file of a learned prompt (`towers.prompt_file`).
      words: the vocabulary.
      dim: the dimension D of the text space.

    Raises:
      UserError: the tower is unknown or has another dimension, `init` is missing, or the prompt is neither templates
        nor a prompt of this tower.
    """

    learned = False

    def __init__(self, config: ConfigDict, words: WordList, dim: int):
        self.words, self.dim, self.source = words, dim, str(config.get("init", ""))
        self.tower = text_tower(config.tower)
        if not self.source:
            raise UserError(
                f"text.tower={config.tower} needs text.init, its weights: a folder, or a name on the hub"
            )
        width = jax.eval_shape(self._forward)[1].pooled.shape[-1]
        if width != dim:
            raise UserError(
                f"text.tower={config.tower} has embeddings of {width} numbers: set model.embed_dim={width}"
            )
        self.templates: tuple[str, ...] = ()
        self.prompt = self._read_prompt(config.tower, config.get("prompt", ""))
        self._loaded: Any = None

    def _read_prompt(self, name: str, path: Any) -> Prompt | None:
        if not path:
            return None
        prompt = read_templates(path)
        if not isinstance(prompt, Prompt):
            self.templates = prompt
            return None
        if not isinstance(self.tower, CLIPText):
            raise UserError(
                f"text.prompt={path}: the text tower {name} cannot use a prompt, only towers of CLIP's kind can"
            )
        prompt.check_width(self.tower.width)
        if prompt.layout.specific:
            raise UserError(
                f"text.prompt={path} has a context for each of its classes, but none for other texts: take a prompt "
                "with a shared context"
            )
        return prompt

    def init(self, rng: jax.Array) -> dict[str, Array]:
        """Returns the table of words before `pretrained` fills it."""
        del rng
        return {"table": jnp.zeros((len(self.words), self.dim))}

    def pretrained(self) -> dict[str, np.ndarray]:
        """Returns the table of unit vectors of all words; zeros for the first, which is padding."""
        table = np.asarray(self.encode({}, self.words.words[1:]))
        return {"table": np.concatenate([np.zeros((1, self.dim), np.float32), table])}

    def encode(self, params: Any, texts: Sequence[str]) -> Float[Array, "k d"]:
        """Embeds texts as unit vectors: unchanged (as in the released model), or in the prompt or the templates.

        Raises:
          UserError: there is no text, or an empty one, or the weights or the tokeniser cannot be read.
        """
        del params
        # A separate thread is outside of the mesh in use and of any trace, so that this runs immediately, on this
        # process's own device.
        with ThreadPoolExecutor(1) as thread:
            return jnp.asarray(thread.submit(self._vectors, texts).result())

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        if not len(texts):
            raise UserError("no labels were given: give at least one, such as --labels='dog; grass,lawn'")
        if not all(text.strip() for text in texts):
            raise UserError("an empty label was given: every label needs at least one word")
        if not self.templates:
            return self._embed(texts)
        parts = (self._embed([fill(template, text) for text in texts]) for template in self.templates)
        return np.asarray(unit(jnp.asarray(sum(parts))))

    def _embed(self, texts: Sequence[str]) -> np.ndarray:
        tokenizer, apply, weights = self._all()
        weights = jax.device_put(weights)  # Only on the device during this call.
        rows = []
        for at in range(0, len(texts), BATCH):
            part = texts[at : at + BATCH]
            ids, valid = (np.pad(x, ((0, BATCH - len(part)), (0, 0))) for x in tokenizer(part))
            valid[len(part) :, 0] = True  # Rows with only padding would divide by zero.
            rows.append(np.asarray(apply(weights, ids, valid))[: len(part)])
        return np.concatenate(rows)

    def _forward(self) -> tuple[Any, TextOutput]:
        ids, valid = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)
        variables = self.tower.init(jax.random.key(0), ids, valid)
        out: Any = self.tower.apply(variables, ids, valid)
        return variables, out

    def save(self, folder: epath.PathLike, dtype: Any = np.float32) -> None:
        """Saves the tower, so that it can be loaded without its original files.

        It writes the files of `write_text_tower`, and `prompt.safetensors` if there is a prompt.
        """
        from ovseg_jax.pretrained.hub import find
        from ovseg_jax.towers.text_files import write_text_tower
        from ovseg_jax.vocab.tokenizers import load_tokenizer

        folder = epath.Path(folder)
        (folder / FILE).unlink(missing_ok=True)
        if self.prompt:
            folder.mkdir(parents=True, exist_ok=True)
            save_prompt(folder / FILE, self.prompt)
        tokenizer = load_tokenizer(_folder(find(self.source)), self.tower.tokens)
        write_text_tower(folder, tokenizer, self.tower, self.weights(), self.templates, dtype)

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the tower's parameters by path."""
        return flax.traverse_util.flatten_dict(self._all()[2]["params"], sep="/")

    def _all(self) -> tuple[Any, Any, Any]:
        """Returns the tokeniser, the compiled tower and its weights on the host, loaded once."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> tuple[Any, Any, Any]:
        from ovseg_jax.pretrained.hub import find
        from ovseg_jax.pretrained.load import load
        from ovseg_jax.vocab.tokenizers import load_tokenizer

        path = find(self.source)
        tokenizer = load_tokenizer(_folder(path), self.tower.tokens, min(self.tower.length, LENGTH))
        variables = load(self.source, self.tower, jax.eval_shape(self._forward)[0])
        tower: Any = self.tower
        if self.prompt is None:
            apply = jax.jit(lambda variables, ids, valid: unit(tower.apply(variables, ids, valid).pooled))
            return tokenizer, apply, variables
        self.prompt.check_tower(variables["params"]["pos_embedding"].ravel()[:ANCHOR].tolist())
        context = jnp.asarray(self.prompt.context[0])

        @jax.jit
        def apply_prompt(variables, ids, valid):
            x = tower.apply(variables, jnp.maximum(ids, 0), method="embed")
            x = jnp.where(ids[..., None] < 0, context[jnp.maximum(-1 - ids, 0)].astype(x.dtype), x)
            return unit(tower.apply(variables, ids, valid, x).pooled)

        return partial(self.prompt.layout.whole, tokenizer), apply_prompt, variables


def _folder(path: Path) -> Path:
    """Returns the folder of the tokeniser, which is that of the weights."""
    return path if path.is_dir() else path.parent
