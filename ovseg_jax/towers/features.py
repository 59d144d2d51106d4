"""Features of class names, under a method's own prompt, another learned prompt, or averaged over templates."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ovseg_jax.kernels.unit import unit
from ovseg_jax.protocols import Classifier, Text, Variables
from ovseg_jax.towers.clip import SPACE, Clip
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.templates import fill

TEXT_CHUNK = 1024


class TowerText(Classifier):
    """A CLIP text tower alone, which embeds names in given prompts; its variables are the tower's weights."""

    def __init__(self, clip: Clip):
        self.clip = clip

    def embed_phrases(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Embeds texts unchanged."""
        return {SPACE: self.clip.embed_phrases(variables, texts)}

    def embed_prompt(self, variables: Variables, prompt: Prompt, texts: Sequence[str]) -> Text:
        """Embeds class names in a learned prompt."""
        return {SPACE: self.clip.embed_prompt(variables, prompt, texts)}


def embed_in_chunks(embed: Callable[[Sequence[str]], Any], texts: Sequence[str]) -> Any:
    """Embeds any number of texts, a bounded number at a time, in equal shapes for a single compilation.

    Args:
      embed: returns arrays [T ...], or a tree of these.
      texts: at least one.
    """
    if len(texts) <= TEXT_CHUNK:
        return embed(list(texts))
    padded = [*texts, *[texts[0]] * (-len(texts) % TEXT_CHUNK)]
    chunks = [embed(padded[i : i + TEXT_CHUNK]) for i in range(0, len(padded), TEXT_CHUNK)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[: len(texts)], *chunks)


def class_features(
    method: Classifier,
    variables: Variables,
    names: Sequence[str],
    templates: Sequence[str] | Prompt | None = None,
) -> Text:
    """Computes features of names under the method's own prompt or another one, or their mean over templates.

    Args:
      method: the classifier.
      variables: its variables.
      names: the names.
      templates: hand-written prompts, a learned one, or None for the method's own.

    Raises:
      UserError: the learned prompt belongs to another text tower, or the method cannot use one.
    """
    if templates is None:
        if method.by_place:
            return method.embed_text(variables, list(names))
        return embed_in_chunks(partial(method.embed_text, variables), names)
    if isinstance(templates, Prompt):
        return method.embed_prompt(variables, templates, list(names))
    phrases = partial(method.embed_phrases, variables)
    # With few names, a call takes several templates: a call for each would be traced for its own number of tokens.
    calls = -(-len(templates) // max(1, TEXT_CHUNK // len(names)))
    together = -(-len(templates) // calls)
    filled = [*templates, *[templates[0]] * (-len(templates) % together)]
    parts = []
    for at in range(0, len(filled), together):
        texts = [fill(template, name) for template in filled[at : at + together] for name in names]
        real = min(together, len(templates) - at)
        found = embed_in_chunks(phrases, texts)
        parts.append(jax.tree.map(partial(_sum, real, len(names)), found))
    return jax.tree.map(_mean, *parts)


@partial(jax.jit, static_argnums=(0, 1))
def _sum(templates: int, names: int, x: Float[Array, "t d"]) -> Float[Array, "k d"]:
    """Adds up the features of each name under the first templates."""
    return x.reshape(-1, names, x.shape[-1])[:templates].sum(0)


@jax.jit
def _mean(*sums: Float[Array, "k d"]) -> Float[Array, "k d"]:
    return unit(jnp.asarray(sum(sums)))
