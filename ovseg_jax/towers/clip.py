"""CLIP (Radford et al. 2021) and similar models: an image tower, a text tower and a temperature."""

import copy
import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import to_json
from ovseg_jax.errors import UserError
from ovseg_jax.files import forget, record, write_recorded
from ovseg_jax.kernels.cpu_convs import one_by_one
from ovseg_jax.kernels.unit import unit
from ovseg_jax.models import clip_resnet, convnext, eva, vit
from ovseg_jax.models.alike import init_shapes
from ovseg_jax.models.clip_resnet import ClipResNet
from ovseg_jax.models.convnext import ConvNeXt
from ovseg_jax.models.convpass import ADAPTERS, with_convpass
from ovseg_jax.models.eva import Eva
from ovseg_jax.models.hooks import HOOKS
from ovseg_jax.models.openseg import inside, normalise
from ovseg_jax.models.small import SmallBackbone
from ovseg_jax.models.text_towers import PRESETS, CLIPText, SiglipText, TextTower, TipsText
from ovseg_jax.models.tower import project
from ovseg_jax.models.vit import ViT
from ovseg_jax.parallel.sharding import on_host
from ovseg_jax.pretrained.files import read_arrays, write_safetensors
from ovseg_jax.pretrained.published import CLIP
from ovseg_jax.towers.packed_text import stacked, unstacked
from ovseg_jax.towers.prompt import encode_names, even_order, phrase_tokens, window_size
from ovseg_jax.towers.prompt_file import ANCHOR, Prompt
from ovseg_jax.towers.prompt_layout import Layout, NameTokens
from ovseg_jax.towers.shared_text import Trees, encode_trees, trees
from ovseg_jax.towers.text_files import write_text_tower
from ovseg_jax.vocab.tokenizers import PieceTokenizer, load_tokenizer
from ovseg_jax.vocab.word_tokenizer import WORDS_FILE, WordTokenizer
from ovseg_jax.vocab.words import WordList

TOWERS = "towers"  # in the folder of a run of method "clip"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
# Of a config's `towers`.
TOWER_KEYS = "image text adapter init tokenizer image_size mean std logit_scale dtype"
ADAPTER_KEYS = ("width", "activation", "dropout", "scale")
# Of presets of `models.vit` whose image embeddings are in the space of texts.
ALIGNED = ("clip_", "openclip_", "siglip_", "tipsv2_")
# The number of names that the text tower embeds at once.
GROUP = 256
# The number of patches from which on a CPU computes images one by one.
MANY = 512
MEAN, STD = CLIP
TEXTS: dict[str, type[TextTower]] = {"clip": CLIPText, "siglip": SiglipText, "tips": TipsText}


class SmallImageTower(nn.Module):
    """A small tower for images of 32 pixels: `SmallBackbone` and a projection of its whole last map.

    With a mean over positions instead of the whole map, outlines are learned far more slowly.

    Attributes:
      embed_dim: channels of the embedding.
      width, levels, blocks, stem: of the backbone.
      dtype: compute type.
    """

    embed_dim: int = 64
    width: int = 48
    levels: int = 2
    blocks: int = 1
    stem: str = "full"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
        """Computes the embedding of each image; all images have one size."""
        backbone = SmallBackbone(self.width, self.levels, self.blocks, self.stem, self.dtype, name="backbone")
        last = backbone(x)[f"c{self.levels + 1}"]
        head = nn.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, name="head")
        return head(last.reshape(last.shape[0], -1))


class Clip:
    """The two towers that a config describes; their weights are arguments of the methods.

    Weights are {"image": {"params": ..., other collections}, "text": parameters, for a `CLIPText` as
    `packed_text.stacked` has them, "scale": log(1/τ)}. Learned prompts need a `CLIPText`.

    Args:
      config: `image`, a dict with `name` (a CLIP preset of `models.vit`, `models.clip_resnet`, `models.convnext` or
        `models.eva`, or "vit", "convnext", "eva" or "small") and fields of its module; `text`, the same for
        `models.text_towers` ("clip" for a CLIPText of these fields, "siglip" for a SiglipText, "tips" for a TipsText);
        `adapter`, the arguments of `models.convpass.with_convpass`, for adapters in the image tower; `init`, the
        weights (see `pretrained.hub`, or the folder of a run of method "clip"), "" for random ones; `tokenizer`, the
        folder of the tokeniser if it is not with the weights, the folder of a run for its words, or "words" for the
        words of this run; `image_size` in pixels; `mean` and `std` of pixels; `logit_scale`, 1/τ of weights that have
        none; `dtype`.
      words: the vocabulary, if the tokeniser is one of words.

    Raises:
      UserError: a tower or field is unknown, or the towers have different dimensions.
    """

    def __init__(self, config: ConfigDict, words: WordList):
        self.config, self._words = config, words
        self.dtype = jnp.dtype(config.get("dtype", "float32"))
        self.image = image_tower(config.image, self.dtype)
        if config.get("adapter"):
            self.image = self.adapted()
        options = dict(config.text.items())
        name = options.pop("name")
        known: dict[str, tuple[type[TextTower], dict[str, Any]]] = {k: (t, {}) for k, t in TEXTS.items()}
        known |= {k: made for k, made in PRESETS.items() if made[0] in TEXTS.values()}
        if name not in known:
            raise UserError(f"towers.text.name={name!r} is not a text tower of CLIP's kind")
        kind, published = known[name]
        self._tokenizer: PieceTokenizer | None = self._of_words()
        if hooks := sorted(options.keys() & set(HOOKS)):
            raise UserError(f"towers.text of {name!r} has no key {hooks[0]!r}")
        if name == "clip" and self._tokenizer:
            options["vocab_size"] = self._tokenizer.vocab_size
        try:
            self.text: TextTower = kind(**{**published, **options}, dtype=self.dtype)
        except TypeError as error:
            raise UserError(f"towers.text: {error}") from error
        size = int(config.get("image_size", 224))
        # Kept, with the shapes of the variables, since tracing a tower takes a second.
        shape, self._image_shapes = init_shapes(self.image, jnp.zeros((1, size, size, 3)))
        self.dim = _pooled(shape).shape[-1]
        text_dim = getattr(self.text, "embed_dim", self.text.width)
        if self.dim != text_dim:
            raise UserError(f"towers: images have embeddings of {self.dim} numbers, but texts of {text_dim}")
        self._encode_groups = jax.jit(self._groups, static_argnames=("layout", "size"))
        self._encode_trees = jax.jit(self._trees)
        self._encode_texts = jax.jit(lambda params, ids, valid: unit(_text(self.text, params, ids, valid)))

    @property
    def tokenizer(self) -> PieceTokenizer:
        """The tokeniser of the text tower, read at the first access."""
        if self._tokenizer is None:
            from ovseg_jax.pretrained.hub import find

            where = self.config.get("tokenizer", "") or self.config.get("init", "")
            if not where:
                raise UserError("the text tower needs a tokeniser: set towers.tokenizer or towers.init")
            path = find(where)
            folder = path if path.is_dir() else path.parent
            self._tokenizer = load_tokenizer(folder, self.text.tokens, self.text.length)
        return self._tokenizer

    def _of_words(self) -> WordTokenizer | None:
        """Returns a tokeniser of the words of this run, or of another one; None if the config names another kind."""
        where, length = self.config.get("tokenizer", ""), int(self.config.text.get("length", 77))
        if where == "words":
            return WordTokenizer(self._words, length)
        if where and (epath.Path(where) / WORDS_FILE).exists():
            return WordTokenizer(WordList.load(epath.Path(where) / WORDS_FILE), length)
        return None

    def adapted(self, train: bool = False) -> nn.Module:
        """Returns the image tower with the adapters of the config, with their dropout if `train`.

        Raises:
          UserError: the tower can have none, or a key or value is invalid.
        """
        options = self.config.adapter.to_dict()
        if unknown := sorted(options.keys() - set(ADAPTER_KEYS)):
            raise UserError(
                f"towers.adapter has no key {unknown[0]!r}; known keys: {', '.join(ADAPTER_KEYS)}"
            )
        if not isinstance(self.image, ViT | Eva):
            raise UserError(
                f"towers.image.name={self.config.image.name!r}: only a ViT or an EVA takes adapters"
            )
        return with_convpass(self.image, **options, train=train)

    def without_adapters(self) -> "Clip":
        """Returns the same towers without adapters."""
        plain = copy.copy(self)
        if self.config.get("adapter"):
            plain.image = self.image.clone(adapter=None)
        return plain

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Draws random weights."""
        image_rng, text_rng = jax.random.split(rng)
        size = int(self.config.get("image_size", 224))
        image = self.image.init(image_rng, jnp.zeros((1, size, size, 3)))
        text = self.text.init(text_rng, jnp.zeros((1, 2), jnp.int32))["params"]
        scale = jnp.log(jnp.float32(self.config.get("logit_scale", 100.0)))
        return {"image": dict(image), "text": self._packed(text), "scale": scale}

    def _packed(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return stacked(params) if isinstance(self.text, CLIPText) else dict(params)

    def pretrained(self, *parts: str) -> dict[str, Any]:
        """Returns the weights that `init` of the config names, as NumPy arrays; {} if it names none.

        Args:
          *parts: "image" or "text", to read this tower alone; by default both.
        """
        init = self.config.get("init", "")
        if not init:
            return {}
        if (folder := towers_of(init)) is not None:
            return self._of_run(init, folder)
        from ovseg_jax.pretrained.load import load

        found, parts = {}, parts or ("image", "text")
        if "image" in parts:
            found["image"] = load(init, self.image, dict(self._image_shapes), pixels=self._pixels())
        if "text" in parts:
            text = init_shapes(self.text, jnp.zeros((1, 2), jnp.int32))[1]
            # Stacking copies the arrays of a `CLIPText`, except those of the last block and beside the blocks.
            found["text"] = self._packed(load(init, self.text, text, copy=False)["params"])
            found["text"] = jax.tree.map(
                lambda x: x if x.flags.owndata else np.array(x, order="C"), found["text"]
            )
        return found

    def _of_run(self, init: str, folder: epath.Path) -> dict[str, Any]:
        found = read_towers(folder)
        if isinstance(self.image, ViT | Eva):
            from ovseg_jax.pretrained.load import resize_patches

            arrays = resize_patches(flatten_dict(found["image"], sep="/"), self.image.patch)
            found["image"] = unflatten_dict(arrays, sep="/")
        flat = lambda tree: {path: np.shape(x) for path, x in flatten_dict(tree, sep="/").items()}
        given, own = flat(found), flat(jax.eval_shape(self.init, jax.random.key(0)))
        # Adapters may be new, and are then left out, as in `pretrained.load`.
        own = {path: shape for path, shape in own.items() if path in given or not re.search(ADAPTERS, path)}
        if wrong := sorted(path for path in given | own if given.get(path) != own.get(path)):
            raise UserError(
                f"towers.init={init} has other towers than this config: {wrong[0]} has the shape {given.get(wrong[0])} "
                f"there, {own.get(wrong[0])} here"
            )
        return found

    def embed_image(
        self,
        weights: Mapping[str, Any],
        image: UInt8[Array, "b h w 3"],
        prompts: Float[Array, "j m d"] | None = None,
    ) -> Float[Array, "b d"]:
        """Embeds images as unit vectors; `prompts` are tokens for a ViT."""
        x = self._normalised(image)
        more: dict[str, Any] = {} if prompts is None else {"prompts": prompts}
        return unit(_pooled(self.image.apply(weights["image"], x, **more)))

    def _normalised(self, image: Array) -> Array:
        mean, std = (jnp.asarray(values, jnp.float32) for values in self._pixels())
        return ((image.astype(jnp.float32) / 255 - mean) / std).astype(self.dtype)

    def check_patches(self, last: str) -> None:
        """Checks that the image tower has the features of patches that `embed_patches` returns.

        Raises:
          UserError: it has none, or `last` is not "value" for a pooling by attention, or not "" for a tower without
            attention.
        """
        if isinstance(self.image, ClipResNet):
            if last != "value":
                raise UserError("a ResNet of CLIP pools by attention, so that it has value features only")
        elif isinstance(self.image, ConvNeXt):
            if last:
                raise UserError("a ConvNeXt has no attention, so that it has activation features only")
        elif isinstance(self.image, ViT) and self.image.pool == "map":
            if last != "value":
                raise UserError("a ViT of SigLIP pools by attention, so that it has value features only")
        elif not isinstance(self.image, Eva) and not (
            isinstance(self.image, ViT) and self.image.pool == "cls"
        ):
            raise UserError(
                f"towers.image.name={self.config.image.name!r} has no features of patches in the space of the texts: "
                "take a ViT with a class token or of SigLIP, an EVA, or a ResNet or ConvNeXt of CLIP"
            )

    def embed_patches(
        self,
        weights: Mapping[str, Any],
        image: UInt8[Array, "b s t 3"],
        last: str,
        image_size: Int[Array, "b 2"] | None = None,
    ) -> Float[Array, "b h w d"]:
        """Embeds the patches of images in the space of the texts, see `embed_both`."""
        return self.embed_both(weights, image, last, image_size=image_size)[1]

    def embed_both(
        self,
        weights: Mapping[str, Any],
        image: UInt8[Array, "b s t 3"],
        last: str,
        rngs: dict[str, jax.Array] | None = None,
        image_size: Int[Array, "b 2"] | None = None,
    ) -> tuple[Float[Array, "b d"], Float[Array, "b h w d"]]:
        """Embeds images as unit vectors, and their patches without normalisation, by one forward pass.

        Args:
          weights: see `Clip`.
          image: images whose sides are multiples of a tower's patch.
          last: how patch tokens attend in the last block, see `models.transformer.Block`; "" for the map before the
            pooling, in the projection of the class token; "value" for attention pooling: its output for each patch
            alone (MaskCLIP's value path). `check_patches` says which towers have which.
          rngs: for a ViT or EVA with dropout.
          image_size: height and width that each image fills, beyond which patches of a ViT or EVA do not attend; None
            for the whole canvas.
        """
        x, shown = self._normalised(image), None
        if image_size is not None:
            mean, std = self._pixels()
            x = normalise(image, image_size, tuple(mean), tuple(std), self.dtype)
        out: Any
        if isinstance(self.image, ClipResNet | ConvNeXt):
            out = self.image.apply(weights["image"], x)
            return unit(out["pooled"]), out["dense"]
        assert isinstance(self.image, ViT | Eva)
        mapped = isinstance(self.image, ViT) and self.image.pool == "map"
        if image_size is not None:
            patch = self.image.patch
            grid = tuple(side // patch for side in x.shape[1:3])
            shown = inside(image_size, grid, (float(patch), float(patch)))
        tower = self.image.clone(last="" if mapped else last)

        def apply(x: Array, shown: Array | None) -> Any:
            return tower.apply(weights["image"], x, inside=shown, rngs=rngs)

        many = x.shape[1] * x.shape[2] >= MANY * tower.patch**2
        out = one_by_one(apply, x, shown) if many else apply(x, shown)
        if mapped:
            alone: Any = self.image.apply(
                weights["image"], out.tokens.reshape(-1, 1, self.image.width), method="pool_map"
            )
            return unit(out.pooled), alone.reshape(*out.tokens.shape[:3], -1)
        return unit(out.pooled), project(weights["image"]["params"], out.tokens)

    def save_text(
        self, folder: Path, weights: Mapping[str, Any], templates: Sequence[str], dtype: Any = np.float32
    ) -> None:
        """Saves the text tower for `ovseg_jax.torch`, see `write_text_tower`."""
        text = unstacked(weights["text"]) if isinstance(self.text, CLIPText) else weights["text"]
        arrays = flatten_dict(jax.device_get(text), sep="/")
        write_text_tower(folder, self.tokenizer, self.text, arrays, templates, dtype)

    def embed_names(
        self,
        weights: Mapping[str, Any],
        context: Float[Array, "n m d"],
        layout: Layout,
        tokens: NameTokens,
        deep: Float[Array, "j m d"] | None = None,
    ) -> Float[Array, "k e"]:
        """Embeds names under a prompt as unit vectors, in memory that does not grow with their number."""
        order = even_order(tokens.length)
        count, group = len(order), min(GROUP, len(order))
        size = window_size(tokens.length[order], group)
        padded = np.resize(order, -(-count // group) * group)
        padded[count:] = order[-1]
        groups = jax.tree.map(lambda x: np.asarray(x)[padded].reshape(-1, group, *x.shape[1:]), tokens)
        out = self._encode_groups(weights, context, groups, deep, layout=layout, size=size)
        return out[np.argsort(order)]

    def embed_prompt(
        self, weights: Mapping[str, Any], prompt: Prompt, names: Sequence[str]
    ) -> Float[Array, "k e"]:
        """Embeds names under a learned prompt as unit vectors.

        Raises:
          UserError: the prompt was learned for another text tower, or for other classes.
        """
        if not isinstance(self.text, CLIPText):
            raise UserError(f"a {type(self.text).__name__} takes no learned prompt ({prompt.source})")
        prompt.check_width(self.text.width)
        if prompt.anchor:
            prompt.check_tower(self.anchor(weights))
        tokens = prompt.tokens(self.tokenizer, names)
        return self.embed_names(weights, jnp.asarray(prompt.context), prompt.layout, tokens)

    def anchor(self, weights: Mapping[str, Any]) -> tuple[float, ...]:
        """Returns the numbers that identify this text tower, see `Prompt.anchor`; the same on all processes."""
        return tuple(on_host(weights["text"]["pos_embedding"][0, 0, :ANCHOR]).tolist())

    def embed_phrases(self, weights: Mapping[str, Any], texts: Sequence[str]) -> Float[Array, "k e"]:
        """Embeds texts unchanged as unit vectors."""
        if not isinstance(self.text, CLIPText):
            return self._embed_padded(weights["text"], texts)
        phrase_tokens(self.tokenizer, texts)  # raises for an empty one
        ids, valid = self.tokenizer(list(texts))
        parts, rows, at = [], np.zeros(len(texts), np.int32), 0
        for given, numbers in trees(ids, valid.sum(1)):
            parts.append(self._encode_trees(weights["text"], given))
            rows[numbers] = at + np.flatnonzero(given.last >= 0)
            at += given.last.size
        return _rows(rows, *parts)

    def _embed_padded(self, params: Mapping[str, Any], texts: Sequence[str]) -> Float[Array, "k e"]:
        """Embeds texts by the tower itself, `GROUP` at a time."""
        phrase_tokens(self.tokenizer, texts)  # raises for an empty one
        ids, valid = self.tokenizer(list(texts))
        if not self.text.padded:
            # A multiple of 8, to limit compilations.
            longest = min(-(-int(valid.sum(1).max()) // 8) * 8, self.text.length)
            ids, valid = ids[:, :longest], valid[:, :longest]
        size = min(GROUP, 1 << (len(texts) - 1).bit_length())
        rows = np.resize(np.arange(len(texts)), -(-len(texts) // size) * size).reshape(-1, size)
        parts = [self._encode_texts(params, ids[row], valid[row]) for row in rows]
        return jnp.concatenate(parts)[: len(texts)]

    def encode(
        self,
        weights: Mapping[str, Any],
        context: Float[Array, "n m d"],
        layout: Layout,
        tokens: NameTokens,
        size: int,
        deep: Float[Array, "j m d"] | None = None,
        *,
        may_exceed: bool = False,
    ) -> Float[Array, "k e"]:
        """Calls `encode_names` with this text tower."""
        start = self.tokenizer.start[0]
        assert isinstance(self.text, CLIPText)
        return encode_names(
            self.text, weights["text"], start, context, layout, tokens, size, deep, may_exceed=may_exceed
        )

    def _pixels(self) -> tuple[Sequence[float], Sequence[float]]:
        return tuple(self.config.get("mean", MEAN)), tuple(self.config.get("std", STD))

    def _trees(self, params: Mapping[str, Any], given: Trees) -> Float[Array, "t e"]:
        assert isinstance(self.text, CLIPText)
        return unit(encode_trees(self.text, params, given)).reshape(-1, self.dim)

    def _groups(self, weights, context, groups, deep, *, layout, size):
        one = lambda tokens: self.encode(weights, context, layout, tokens, size, deep)
        return unit(jax.lax.map(one, groups)).reshape(-1, self.dim)


SPACE = "clip"
"""The name of the embedding space that both towers share."""


def from_training(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights, as `Clip` takes them, of a run of method "clip"."""
    params = variables["params"]
    rest = {name: tree["image"] for name, tree in variables.items() if name != "params"}
    return {
        "image": {"params": params["image"], **rest},
        "text": stacked(params["text"]),
        "scale": params["scale"],
    }


def write_towers(folder: epath.Path, config: ConfigDict, weights: Mapping[str, Any]) -> None:
    """Writes trained towers to a folder that `Clip.pretrained` reads: `model.safetensors` and `config.json`.

    Args:
      folder: `towers` in the folder of their run, created if missing.
      config: the config of the towers, see `Clip`.
      weights: the weights as `Clip` takes them, on the host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat = {name: np.asarray(x) for name, x in flatten_dict(dict(weights), sep="/").items()}
    forget(folder / _WEIGHTS)
    write_safetensors(folder / _WEIGHTS, flat, {"format": "ovseg_jax.towers"})
    record(folder / _WEIGHTS)
    # Written last, so that a folder with this file is complete.
    write_recorded(folder / _CONFIG, to_json(config))


def towers_of(init: str) -> epath.Path | None:
    """Returns the folder of trained towers in a run, or `init` itself if it is one; None for other weights.

    Raises:
      UserError: `init` is a run without trained towers.
    """
    for folder in (epath.Path(init) / TOWERS, epath.Path(init)):
        if folder.name == TOWERS and (folder / _CONFIG).exists():
            return folder
    if (epath.Path(init) / "checkpoints").exists():
        raise UserError(
            f"towers.init={init} is a run without {TOWERS}/, which only finished runs of the methods 'clip' and "
            "'umg_clip' have"
        )
    return None


def read_towers(folder: epath.Path) -> dict[str, Any]:
    """Reads the weights that `write_towers` wrote.

    Raises:
      UserError: a file is missing or damaged.
    """
    if "://" not in str(folder):
        return unflatten_dict(read_arrays(Path(folder) / _WEIGHTS), sep="/")
    with tempfile.TemporaryDirectory() as local:  # Files are memory-mapped, which is impossible in a bucket.
        (folder / _WEIGHTS).copy(Path(local) / _WEIGHTS)
        flat = {name: np.array(x) for name, x in read_arrays(Path(local) / _WEIGHTS).items()}
    return unflatten_dict(flat, sep="/")


def image_tower(config: ConfigDict, dtype: Any) -> nn.Module:
    """Creates an image tower that ends in an embedding.

    Raises:
      UserError: the name or a field is unknown.
    """
    # A config that was read from JSON has lists in place of tuples.
    options = {key: tuple(x) if isinstance(x, list) else x for key, x in config.items()}
    name = options.pop("name")
    kinds: dict[str, tuple[type[nn.Module], Mapping[str, Any]]] = {
        "small": (SmallImageTower, {}),
        "vit": (ViT, {}),
        **{n: (ViT, fields) for n, fields in vit.PRESETS.items() if n.startswith(ALIGNED)},
        "eva": (Eva, {}),
        **{n: (Eva, fields) for n, fields in eva.PRESETS.items()},
        "convnext": (ConvNeXt, {}),
        **{n: (ConvNeXt, fields) for n, fields in convnext.PRESETS.items()},
        **{n: (ClipResNet, fields) for n, fields in clip_resnet.PRESETS.items()},
    }
    if name not in kinds:
        raise UserError(f"towers.image.name={name!r} is not one of {', '.join(kinds)}")
    kind, published = kinds[name]
    known = {f.name for f in dataclasses.fields(kind)} - {"parent", "name", "dtype", *HOOKS}
    if wrong := sorted(options.keys() - known):
        raise UserError(
            f"towers.image of {name!r} has no key {wrong[0]!r}; known keys: {', '.join(sorted(known))}"
        )
    return kind(**{**published, **options}, dtype=dtype)


@jax.jit
def _rows(rows: Int[Array, " k"], *parts: Float[Array, "n e"]) -> Float[Array, "k e"]:
    return jnp.concatenate(parts)[rows]


def _text(tower: TextTower, params: Any, ids: Array, valid: Array) -> Array:
    out: Any = tower.apply({"params": params}, ids, valid)
    return out.pooled


def _pooled(out: Any) -> Any:
    if isinstance(out, Mapping):
        return out["pooled"]
    return getattr(out, "pooled", out)
