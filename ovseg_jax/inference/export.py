"""Export of trained models for programs without JAX or without this library."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.cli.outputs import check_not_foreign, check_out_folder
from ovseg_jax.errors import UserError
from ovseg_jax.files import locked
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods.clip_dense import ClipDense
from ovseg_jax.methods.fcclip import FCClip
from ovseg_jax.methods.maskformer import MaskFormer
from ovseg_jax.methods.maskformer_text import TextMaskFormer
from ovseg_jax.methods.umg_clip import UMGClip
from ovseg_jax.models.pseg import GroupingNet, SegmentViT
from ovseg_jax.models.text_towers import SiglipText
from ovseg_jax.models.vit import ViT
from ovseg_jax.parallel.sharding import path_name
from ovseg_jax.pretrained.big_vision import write_big_vision
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.hf_clip import is_clip, write_hf_clip
from ovseg_jax.pretrained.to_torch import describe, describe_adapted, to_torch
from ovseg_jax.protocols import PixelScores, Vocabulary, only
from ovseg_jax.towers.clip import MEAN, STD, from_training
from ovseg_jax.towers.frozen_text import TEXT_TOWER, FrozenText
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.towers.text_transformer import TextTransformer
from ovseg_jax.vocab.classes import ClassList

EXAMPLE = '''"""Runs model.stablehlo with JAX and safetensors alone: python example.py DIR"""

import sys

import jax
import numpy as np
from safetensors.numpy import load_file

folder = sys.argv[1]
run = jax.export.deserialize(open(f"{folder}/model.stablehlo", "rb").read()).call
parameters = load_file(f"{folder}/model.safetensors")
images = np.zeros((2, SIZE, SIZE, 3), np.uint8)  # each at the top left of its canvas, the rest is padding
sizes = np.full((2, 2), SIZE, np.int32)  # height and width of each image on the canvas
names = np.ones((5, WIDTH), np.float32) / WIDTH**0.5  # unit vectors of the text tower
# Mask logits, scores of names for proposals, pixel features; for a method without proposals, scores of names for
# pixels, and pixel features. MaskFormer and Mask2Former: names are rows of the unit matrix, one for each class, scores
# are probabilities, and the last result is that of "no object". FC-CLIP: mask logits, the logits of names by the
# trained head, those by CLIP, the head's logit of "no object", pixel features; a class has the logit of its best name.
for result in run(parameters, images, sizes, names):
    print(result.shape)
'''


def export_model(
    load: Callable[[], Segmenter], to: str, out: str, dtype: str = "float32", *, overwrite: bool = False
) -> str:
    """Writes a model in one of the formats of `WRITERS`.

    Args:
      load: loads the segmenter with the model.
      to: the format.
      out: the folder; created if missing.
      dtype: the dtype of floats in the files.
      overwrite: whether to replace existing files.

    Returns:
      A text that lists the files and, for another dtype than float32, states how much the prediction changes.

    Raises:
      UserError: a file exists and `overwrite` is False, a package is missing, or the folder cannot be written.
    """
    folder = Path(out)
    check_out_folder(folder)
    if not overwrite:
        check_not_foreign(folder, FILES[to], ())
    if missing := [name for name in NEEDS.get(to, ()) if importlib.util.find_spec(name) is None]:
        extras = "torch,onnx" if to == "onnx" else "export"
        raise UserError(f"--to={to} needs {', '.join(missing)}: pip install -e '.[{extras}]'")
    segmenter = load()
    if isinstance(segmenter.method, TextMaskFormer) and to != "big_vision":
        raise UserError(f"--to={to} cannot hold maskformer_text, only maskformer: take --to=big_vision")
    net = segmenter.method.net
    if to in ("torch", "onnx") and (net is None or isinstance(net, SegmentViT | GroupingNet)):
        named = {SegmentViT: "pseudo-masks", GroupingNet: "GroupViT's grouping"}
        lacking = named.get(type(net), f"the method {segmenter.config.method}")
        if isinstance(segmenter.method, ClipDense):
            lacking = "clip_dense with features=pseudo_masks"
        raise UserError(f"--to={to} cannot hold {lacking}")
    kind = np.dtype(jnp.dtype(dtype))
    with locked(folder):
        WRITERS[to](segmenter, folder, kind)
    written = sorted({path.name for path in folder.iterdir()} & {*FILES[to]})
    lines = [f"wrote {', '.join(written)} to {folder}"]
    if dtype != "float32":
        change = difference(segmenter, kind)
        lines.insert(0, f"as {dtype}, mask logits or features change by {change:.2e} of their largest value")
    return "\n".join(lines)


def by_path(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the image network's variables by path, including batch statistics, and `text/table` if there is one."""
    of_image = lambda tree: tree.get("image", {name: x for name, x in tree.items() if name != "text"})
    trees = [of_image(tree) for tree in variables.values()]
    flat = {path_name(path): np.asarray(x) for tree in trees for path, x in jax.tree.leaves_with_path(tree)}
    text = variables["params"].get("text", {})
    return flat | ({"text/table": np.asarray(text["table"])} if "table" in text else {})


def to_folder(segmenter: Segmenter, out: Path, dtype: np.dtype) -> None:
    """Writes a folder for `ovseg_jax.torch.load`, with a text tower, frozen or trained, in a subfolder."""
    method: Any = segmenter.method
    more: dict[str, Any] = {}
    no_text, side = isinstance(method, MaskFormer), method.text
    if isinstance(method, ClipDense | UMGClip):
        if isinstance(method.templates, Prompt):
            name = segmenter.config.method
            raise UserError(f"a learned prompt of {name} has no PyTorch form: set dense.prompt to templates")
        trained = isinstance(method, UMGClip)
        weights = from_training(segmenter.variables) if trained else segmenter.variables["towers"]
        arrays, model = clip_dense_form(method, weights)
        method.clip.save_text(out / TEXT_TOWER, weights, method.templates, dtype)
    elif isinstance(method, FCClip):
        arrays, model = fcclip_form(method, segmenter.variables)
        method.clip.save_text(out / TEXT_TOWER, segmenter.variables["towers"], method.templates, dtype)
        more["seen"] = sorted(method.seen_names())
        if method.whole:
            more["whole"] = dataclasses.asdict(method.whole)
    else:
        arrays = to_torch(by_path(segmenter.variables))
        model = describe(method.model if no_text else method.net)
    if isinstance(side, FrozenText):
        del arrays["text.table"]
        method.text.save(out / TEXT_TOWER, dtype)
        vision, text = getattr(method.net.backbone, "tower", None), method.text.tower
        if is_clip(vision, text):
            write_hf_clip(out / "clip", vision, text, *towers(segmenter))  # type: ignore[arg-type]
    if isinstance(side, TextTransformer):
        own = {name: tree["text"] for name, tree in segmenter.variables.items() if "text" in tree}
        side.save(out / TEXT_TOWER, own, dtype)
    described = {
        "method": segmenter.config.method,
        "model": model,
        "image_size": int(segmenter.config.data.image_size),
        "words": [] if side is None else list(side.words.words),
        "classes": json.loads((segmenter.classes or ClassList()).to_json()),
        **more,
    }
    (out / "config.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", "utf-8")
    cast = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in arrays.items()}
    write_safetensors(out / "model.safetensors", cast, {"format": "pt"})


def fcclip_form(method: FCClip, variables: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns arrays and description of `torch.fcclip.FCClipNet`."""
    seen, classifier = variables["towers"], dict(variables["params"]["classifier"])
    classifier["logit_scale"] = classifier.pop("scale")  # the name `scale` is that of a norm's weight
    weights, trunk = method.trunk.described(variables)
    tree = {
        "trunk": weights,
        "masks": variables["params"]["masks"],
        "classifier": classifier,
        "logit_scale": seen["scale"],
    }
    arrays = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}
    pixels = method.config.towers
    return to_torch(arrays), {
        "kind": "FCClipNet",
        "trunk": trunk,
        "masks": describe(method.head.masks),
        "classifier": describe(method.head.classifier),
        "mean": list(pixels.get("mean", MEAN)),
        "std": list(pixels.get("std", STD)),
        "rule": {name: float(method.config.fcclip[name]) for name in ("seen", "unseen", "trust")},
    }


def clip_dense_form(
    method: ClipDense | UMGClip, weights: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns arrays and description of `torch.dense.ClipDenseNet`, from the weights of both towers."""
    trees = [{"tower": tree} for tree in weights["image"].values()]
    arrays = {path_name(path): np.asarray(x) for tree in trees for path, x in jax.tree.leaves_with_path(tree)}
    pixels = method.config.towers
    return to_torch(arrays), {
        "kind": "ClipDenseNet",
        "tower": describe_adapted(method.clip.image),
        "last": method.last,
        "mean": list(pixels.get("mean", MEAN)),
        "std": list(pixels.get("std", STD)),
    }


def towers(segmenter: Segmenter) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the parameters by path of the pyramid's image tower and the frozen text tower; {} for a missing one."""
    if isinstance(segmenter.method, MaskFormer):
        return {}, {}
    params = segmenter.variables["params"].get("image", {})
    image = params.get("net", params).get("backbone", {}).get("tower", {})
    text = segmenter.method.text
    seen = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(image)}
    return seen, text.weights() if isinstance(text, FrozenText) else {}


def to_big_vision(segmenter: Segmenter, out: Path, dtype: np.dtype) -> None:
    """Writes .npz files of parameters by path."""
    method: Any = segmenter.method
    flat = {path_name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(segmenter.variables)}
    cast = lambda arrays: {k: x.astype(dtype) if x.dtype == np.float32 else x for k, x in arrays.items()}
    write_big_vision(out / "model.npz", cast(flat))
    image, text = towers(segmenter)
    net: Any = getattr(method.net, "net", method.net)  # P-Seg's is around MaskFormer's
    both = {f"params/img/{path}": x for path, x in image.items() if isinstance(net.backbone.tower, ViT)}
    if text and isinstance(method.text.tower, SiglipText):
        both |= {f"params/txt/{path}": x for path, x in text.items()}
    if both:
        write_big_vision(out / "towers.npz", cast(both))


def to_onnx(segmenter: Segmenter, out: Path, dtype: np.dtype) -> None:
    """Writes the files of `to_folder` and a program of (image u8 [b 3 S S], image_size i32 [b 2]).

    The program returns mask logits [b N h w], the sums of F_z under the masks [b N D] and F_z [b D h w], of P-Seg's
    MaskFormer the embeddings of masks and of pixels; for a method without proposals only the last; for MaskFormer and
    Mask2Former mask logits, probabilities of the classes [b N K] and of "no object" [b N]; for FC-CLIP those of
    `torch.fcclip.FCClipOutput`.
    """
    import torch

    import ovseg_jax.torch

    to_folder(segmenter, out, dtype)
    loaded = ovseg_jax.torch.load(out)
    size = torch.full((2, 2), loaded.canvas, dtype=torch.int32)
    image = torch.zeros(2, 3, loaded.canvas, loaded.canvas, dtype=torch.uint8)
    any_number = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        results = loaded.net(image, size)._asdict()
    torch.onnx.export(
        loaded.net,
        (image, size),
        out / "model.onnx",
        input_names=["image", "image_size"],
        output_names=[name for name, x in results.items() if x is not None],
        dynamic_shapes=(any_number, any_number),
        dynamo=True,
        verbose=False,
    )


def to_stablehlo(segmenter: Segmenter, out: Path, dtype: np.dtype) -> None:
    """Writes a program of (parameters, images u8 [b S S 3], sizes i32 [b 2], names f32 [t D]).

    The program returns mask logits [b N h w], scores of names for proposals [b t N] and pixel features [b h w D]; for a
    method without proposals, scores of names for pixels [b t h w] and pixel features. For MaskFormer and Mask2Former
    names are rows of the unit matrix, one for each class, and the last result is the probability of "no object" [b N].
    For FC-CLIP it returns mask logits, the logits of names by the head and by CLIP, the logit of "no object" and pixel
    features; `methods.fcclip` makes probabilities of them.
    """
    method: Any = segmenter.method
    size = int(segmenter.config.data.image_size)
    flat = {path_name(path): x for path, x in jax.tree.leaves_with_path(segmenter.variables)}
    cast = {k: np.asarray(x, dtype) if x.dtype == jnp.float32 else np.asarray(x) for k, x in flat.items()}
    structure = jax.tree.structure(segmenter.variables)

    def run(parameters: Mapping[str, Any], images: Any, sizes: Any, names: Any) -> Any:
        leaves = [jnp.asarray(parameters[path]).astype(x.dtype) for path, x in flat.items()]
        prediction = method.predict(jax.tree.unflatten(structure, leaves), images, sizes)
        if prediction.mask_logits is None:
            (space,) = prediction.pixels
            none = jnp.zeros(names.shape[0], bool)  # exported scores cannot depend on the classes of names
            vocabulary = Vocabulary(none.astype(jnp.int32), none, none)
            score = lambda one: method.score_pixels(one, {space: names}, vocabulary)
            weights, maps = jax.vmap(score, out_axes=PixelScores(None, 0))(prediction)  # type: ignore[arg-type]
            return jnp.einsum("tc,bchw->bthw", weights, maps), prediction.pixels[space]
        scores = [jnp.einsum("td,bnd->btn", names, x) for x in prediction.regions.values()]
        void = () if prediction.void is None else (prediction.void,)
        return prediction.mask_logits, *scores, *void, *prediction.pixels.values()

    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    sizes = jax.ShapeDtypeStruct((1, 2), np.int32)
    seen = jax.eval_shape(method.predict, segmenter.variables, image, sizes)
    # If there are several spaces, all take the same embeddings of names.
    width = next(iter((seen.regions or seen.pixels).values())).shape[-1]
    b, t = jax.export.symbolic_shape("b, t")
    shapes = (
        {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in cast.items()},
        jax.ShapeDtypeStruct((b, size, size, 3), np.uint8),
        jax.ShapeDtypeStruct((b, 2), np.int32),
        jax.ShapeDtypeStruct((t, width), np.float32),
    )
    exported = jax.export.export(jax.jit(run), platforms=("cpu", "cuda", "tpu"))(*shapes)
    (out / "model.stablehlo").write_bytes(exported.serialize())
    write_safetensors(out / "model.safetensors", cast)
    (out / "example.py").write_text(EXAMPLE.replace("SIZE", str(size)).replace("WIDTH", str(width)))


def difference(segmenter: Segmenter, dtype: np.dtype) -> float:
    """Measures how much rounding the parameters changes mask logits, or pixel features, of a random image.

    Returns:
      The largest error divided by the largest value.
    """
    size = int(segmenter.config.data.image_size)
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    rounded = jax.tree.map(
        lambda x: x.astype(dtype).astype(x.dtype) if x.dtype == jnp.float32 else x, segmenter.variables
    )
    predict = jax.jit(segmenter.method.predict)

    def maps(variables: Any) -> np.ndarray:
        prediction = predict(variables, image, np.full((1, 2), size, np.int32))
        logits = prediction.mask_logits
        return np.asarray(only(prediction.pixels) if logits is None else logits)

    exact = maps(segmenter.variables)
    return float(np.abs(maps(rounded) - exact).max() / np.abs(exact).max())


WRITERS = {"torch": to_folder, "onnx": to_onnx, "stablehlo": to_stablehlo, "big_vision": to_big_vision}
NEEDS = {"onnx": ("torch", "onnx", "onnxscript"), "stablehlo": ("flatbuffers",)}
_TORCH = ("config.json", "model.safetensors", "text_tower", "clip")
FILES = {
    "torch": _TORCH,
    "onnx": (*_TORCH, "model.onnx"),
    "stablehlo": ("model.stablehlo", "model.safetensors", "example.py"),
    "big_vision": ("model.npz", "towers.npz"),
}
"""The files that each format may write."""
