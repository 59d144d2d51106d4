"""Exported models: images and texts in, label maps out, as `ovseg_jax.Segmenter` gives them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovseg_jax.errors import UserError
from ovseg_jax.images import fit_canvas, read_image
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.torch.layers import unit
from ovseg_jax.torch.openseg import OpenSegNet
from ovseg_jax.vocab.classes import ClassList, Labels, as_classes
from ovseg_jax.vocab.phrases import word_ids

WEIGHTS, CONFIG = "model.safetensors", "config.json"
STRIP = 64  # rows of an image that are scored at once


class Segmentation(NamedTuple):
    """An image, segmented.

    Attributes:
      classes: the categories that were asked for.
      label_map: index into them for every pixel, -1 = unknown, i32 [H W].
      confidence: see `ovseg_jax.Result`, f32 [H W].
    """

    classes: ClassList
    label_map: np.ndarray
    confidence: np.ndarray


class Segmenter:
    """A model that `python -m ovseg_jax.export --to=torch` wrote.

    Attributes:
      net: the image network.
      table: [V D] vectors of the words of `index`; None where the text tower is another model's.
      canvas: side of the square that the network sees.
      classes: the categories of the training data.
    """

    def __init__(self, net: OpenSegNet, table: Tensor | None, config: dict[str, Any]):
        self.net, self.table, self.canvas = net.eval(), table, int(config["image_size"])
        self.index = {word: i for i, word in enumerate(config["words"])}
        self.classes = ClassList.from_json(json.dumps(config["classes"]))

    @torch.no_grad()
    def segment(
        self, image: Any, labels: Labels | None = None, *, vectors: Any = None, threshold: float = 0.04
    ) -> Segmentation:
        """Gives every pixel the category that fits it best (papers/004, eq. 6), or -1.

        Args:
          image: a path, a PIL image or an array.
          labels: as `ovseg_jax.Segmenter.segment` takes them; those of the training data by default.
          vectors: [T D], embeddings of all names of the labels in their order, from the text tower that the model was
            trained with; needed where `table` is None.
          threshold: pixels with a lower confidence are unknown.

        Raises:
          UserError: an image that cannot be read, empty labels, an unknown word, vectors that are missing.
        """
        classes = self.classes if labels is None else as_classes(labels)
        names, owner = classes.flat()
        text = self.embed(names) if vectors is None else unit(torch.from_numpy(np.array(vectors)))
        pixels = read_image(image)
        canvas, fitted = fit_canvas(pixels, self.canvas)
        device = self.net.mean.device
        batch = torch.from_numpy(canvas).to(device).permute(2, 0, 1)[None]
        out = self.net(batch, torch.tensor([fitted], device=device))
        if out.mask_logits is None or out.region_sum is None:
            maps = unit(out.pixel_embed[0].permute(1, 2, 0)).permute(2, 0, 1)
            weights, masks = text.to(device), False
        else:
            maps, masks = out.mask_logits[0], True
            weights = text.to(device) @ unit(out.region_sum[0]).T
        height, width = pixels.shape[:2]
        down = upsampling(height, maps.shape[1], self.canvas, fitted[0], device)
        across = upsampling(width, maps.shape[2], self.canvas, fitted[1], device)
        best, confidence = np.zeros((height, width), np.int32), np.zeros((height, width), np.float32)
        for at in range(0, height, STRIP):
            x = torch.einsum("rh,nhw,cw->nrc", down[at : at + STRIP], maps, across)
            x = torch.sigmoid(x) if masks else x
            score, name = torch.einsum("tn,nrc->trc", weights, x).max(0)
            if masks:
                score = score / x.sum(0).clamp(min=1)
            best[at : at + STRIP], confidence[at : at + STRIP] = name.cpu().numpy(), score.cpu().numpy()
        label_map = np.where(confidence >= threshold, owner[best], -1).astype(np.int32)
        return Segmentation(classes, label_map, confidence)

    def embed(self, names: Any) -> Tensor:
        """Unit vectors [T D] of names: the normalised sums of their words' unit vectors."""
        if self.table is None:
            raise UserError("this model's text tower is not part of it: give the vectors of the labels")
        rows = [word_ids(name, self.index) for name in names]
        return torch.stack([unit(unit(self.table[row]).sum(0)) for row in rows])


def upsampling(pixels: int, cells: int, canvas: int, fitted: int, device: Any) -> Tensor:
    """Bilinear interpolation [pixels cells] from a grid over the canvas to an image, see `evals.resize.upsampling`."""
    stride = canvas / cells
    position = (torch.arange(pixels, device=device) + 0.5) * fitted / pixels / stride - 0.5
    position = position.clamp(0, np.ceil(fitted / stride) - 1)
    return (1 - (position[:, None] - torch.arange(cells, device=device)).abs()).clamp(min=0)


def load(folder: str | Path, device: str = "cpu") -> Segmenter:
    """Loads an exported model.

    Raises:
      UserError: the folder holds none, or a damaged one.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        net = OpenSegNet(config["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no exported model: {error}") from error
    arrays = {k: torch.from_numpy(np.array(v, np.float32)) for k, v in read_arrays(folder / WEIGHTS).items()}
    table = arrays.pop("text.table", None)
    try:
        net.load_state_dict(arrays, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {' '.join(str(error).split())}"
        ) from error
    net.to(device)
    return Segmenter(net, table, config)
