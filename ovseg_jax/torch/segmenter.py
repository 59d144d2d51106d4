"""The class for using an exported model in PyTorch, with the results of `ovseg_jax.Segmenter`."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovseg_jax.data.images import fit_canvas, read_image
from ovseg_jax.data.windows import Whole
from ovseg_jax.errors import UserError
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.reading import reading
from ovseg_jax.torch.build import build
from ovseg_jax.torch.classified import MaskFormer, MaskFormerOutput
from ovseg_jax.torch.decisions import Scored, Segment, decision_of
from ovseg_jax.torch.dense import ClipDenseNet
from ovseg_jax.torch.fcclip import FCClipNet, FCClipOutput, score_regions
from ovseg_jax.torch.layers import class_scores, unit
from ovseg_jax.torch.openseg import OpenSegFeatures, OpenSegNet
from ovseg_jax.torch.pseg import PSegNet, TextNet
from ovseg_jax.torch.text_towers import Bert, CLIPText, SiglipText, TipsText
from ovseg_jax.torch.upernet import UPerNet
from ovseg_jax.towers.prompt_file import FILE, load_prompt
from ovseg_jax.towers.templates import fill
from ovseg_jax.vocab.classes import ClassList, Labels, as_classes, rows_of_names
from ovseg_jax.vocab.phrases import word_ids
from ovseg_jax.vocab.word_tokenizer import read_tokenizer

WEIGHTS, CONFIG, TEXT_TOWER = "model.safetensors", "config.json", "text_tower"
NETS: dict[str, Any] = {
    kind.__name__: kind for kind in (OpenSegNet, UPerNet, MaskFormer, PSegNet, FCClipNet, ClipDenseNet)
}
TEXT_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (CLIPText, SiglipText, TipsText, Bert, TextNet)}
BATCH, LENGTH = 64, 77  # as in `FrozenText`
MOST_PIXELS = 16384  # upper limit of the side of the network's input
STRIP, NAMES = 64, 256  # rows of an image, and names, that are scored at once


class Segmentation(NamedTuple):
    """The segmentation of an image.

    Attributes:
      classes: the requested categories.
      label_map: index into `classes` for every pixel, -1 = unknown, i32 [H W].
      confidence: see `ovseg_jax.Result`, f32 [H W].
      segments: of a decision that separates objects, from large to small.
    """

    classes: ClassList
    label_map: np.ndarray
    confidence: np.ndarray
    segments: tuple[Segment, ...] = ()


class Layers(NamedTuple):
    """The scores of one image in factors, see `ovseg_jax.decisions.maps.Layers`.

    Attributes:
      weights: [T C], of each name for each map.
      maps: [C h w].
      masks: whether the maps are mask logits.
      void: [C], the score of "no object" for each mask, or None.
    """

    weights: Tensor
    maps: Tensor
    masks: bool
    void: Tensor | None = None


class Segmenter:
    """A model that `python -m ovseg_jax.export --to=torch` wrote.

    Attributes:
      net: the image network.
      table: [V D] vectors of the words of `index`, or None.
      text: a text tower and its tokeniser, or None. Without both, the network knows the names of `classes` only.
      canvas: side of the network's square input in pixels.
      whole: the resizing of images that each have a canvas of their own size; None for the square.
      seen: names of training classes, if scores depend on them.
      classes: the categories of the training data.
    """

    def __init__(
        self,
        net: OpenSegNet | PSegNet | UPerNet | MaskFormer | FCClipNet | ClipDenseNet,
        table: Tensor | None,
        text: "Text | None",
        config: dict[str, Any],
        device: str = "cpu",
    ):
        self.net, self.table, self.text, self.canvas = net.eval(), table, text, int(config["image_size"])
        self.device, self.seen, whole = device, frozenset(config.get("seen", ())), config.get("whole")
        self.whole = Whole(**whole) if whole else None
        self.index = {word: i for i, word in enumerate(config["words"])}
        self.classes = ClassList.from_json(json.dumps(config["classes"]))
        self._texts: dict[tuple[tuple[str, ...], ...], Tensor] = {}

    @torch.no_grad()
    def segment(
        self,
        image: Any,
        labels: Labels | None = None,
        *,
        vectors: Any = None,
        threshold: float | None = None,
        decision: Any = None,
    ) -> Segmentation:
        """Gives every pixel the category that fits it best (papers/004, eq. 6), or -1; or applies `decision`.

        Args:
          image: a path, a PIL image or an array.
          labels: see `ovseg_jax.Segmenter.segment`; by default the classes of the training data.
          vectors: [T D], embeddings of all names of the labels in their order, in place of those of `embed`.
          threshold: pixels with a lower confidence are unknown; by default 0.04, for towers without training none.
          decision: in place of the threshold "panoptic" or "instances", or a mapping of its `type` and settings, see
            `ovseg_jax.decisions.rules`.

        Raises:
          UserError: the image cannot be read, the labels are empty, a word is unknown, or the decision is unknown,
            needs masks that the model does not have, or comes with a threshold.
        """
        classes = self.classes if labels is None else as_classes(labels)
        if not classes.names:
            raise UserError("this model has no classes of its own: give labels")
        if decision is not None and threshold is not None:
            raise UserError("decision decides by its own rule: leave out threshold")
        chosen = None if decision is None else decision_of(decision)
        if threshold is None:
            threshold = -1.0 if isinstance(self.net, ClipDenseNet) else 0.04
        names, owner = classes.flat()
        if vectors is not None:
            if isinstance(self.net, MaskFormer):
                raise UserError("a MaskFormer has classes and no embeddings: vectors have no effect")
            text = unit(torch.from_numpy(np.array(vectors)))
        else:
            if classes.names not in self._texts:
                # Only the latest labels are kept, since a list may have twenty thousand names.
                self._texts = {classes.names: self.embed(names)}
            text = self._texts[classes.names]
        pixels = read_image(image)
        canvas, fitted = self.whole.fit(pixels) if self.whole else fit_canvas(pixels, self.canvas)
        device = self.device
        batch = torch.from_numpy(canvas).to(device).permute(2, 0, 1)[None]
        out = self.net(batch, torch.tensor([fitted], device=device))
        weights, maps, masks, void = self._layers(out, text.to(device), names, owner)
        height, width = pixels.shape[:2]
        down = upsampling(height, maps.shape[1], canvas.shape[0], fitted[0], device)
        across = upsampling(width, maps.shape[2], canvas.shape[1], fitted[1], device)
        if chosen is not None:
            if not masks:
                raise UserError(f"the decision {decision!r} needs masks, which this model does not have")
            of_class = class_scores(weights, torch.from_numpy(owner).to(device).long())
            isthing = torch.tensor(classes.isthing, device=device)
            return Segmentation(classes, *chosen(Scored(of_class, void, isthing, maps, down, across)))
        best, confidence = np.zeros((height, width), np.int32), np.zeros((height, width), np.float32)
        for at in range(0, height, STRIP):
            x = torch.einsum("rh,nhw,cw->nrc", down[at : at + STRIP], maps, across)
            x = torch.sigmoid(x) if masks else x
            score, name = torch.full_like(x[0], -torch.inf), torch.zeros_like(x[0], dtype=torch.long)
            for first in range(0, len(weights), NAMES):
                top, index = torch.einsum("tn,nrc->trc", weights[first : first + NAMES], x).max(0)
                better = top > score
                score, name = torch.where(better, top, score), torch.where(better, first + index, name)
            if masks:
                score = score / x.sum(0).clamp(min=1)
            best[at : at + STRIP], confidence[at : at + STRIP] = name.cpu().numpy(), score.cpu().numpy()
        label_map = np.where(confidence >= threshold, owner[best], -1).astype(np.int32)
        return Segmentation(classes, label_map, confidence)

    def embed(self, names: Sequence[str]) -> Tensor:
        """Embeds names as unit vectors [T D]: by the text tower, from their words' unit vectors, or by their class."""
        if self.text is not None:
            return self.text(names)
        if self.table is None:
            rows = rows_of_names(self.classes.names, names, "this model has no text side and")
            return torch.eye(len(self.classes))[torch.from_numpy(rows).long()]
        words = [word_ids(name, self.index) for name in names]
        return torch.stack([unit(unit(self.table[row]).sum(0)) for row in words])

    def _layers(
        self,
        out: OpenSegFeatures | MaskFormerOutput | FCClipOutput,
        text: Tensor,
        names: Sequence[str],
        owner: np.ndarray,
    ) -> Layers:
        if isinstance(out, FCClipOutput):
            assert isinstance(self.net, FCClipNet)
            seen = torch.tensor([name in self.seen for name in names], device=text.device)
            of_class = torch.from_numpy(owner).to(text.device).long()
            share, nothing = score_regions(out, text, of_class, seen, self.net.rule)
            return Layers(share, out.mask_logits[0], True, nothing)
        if isinstance(out, MaskFormerOutput):
            return Layers(text @ out.regions[0].T, out.mask_logits[0], True, out.void[0])
        if isinstance(self.net, UPerNet):  # its features are logits of classes
            return Layers(text, out.pixel_embed[0], False)
        if out.mask_logits is None or out.region_sum is None:
            return Layers(text, unit(out.pixel_embed[0].permute(1, 2, 0)).permute(2, 0, 1), False)
        return Layers(text @ unit(out.region_sum[0]).T, out.mask_logits[0], True)


class Text:
    """A text tower with its tokeniser, in a folder that `FrozenText.save` or `TextTransformer.save` writes."""

    def __init__(self, folder: Path, device: str):
        described = read_json(folder / CONFIG)
        kind = TEXT_KINDS.get(str(described.pop("kind", None)))
        if kind is None:
            raise UserError(f"{folder / CONFIG} does not describe one of {', '.join(TEXT_KINDS)}")
        self.templates = _templates(described.pop("templates", None), folder)
        ids = torch.zeros((1, 2), dtype=torch.long, device="meta")
        inputs = (ids, torch.ones((1, 2), dtype=torch.bool, device="meta"))
        tower = build(lambda: kind(**described), described, read_tensors(folder), str(folder), *inputs)
        self.tower, self.device = tower.to(device).eval(), device
        length = tower.length if kind is TextNet else min(tower.length, LENGTH)
        self.tokenizer: Any = read_tokenizer(folder, length, "tips" if kind is TipsText else None)
        self.context: tuple[Tensor, ...] = ()
        if (folder / FILE).exists():
            prompt = load_prompt(folder / FILE)
            self.context = (torch.from_numpy(prompt.context[0]).to(device),)
            self.tokenizer = partial(prompt.layout.whole, self.tokenizer)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts as unit vectors [T D]; with templates, the normalised sum over them."""
        if self.templates is None:
            return self._embed(texts)
        parts = [self._embed([fill(template, text) for text in texts]) for template in self.templates]
        return parts[0] if len(parts) == 1 else unit(torch.stack(parts).sum(0))

    def _embed(self, texts: Sequence[str]) -> Tensor:
        rows = []
        for at in range(0, len(texts), BATCH):
            ids, valid = (torch.from_numpy(x).to(self.device) for x in self.tokenizer(texts[at : at + BATCH]))
            rows.append(unit(self.tower(ids, valid, *self.context)))
        return torch.cat(rows)


def _templates(given: Any, folder: Path) -> list[str] | None:
    """Returns the templates of a described text side; None for texts as they are."""
    with reading(folder / CONFIG, "the templates of"):
        if given is not None and not (isinstance(given, list) and all(isinstance(x, str) for x in given)):
            raise ValueError("templates is not a list of texts")
    return given or None


def upsampling(pixels: int, cells: int, canvas: int, fitted: int, device: Any) -> Tensor:
    """Returns the bilinear interpolation [pixels cells] from a grid to an image, see `kernels.resize.upsampling`."""
    stride = canvas / cells
    position = (torch.arange(pixels, device=device) + 0.5) * fitted / pixels / stride - 0.5
    position = position.clamp(0, np.ceil(fitted / stride) - 1)
    return (1 - (position[:, None] - torch.arange(cells, device=device)).abs()).clamp(min=0)


def load(folder: str | Path, device: str = "cpu") -> Segmenter:
    """Loads an exported model.

    Raises:
      UserError: the folder holds no exported model, or a damaged one.
    """
    folder = Path(folder)
    config, arrays = read_json(folder / CONFIG), read_tensors(folder)
    table = arrays.pop("text.table", None)
    with reading(folder, "the exported model"):
        described = dict(config["model"])
        kind = NETS[described.pop("kind", OpenSegNet.__name__)]
        side, words = config["image_size"], config["words"]
        if type(side) is not int or not 0 < side <= MOST_PIXELS:
            raise ValueError(f"image_size is {side!r}, not a whole number from 1 to {MOST_PIXELS}")
        for name, texts in (("words", words), ("seen", config.get("seen", []))):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} is not a list of texts")
        for name, pixels in (config.get("whole") or {}).items():
            if type(pixels) is not int or not 0 < pixels <= MOST_PIXELS:
                raise ValueError(f"{name} is {pixels!r}, not a whole number from 1 to {MOST_PIXELS}")
        if table is not None and (table.ndim != 2 or len(table) != len(words)):
            raise ValueError(f"the table of {len(words)} words has the shape {list(table.shape)}")
        image = torch.zeros((1, 3, side, side), dtype=torch.uint8, device="meta")
        size = torch.full((1, 2), side, device="meta")
        net: Any = build(lambda: kind(described), described, arrays, str(folder), image, size)
        if kind is MaskFormer and len(config["classes"]["names"]) != described["classifier"]["classes"]:
            raise ValueError("it has another number of classes than its classifier")
        closed = table is not None or kind in (UPerNet, MaskFormer)
        text = None if closed else Text(folder / TEXT_TOWER, device)
        return Segmenter(net.to(device), table, text, config, device)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: there is no such file, or it is not a JSON object.
    """
    with reading(path, "the file of the exported model"):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{path.name} is not a JSON object")
        return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads a folder's arrays as float32 tensors."""
    return {k: torch.from_numpy(np.array(v, np.float32)) for k, v in read_arrays(folder / WEIGHTS).items()}
