"""Our own towers in JAX, CLIP's, EVA-CLIP's or those of a run: scores of texts (the paper's EVA-CLIP), and tags.

eva02_clip_b16: 0.15 billion parameters, 0.6 GB in float32, MIT; clip_vitb16: the same, MIT; SigLIP's
siglip_vitb16: 0.2 billion, 0.8 GB, Apache-2.0. Images are spread over all devices of the process.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.annotation.plug import Picture, Plug, Texts
from ovseg_jax.annotation.plugs.hugging_face import class_names
from ovseg_jax.errors import UserError
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.experiment.load import load_run
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models import vit
from ovseg_jax.models.text_towers import text_tower
from ovseg_jax.parallel.sharding import make_mesh, on_host, replicated
from ovseg_jax.pretrained.hub import find
from ovseg_jax.pretrained.load import load
from ovseg_jax.pretrained.published import CLIP, pixels_of, weights_of
from ovseg_jax.protocols import Classifier, only
from ovseg_jax.towers.clip import Clip
from ovseg_jax.vocab.tokenizers import load_tokenizer
from ovseg_jax.vocab.words import WordList

_TEXTS = 256  # embedded at once, so that few shapes are compiled


class Towers(Plug):
    """Scores, which are cosines of images and texts, and tags, which are the classes with the largest cosines."""

    def __init__(
        self,
        model: str = "",
        tower: str = "eva02_clip_b16",
        text: str = "",
        size: int = 224,
        classes: str = "",
        prompt: str = "a photo of a {}",
        top: int = 10,
        lowest: float = -1.0,
        batch: int = 32,
    ):
        """Loads the towers.

        Args:
          model: the folder of a run that classifies images, or weights of `tower`; by default its published ones.
          tower: the name of the towers, unless `model` is a run.
          text: the name of the text tower if it differs, such as "siglip_base" for tower=siglip_vitb16; needs `model`.
          size: the side of the images in pixels; a run, or a tower with `text`, has its own.
          classes: for tags: a label file, one of the package, or "dog; grass".
          prompt: the template of a class.
          top: the most tags of an image.
          lowest: the least cosine of a tag.
          batch: images at once.

        Raises:
          UserError: the towers cannot be loaded.
        """
        self.mesh = make_mesh(devices=jax.local_devices())
        embed, phrases, weights, self.size = _load(model, tower, text, size, self.mesh)
        self.batch, self.top, self.lowest = -(-batch // self.mesh.size) * self.mesh.size, top, lowest
        step = jax.jit(
            lambda weights, batch: embed(weights, batch["image"]), out_shardings=replicated(self.mesh)
        )
        self._image = lambda batch: step(weights, batch)
        self._phrases = lambda texts: on_host(phrases(weights, texts))
        self.classes = class_names(classes) if classes else []
        self._class_vectors = self.embed_texts([prompt.format(name) for name in self.classes])

    def embed_images(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "n d"]:
        """Embeds images, resized to a square so that nothing is cut off, as unit vectors."""

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for k in range(0, len(pictures), self.batch):
                part = pictures[k : k + self.batch]
                images = np.zeros((self.batch, self.size, self.size, 3), np.uint8)
                for row, picture in zip(images, part, strict=False):
                    resized = Image.fromarray(picture.pixels).resize(row.shape[:2], Image.Resampling.BICUBIC)
                    row[:] = np.asarray(resized)
                yield {"image": images, "example_mask": np.arange(self.batch) < len(part)}

        with jax.set_mesh(self.mesh):
            found = [*each_batch(batches(), self._image, self.mesh)]
        return np.concatenate(found)[: len(pictures)]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Embeds texts as unit vectors."""
        if not texts:
            return np.zeros((0, 1), np.float32)
        padded = [*texts, *[texts[0]] * (-len(texts) % _TEXTS)]
        with jax.set_mesh(self.mesh):
            parts = [self._phrases(padded[k : k + _TEXTS]) for k in range(0, len(padded), _TEXTS)]
        return np.concatenate(parts)[: len(texts)]

    def scores(self, pictures: Sequence[Picture], texts: Sequence[Texts]) -> list[Float[np.ndarray, "n"]]:
        """Returns the cosine of each image with each of its texts."""
        place = {text: k for k, text in enumerate(dict.fromkeys(t for own in texts for t in own))}
        vectors, images = self.embed_texts([*place]), self.embed_images(pictures)
        return [
            vectors[[place[t] for t in own]] @ image if own else np.zeros(0, np.float32)
            for image, own in zip(images, texts, strict=True)
        ]

    def tags(self, pictures: Sequence[Picture]) -> list[Texts]:
        """Returns the classes with the largest cosines."""
        if not self.classes:
            raise UserError("the plug 'towers' needs classes= to make tags")
        found = self.embed_images(pictures) @ self._class_vectors.T
        order = np.argsort(-found, axis=1, kind="stable")[:, : self.top]
        return [
            [self.classes[k] for k in row if own[k] >= self.lowest]
            for row, own in zip(order, found, strict=True)
        ]


def _load(model: str, tower: str, text: str, size: int, mesh: Any) -> tuple[Any, Any, Any, int]:
    """Returns the functions that embed images and phrases, their weights on the mesh, and the side of images."""
    if model and (epath.Path(model) / "checkpoints").exists():
        run = load_run(model, mesh, kind=Classifier, key="model", lacking="does not classify images")
        phrases = lambda weights, texts: only(run.method.embed_phrases(weights, texts))
        return run.method.embed_image, phrases, run.variables, int(run.config.data.image_size)
    if text:
        return _siglip(model, tower, text, mesh)
    parts = dict(image=dict(name=tower), text=dict(name=tower), tokenizer="", image_size=size)
    config = ConfigDict(
        dict(parts, init=model or weights_of(tower), mean=CLIP.mean, std=CLIP.std, logit_scale=100.0)
    )
    clip = Clip(config, WordList([]))
    weights = jax.device_put(clip.pretrained(), replicated(mesh))
    return clip.embed_image, clip.embed_phrases, weights, size


def _siglip(model: str, tower: str, text: str, mesh: Any) -> tuple[Any, Any, Any, int]:
    """Returns the same as `_load` for a ViT and a text tower that are not CLIP's, such as SigLIP's."""
    if tower not in vit.PRESETS or not model:
        raise UserError(
            f"towers with text={text} need model=FOLDER, and tower= one of {', '.join(vit.PRESETS)}"
        )
    image, reader, (mean, std) = vit.ViT(**vit.PRESETS[tower]), text_tower(text), pixels_of(tower)
    size = image.patch * image.grid[0]
    blank = jnp.zeros((1, size, size, 3)), (jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool))
    shapes = (
        jax.eval_shape(image.init, jax.random.key(0), blank[0]),
        jax.eval_shape(reader.init, jax.random.key(0), *blank[1]),
    )
    weights = load(model, image, shapes[0], pixels=(mean, std)), load(model, reader, shapes[1])
    tokenizer = load_tokenizer(find(model), reader.tokens)

    def embed(weights: Any, pixels: UInt8[Array, "b s s 3"]) -> Float[Array, "b d"]:
        x = (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
        out: Any = image.apply(weights[0], x)
        return unit(out.pooled)

    @jax.jit
    def read(weights: Any, ids: Int[Array, "n l"], valid: Bool[Array, "n l"]) -> Float[Array, "n d"]:
        out: Any = reader.apply(weights[1], ids, valid)
        return unit(out.pooled)

    phrases = lambda weights, texts: read(weights, *map(jnp.asarray, tokenizer(texts)))
    return embed, phrases, jax.device_put(weights, replicated(mesh)), size
