"""Soft prompts for frozen CLIP towers: POMP (papers/000) and, with all classes in every step, CoOp.

`config.loss`: `sample` is K, the number of classes in the softmax of a step; 0 takes all N, which is CoOp. `correction`
(eq. 5), `proposal` (E.1) and `per_device` are those of `kernels.sampled_softmax`; `chunk` is the number of classes that
the text tower embeds at once if all N are used.
`config.prompt`: `length` M, `position` and `specific` (a context for each class), see `towers.prompt_layout.Layout`;
`init`, words or a prompt file (`towers.prompt_file`) to start from in place of noise.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.sampled_softmax import (
    Correction,
    frequency_proposal,
    full_softmax,
    sampled_softmax,
    similarity_proposal,
)
from ovseg_jax.methods.on_clip import OnClip
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes, on_host
from ovseg_jax.protocols import Aux, Batch, Text, Variables
from ovseg_jax.towers.clip import SPACE, TOWER_KEYS, Clip
from ovseg_jax.towers.prompt import even_order, likely_size, window_size
from ovseg_jax.towers.prompt_file import FILE, Prompt, is_prompt_file, load_prompt, save_prompt
from ovseg_jax.towers.prompt_layout import POSITIONS, Layout, NameTokens
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.words import WordList

PROPOSALS = ("uniform", "frequency", "similarity")
NOISE = 0.02  # appendix A
HARD_PROMPT = "a photo of a {}."  # E.1, and the zero-shot row of Table 1


def read_correction(value: str | float) -> Correction:
    """Parses `loss.correction`: "log10", "log", "log10_q", or a number, also as text."""
    if value in ("log10", "log", "log10_q"):
        return value  # type: ignore[return-value]
    try:
        return float(value)
    except ValueError:
        raise UserError(f"loss.correction={value!r} is not log10, log, log10_q or a number") from None


class PromptTuning(OnClip):
    """A method that trains a context for frozen towers. `config` is the whole config of a run.

    Args:
      config: `towers` (see `towers.clip.Clip`), `prompt` and `loss` (see above).
      words: the vocabulary, if the tokeniser is one of words.
      classes: the classes of the training data; the N are those with training examples, named by their first names.

    Raises:
      UserError: a value in the config is invalid.
    """

    frozen_towers = True
    frozen = ("^towers/",)
    by_place = True

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        sample = bool(config.loss.get("sample", 0))
        return {
            "towers": keys(TOWER_KEYS),
            "prompt": keys("length position specific init"),
            "loss": keys("sample")
            | keys("correction proposal per_device", sample)
            | keys("chunk", not sample),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        self.config, self.loss_config = config, config.loss
        self.examples = np.array([n for n in classes.examples if n] or [1] * len(classes))
        self.trained = np.flatnonzero(classes.examples or np.ones(len(classes)))
        self.all_names = tuple(classes.names[k] for k in self.trained.tolist())
        self.names = [names[0] for names in self.all_names]
        count = len(self.names)
        self.clip = Clip(config.towers, words)
        prompt = config.prompt
        self.layout = Layout(
            int(prompt.length), prompt.get("position", "end"), bool(prompt.get("specific", False))
        )
        if self.layout.position not in POSITIONS:
            raise UserError(f"prompt.position={self.layout.position!r} is not one of {', '.join(POSITIONS)}")
        if self.layout.length < 1:
            raise UserError(f"prompt.length={self.layout.length} is less than 1")
        proposal = self.loss_config.get("proposal", "uniform")
        if proposal not in PROPOSALS:
            raise UserError(f"loss.proposal={proposal!r} is not one of {', '.join(PROPOSALS)}")
        self.proposal = proposal
        sample = int(self.loss_config.get("sample", 0))
        if sample and not 2 <= sample <= count:
            raise UserError(
                f"loss.sample={sample} is not between 2 and {count}, the number of classes, nor 0, which takes all"
            )
        self.sample = sample
        self.correction = read_correction(self.loss_config.get("correction", "log10"))
        if self.correction == "log10_q" and proposal == "uniform":
            raise UserError("loss.correction=log10_q needs loss.proposal=frequency or similarity")

    @functools.cached_property
    def table(self) -> tuple[NameTokens, np.ndarray]:
        """The tokens of the N classes in an even order (see `even_order`), and that order."""
        tokens = self._tokens(self.names)
        order = even_order(tokens.length)
        return NameTokens(*(x[order] for x in tokens)), order

    @functools.cached_property
    def place(self) -> np.ndarray:
        """The position of each class of the source in the table."""
        place = np.zeros(int(self.trained[-1]) + 1, np.int32)
        place[self.trained[self.table[1]]] = np.arange(len(self.names))
        return place

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"prompt": {"context"}} and `towers`, which get no gradient."""
        towers_rng, rng = jax.random.split(rng)
        towers = self.clip.init(towers_rng)
        if self.proposal == "similarity":
            towers["hard"] = jnp.zeros((len(self.names), self.clip.dim))
        rows = len(self.names) if self.layout.specific else 1
        context = NOISE * jax.random.normal(rng, (rows, self.layout.length, self.clip.text.width))
        return {"params": {"prompt": {"context": context}}, "towers": towers}

    def pretrained(self) -> dict[str, Any]:
        """Returns the towers' weights, and the initial context if it comes from words or a file."""
        towers = self.clip.pretrained()
        found: dict[str, Any] = {"towers": towers} if towers else {}
        if towers and self.proposal == "similarity":
            hard = self.clip.embed_phrases(towers, [HARD_PROMPT.format(name) for name in self.names])
            towers["hard"] = np.asarray(hard)[self.table[1]]
        init = self.config.prompt.get("init", "")
        if is_prompt_file(init):
            found["params"] = {"prompt": {"context": self._from_file(init, towers)}}
        elif init and towers:
            context = self._from_words(init, towers["text"]["Embed_0"]["embedding"])
            found["params"] = {"prompt": {"context": context}}
        return found

    def _from_file(self, path: str, towers: Mapping[str, Any]) -> np.ndarray:
        prompt, own = load_prompt(path), self.layout
        prompt.check_width(self.clip.text.width)
        if towers:
            prompt.check_tower(self.clip.anchor(towers))
        if prompt.layout[:2] != own[:2]:
            length, position, _ = prompt.layout
            raise UserError(f"prompt.init={path}: set prompt.length={length} and prompt.position={position}")
        if not prompt.layout.specific:
            return np.repeat(prompt.context, len(self.names) if own.specific else 1, 0)
        if not own.specific:
            raise UserError(f"prompt.init={path} has a context for each class: set prompt.specific=True")
        return prompt.context[prompt.rows(self.names)]

    def _from_words(self, words: str, table: np.ndarray) -> np.ndarray:
        tokenizer = self.clip.tokenizer
        ids, valid = tokenizer([words])
        ids = ids[0, len(tokenizer.start) : int(valid.sum()) - 1]
        if len(ids) != self.layout.length:
            raise UserError(f"prompt.init={words!r} has {len(ids)} tokens: set prompt.length={len(ids)}")
        rows = len(self.names) if self.layout.specific else 1
        return np.broadcast_to(np.asarray(table)[ids], (rows, *table[ids].shape)).copy()

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes eq. 4 with eq. 5, or eq. 2 if `sample` is 0; the mean over the images."""
        tokens = self.table[0]
        image = self._features(variables, batch, rng)
        valid, labels = batch["example_mask"], jnp.asarray(self.place)[batch["label"]]
        weights = {"text": variables["towers"]["text"]}
        params = variables["params"]["prompt"], weights
        axes = active_batch_axes()
        if not self.sample:
            chunk = min(int(self.loss_config.get("chunk", 256)), len(self.names))
            size = window_size(tokens.length, chunk)
            encode = lambda p, tokens: self._encode(p[0], p[1], tokens, size)
            out = full_softmax(
                encode,
                params,
                tokens,
                image,
                labels,
                valid,
                self.logit_scale(variables),
                chunk=chunk,
                batch_axes=axes,
            )
        else:
            log_weights, share = self._proposal(variables, image, valid)
            views = int(self.config.data.get("views", 1))

            def encode(p, tokens_):
                size = likely_size(tokens.length, len(tokens_.length), share)
                return self._encode(p[0], p[1], tokens_, size, may_exceed=True)

            out = sampled_softmax(
                encode,
                params,
                tokens,
                image,
                labels,
                valid,
                rng,
                self.logit_scale(variables),
                sample=self.sample,
                correction=self.correction,
                log_weights=log_weights,
                per_device=bool(self.loss_config.get("per_device", False)),
                views=views
                if labels.shape[0] % (views * max(1, jax.sharding.get_abstract_mesh().size)) == 0
                else 1,
                batch_axes=axes,
            )
        loss = out.loss / jnp.maximum(out.pairs, 1)
        return loss, Aux({"loss": (out.loss, out.pairs), "accuracy": (out.correct, out.pairs)}, {})

    def _tokens(self, names: Sequence[str]) -> NameTokens:
        return self.layout.tokens(self.clip.tokenizer, names)

    def _encode(
        self, prompt: Mapping[str, Array], weights: Any, tokens: NameTokens, size: int, **how: Any
    ) -> Array:
        return self.clip.encode(
            weights, prompt["context"], self.layout, tokens, size, prompt.get("deep"), **how
        )

    def _features(self, variables: Variables, batch: Batch, rng: jax.Array) -> Float[Array, "b d"]:
        if "feature" in batch:
            return batch["feature"]
        network = in_parts(self._forward, self.config.get("accumulate", 1))
        return network(variables, {"image": batch["image"]}, rng)[0]

    def _forward(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[Array, tuple, dict]:
        del rng
        return self.embed_image(variables, batch["image"]), (), {}

    def _proposal(
        self, variables: Variables, image: Array, valid: Array
    ) -> tuple[Array | None, np.ndarray | None]:
        """Returns the logits of the negatives' proposal, and its probabilities if they are constant."""
        if self.proposal == "frequency":
            count = self.examples[self.table[1]]
            return frequency_proposal(jnp.asarray(count)), count / count.sum()
        if self.proposal == "similarity":
            return similarity_proposal(
                image, variables["towers"]["hard"], valid, self.logit_scale(variables)
            ), None
        return None, None

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds class names in the learned prompt as unit vectors.

        Raises:
          UserError: the prompt is class-specific and lacks one of the classes.
        """
        return self.embed_prompt(variables, self.prompt(variables), texts)

    def embed_prompt(self, variables: Variables, prompt: Prompt, texts: Sequence[str]) -> Text:
        """Embeds class names in another learned prompt as unit vectors.

        Raises:
          UserError: see `Clip.embed_prompt`.
        """
        return {SPACE: self.clip.embed_prompt(variables["towers"], prompt, texts)}

    def artifacts(self, variables: Variables) -> dict[str, Callable[[epath.Path], None]]:
        """Returns the writer of the learned prompt, see `protocols.Trainable`."""
        prompt = self.whole_prompt(variables)
        return {FILE: lambda path: save_prompt(path, prompt)}

    def whole_prompt(self, variables: Variables) -> Prompt:
        """Returns the learned prompt for a file: whole on every process, with the anchor of its tower."""
        prompt = self.prompt(variables)
        return dataclasses.replace(
            prompt, context=on_host(prompt.context), anchor=self.clip.anchor(variables["towers"])
        )

    def prompt(self, variables: Variables) -> Prompt:
        """Returns the learned prompt."""
        names = self.all_names if self.layout.specific else ()
        context = variables["params"]["prompt"]["context"]
        return Prompt(context, self.layout, names, self.config.towers.text.name)
