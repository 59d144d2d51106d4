"""Pseudo-masks for caption-only images: `python -m ovseg_jax.pseudo_label --checkpoint=TEACHER --data_dir=DIR`.

OpenSeg's recipe for caption-only data (papers/004, 3.3, after MuST): a teacher trained with the mask loss alone
(`--config.loss.grounding_weight=0`) labels the images, and the student trains on human and pseudo-masks together.
DIR is a folder in the layout of `data.sources.folder`; each image without a mask gets DIR/masks/NAME.png, and nothing
that is there is touched.
"""

import argparse
import sys

import numpy as np
from etils import epath
from jaxtyping import Float, Int32
from tqdm import tqdm

from ovseg_jax.cli.console import use_compilation_cache
from ovseg_jax.data.images import list_images, save_mask
from ovseg_jax.errors import UserError
from ovseg_jax.inference.result import PixelFeatures, sigmoid
from ovseg_jax.inference.segmenter import Segmenter


def select_masks(
    masks: Float[np.ndarray, "n h w"], threshold: float, max_overlap: float, min_area: float
) -> list[int]:
    """Proposals worth keeping, the surest first (the paper gives no rule: ours).

    A proposal counts where it exceeds `threshold`; its sureness is its mean there. One that is smaller than
    `min_area` of the image, or that overlaps a surer one by an IoU above `max_overlap`, is left out.
    """
    binary = (masks > threshold).reshape(len(masks), -1)
    area = binary.sum(1)
    sureness = (masks.reshape(len(masks), -1) * binary).sum(1) / np.maximum(area, 1)
    kept: list[int] = []
    for i in np.argsort(-sureness, kind="stable"):
        if area[i] < max(1, min_area * binary.shape[1]):
            continue
        overlap = binary[kept] & binary[i]
        iou = overlap.sum(1) / (area[kept] + area[i] - overlap.sum(1))
        if not (iou > max_overlap).any():
            kept.append(int(i))
    return kept


def segments_of(
    features: PixelFeatures, threshold: float = 0.5, max_overlap: float = 0.7, min_area: float = 0.001
) -> Int32[np.ndarray, "H W"]:
    """Non-overlapping segments at the image's own size, numbered from 1; 0 is void.

    Smaller proposals lie in front of larger ones, so that a part or a small thing is not swallowed by what
    surrounds it.
    """
    if features.mask_logits is None:
        raise UserError("the teacher is a per-pixel model, which proposes no masks: train OpenSeg as teacher")
    kept = select_masks(sigmoid(features.mask_logits), threshold, max_overlap, min_area)
    segments = np.zeros(features.size, np.int32)
    masks = sigmoid(features.upsample(features.mask_logits[kept])) > threshold
    for number, mask in enumerate(sorted(masks, key=np.sum, reverse=True), 1):
        segments[mask] = number
    return segments


def main(argv: list[str] | None = None) -> int:
    """Labels the images of a folder; the exit status is 1 where some image could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m ovseg_jax.pseudo_label", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--checkpoint", required=True, help="work directory of the teacher")
    parser.add_argument("--data_dir", required=True, help="folder with images/")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability from which a pixel is inside"
    )
    parser.add_argument(
        "--max_overlap", type=float, default=0.7, help="IoU above which a less sure mask goes"
    )
    parser.add_argument("--min_area", type=float, default=0.001, help="smallest share of the image")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    root = epath.Path(args.data_dir)
    images = root / "images"
    if not images.is_dir():
        raise UserError(f"--data_dir={root} has no folder images/")
    done = {p.stem for p in list_images(root / "masks")} if (root / "masks").is_dir() else set()
    files = list_images(images)
    if not files:
        raise UserError(f"{images} holds no image")
    waiting = [p for p in files if p.stem not in done]
    segmenter = Segmenter.from_checkpoint(args.checkpoint, batch_size=args.batch)
    (root / "masks").mkdir(exist_ok=True)
    bad = 0
    for path in tqdm(waiting, unit="image"):
        try:
            segments = segments_of(segmenter.features(path), args.threshold, args.max_overlap, args.min_area)
        except UserError as error:
            bad += 1
            tqdm.write(f"left out: {error}")
            continue
        temporary = root / "masks" / f"{path.stem}.png.tmp"
        with temporary.open("wb") as f:
            save_mask(f, segments.astype(np.uint16 if segments.max() > 255 else np.uint8))
        temporary.replace(root / "masks" / f"{path.stem}.png")
    print(
        f"{len(waiting) - bad} masks written to {root / 'masks'}, {len(done)} were there, {bad} images left out"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    use_compilation_cache()
    sys.exit(main())
