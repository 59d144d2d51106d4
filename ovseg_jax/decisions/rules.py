"""Decisions: named functions from the scores of one image to categories and segments.

    argmax                 the best category of every pixel (papers/004, eq. 6)
    background_threshold   the same, and none where the confidence is below a threshold
    groupvit               proposals do not overlap, and classes compete in the image's top five (NVlabs/GroupViT)
    panoptic               one proposal a pixel, things apart, stuff merged (Mask2Former, FC-CLIP)
    instances              the best things, which may overlap (Mask2Former)

Evaluators, `Segmenter` and pictures use these; the exported PyTorch model has `background_threshold`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.decisions.maps import (
    Frame,
    Layers,
    Mode,
    best_names,
    confidence_of,
    frame,
    layers_of,
    paint,
    true_scores,
)
from ovseg_jax.errors import UserError
from ovseg_jax.kernels.resize import row_block, split_rows
from ovseg_jax.protocols import PRECISION, Prediction, Segmenting, Text, Vocabulary


class Segments(NamedTuple):
    """The segments of an image, at most S.

    Attributes:
      number: [H W] the segment of every pixel, from 1; 0 where there is none. Of overlapping ones the best.
      category: [S] the category of each; -1 beyond the last segment.
      score: [S] the score of its category.
      masks: [S H W] for segments that may overlap, else None.
    """

    number: Int[Array, "*v h w"]
    category: Int[Array, "*v s"]
    score: Float[Array, "*v s"]
    masks: Bool[Array, "*v s h w"] | None = None


class Decided(NamedTuple):
    """What a decision says of an image, for each of V views.

    Attributes:
      category: [V H W] index of the category of every pixel, -1 where there is none.
      confidence: [V H W] see `maps.confidence_of`; where a pixel belongs to one proposal, of this one alone.
      segments: for decisions that tell instances apart, else None: a segment is all pixels of a category.
    """

    category: Int[Array, "*v h w"]
    confidence: Float[Array, "*v h w"]
    segments: Segments | None = None


@dataclasses.dataclass(frozen=True)
class Decision:
    """A function of (layers, frame, vocabulary, views), with its settings. Jittable, and a constant to jit.

    `views` [V T] are the names that may be chosen in each view.
    """

    needs_masks: ClassVar[bool] = True

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Argmax(Decision):
    """Gives every pixel its best category."""

    needs_masks: ClassVar[bool] = False

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        name, score, cover = best_names(
            layers.weights, layers.maps, frame.rows, frame.columns, views, logits=layers.masks
        )
        confidence = jnp.asarray(confidence_of(score, cover)) if layers.masks else score
        return named(name, confidence, score, frame, vocabulary)


@dataclasses.dataclass(frozen=True)
class BackgroundThreshold(Argmax):
    """Gives every pixel its best category, or none where the confidence is below `threshold`."""

    threshold: float = 0.04

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        best = super().__call__(layers, frame, vocabulary, views)
        return best._replace(category=jnp.where(best.confidence >= self.threshold, best.category, -1))


@dataclasses.dataclass(frozen=True)
class GroupVit(Decision):
    """Gives every pixel the best category of its strongest proposal, or none (NVlabs/GroupViT, its inference).

    A proposal's affinity to a class is the softmax of its logits over all classes times that over the `top` classes of
    the image, which are those of the highest mean over the proposals; a pixel whose best affinity is below `threshold`,
    or below the best of the whole image where that is lower, has no category.

    Attributes:
      threshold: of the background; published: 0.95 for VOC and COCO, 0.35 for Context.
      scale: 1/τ, by which scores become logits.
      top: how many classes compete.
    """

    threshold: float = 0.95
    scale: float = 100.0
    top: int = 5

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        strongest = lambda x, inside: x.argmax(0).astype(jnp.int32)
        winner = _joined(_strips(layers.maps, frame, strongest), frame)

        def view(allowed: Bool[Array, "t"]) -> tuple[Array, Array]:
            score = class_scores(layers.weights, vocabulary, allowed)  # [K N]
            logits = self.scale * score
            mean = score.mean(1)
            least = jax.lax.top_k(mean, min(self.top, len(mean)))[0][-1]
            within = jnp.where((mean >= least)[:, None], logits, -jnp.inf)
            affinity = jax.nn.softmax(logits, 0) * jax.nn.softmax(within, 0)
            affinity = jnp.where(jnp.isfinite(score), affinity, 0)
            best, category = affinity.max(0), affinity.argmax(0).astype(jnp.int32)
            found = frame.inside & (best >= jnp.minimum(self.threshold, best.max()))[winner] & allowed.any()
            return jnp.where(found, category[winner], -1), jnp.where(found, best[winner], 0)

        return Decided(*jax.lax.map(view, views))


@dataclasses.dataclass(frozen=True)
class Panoptic(Decision):
    """Gives every pixel one proposal: things are segments of their own, stuff of one category is one segment.

    As Mask2Former does it: a proposal whose best class is "no object" or does not exceed `object_threshold` is
    dropped; a pixel belongs to the proposal with the largest score times mask, if that mask is at least 0.5 there; a
    proposal that keeps less than `overlap_threshold` of its mask is dropped with its pixels.

    Attributes:
      object_threshold: published: 0.8 for Mask2Former on COCO, 0 for FC-CLIP.
      overlap_threshold: published: 0.8.
    """

    object_threshold: float = 0.0
    overlap_threshold: float = 0.8

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        n = len(layers.maps)

        def view(allowed: Bool[Array, "t"]) -> Decided:
            scores = class_scores(layers.weights, vocabulary, allowed)
            score, category = scores.max(0), scores.argmax(0).astype(jnp.int32)
            real = score > self.object_threshold
            if layers.void is not None:
                real &= score >= layers.void

            def strip(x: Float[Array, "n r w"], inside: Bool[Array, "r w"]) -> tuple[Array, ...]:
                mask = jax.nn.sigmoid(x)
                weighted = jnp.where(real[:, None, None], score[:, None, None] * mask, -jnp.inf)
                winner = weighted.argmax(0).astype(jnp.int32)
                there = jnp.take_along_axis(mask, winner[None], 0)[0]
                half = ((mask >= 0.5) & inside).sum((1, 2))
                own = jnp.zeros(n, jnp.int32).at[winner].add(inside)
                both = jnp.zeros(n, jnp.int32).at[winner].add(inside & (there >= 0.5))
                return winner, there, half, own, both

            winner, there, half, own, both = _strips(layers.maps, frame, strip)
            winner, there = _joined(winner, frame), _joined(there, frame)
            half, own, both = half.sum(0), own.sum(0), both.sum(0)
            kept = real & (both > 0) & (own >= self.overlap_threshold * half)
            stuff = kept & ~vocabulary.isthing[category]
            same = (category[:, None] == category) & stuff[:, None] & stuff
            first = jnp.where(stuff, same.argmax(1), jnp.arange(n))
            leads = kept & (first == jnp.arange(n))
            number = jnp.where(kept, jnp.cumsum(leads)[first], 0)
            segment = jnp.where(frame.inside & (there >= 0.5), number[winner], 0).astype(jnp.int32)
            place = jnp.where(leads, number - 1, n)
            of_segment = lambda x, empty: jnp.full(n, empty, x.dtype).at[place].set(x, mode="drop")
            found = segment > 0
            return Decided(
                jnp.where(found, category[winner], -1),
                jnp.where(found, score[winner] * there, 0),
                Segments(segment, of_segment(category, -1), of_segment(score, 0)),
            )

        return jax.lax.map(view, views)


@dataclasses.dataclass(frozen=True)
class Instances(Decision):
    """Finds the best pairs of a proposal and a thing; masks may overlap, a proposal may be several things.

    As Mask2Former does it: a mask is where its sigmoid exceeds 0.5, and the score is the class's times its mean there.

    Attributes:
      top: how many pairs; published: 100.
    """

    top: int = 100

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""

        def strip(x: Float[Array, "n r w"], inside: Bool[Array, "r w"]) -> tuple[Array, ...]:
            mask = (x > 0) & inside
            return mask, jnp.where(mask, jax.nn.sigmoid(x), 0).sum((1, 2)), mask.sum((1, 2))

        masks, total, area = _strips(layers.maps, frame, strip)
        masks = _joined(jnp.moveaxis(masks, 1, -1), frame)  # [H W N]
        mean = total.sum(0) / (area.sum(0) + 1e-6)

        def view(allowed: Bool[Array, "t"]) -> Decided:
            scores = class_scores(layers.weights, vocabulary, allowed)
            scores = jnp.where(vocabulary.isthing[:, None], scores, -jnp.inf)
            best, at = jax.lax.top_k(scores.ravel(), min(self.top, scores.size))
            category, proposal = (at // scores.shape[1]).astype(jnp.int32), at % scores.shape[1]
            best = jnp.where(best > -jnp.inf, best * mean[proposal], -jnp.inf)
            order = jnp.argsort(-best, stable=True)
            best, category, proposal = best[order], category[order], proposal[order]
            real = (best > -jnp.inf) & (area.sum(0)[proposal] > 0)
            inside = masks[..., proposal] & real  # [H W S]
            found, first = inside.any(-1), inside.argmax(-1).astype(jnp.int32)
            score = jnp.where(real, best, 0)
            return Decided(
                jnp.where(found, category[first], -1),
                jnp.where(found, score[first], 0),
                Segments(
                    jnp.where(found, first + 1, 0),
                    jnp.where(real, category, -1),
                    score,
                    jnp.moveaxis(inside, -1, 0),
                ),
            )

        return jax.lax.map(view, views)


DECISIONS: dict[str, type[Decision]] = {
    "argmax": Argmax,
    "background_threshold": BackgroundThreshold,
    "groupvit": GroupVit,
    "panoptic": Panoptic,
    "instances": Instances,
}


def decision_of(value: Any) -> Decision:
    """Makes a decision of its name, or of a mapping of `type` and settings.

    Raises:
      UserError: an unknown name or setting, or a setting that is no number.
    """
    if isinstance(value, Decision):
        return value
    settings = dict(value.items()) if hasattr(value, "items") else {"type": value}
    name = settings.pop("type", None)
    if name not in DECISIONS:
        raise UserError(f"the decision {name!r} is not one of {', '.join(DECISIONS)}")
    kind = DECISIONS[name]
    fields: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    for key, number in settings.items():
        if key not in fields:
            known = ", ".join(fields) or "no setting"
            raise UserError(f"the decision {name!r} has no setting {key!r}; it has {known}")
        if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
            raise UserError(f"{key} of the decision {name!r} is a number, not {number!r}")
        if fields[key] is int and number < 1:
            raise UserError(f"{key}={number} of the decision {name!r}: it is at least 1")
    return kind(**{key: fields[key](number) for key, number in settings.items()})


def decide(
    method: Segmenting,
    prediction: Prediction,
    text: Text,
    vocabulary: Vocabulary,
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    views: Bool[Array, "b v t"],
    *,
    canvas: int,
    shape: tuple[int, int],
    decision: Decision = Argmax(),
    mode: Mode = "predicted",
    segments: Int[Array, "b hl wl"] | None = None,
    max_segments: int = 0,
) -> Decided:
    """Decides on every image of a batch at the labels' own size: [B V H W], B first everywhere. Jittable.

    Several views cost `argmax` little more than one.

    Args:
      method: what predicted.
      prediction: of the batch.
      text: embeddings of all names.
      vocabulary: of the names.
      image_size: height and width of each image on the canvas, in pixels.
      label_size: height and width of each label; both at most `shape`.
      views: the names that may be chosen in each image and view.
      canvas: size of the square canvas that the model was given, in pixels.
      shape: height and width of the maps to return.
      decision: what to decide by.
      mode: where the masks come from (Table 4): "predicted" by the model, "none" (each pixel's own feature is
        scored), or "truth" (the segments pool the pixel features, and each is named as a whole).
      segments: for "truth", the segment of every label pixel, from 1; 0 is void and gets no category.
      max_segments: for "truth", the largest segment number that can occur.

    Raises:
      UserError: the decision needs masks, and the method or the mode has none.
    """
    if mode == "truth" and (segments is None or max_segments < 1):
        raise ValueError("mode 'truth' needs segments and max_segments")
    masks = mode == "predicted" and prediction.mask_logits is not None
    if decision.needs_masks and not masks:
        raise UserError(f"the decision {type(decision).__name__} needs predicted masks, and there are none")
    if mode == "predicted" and not masks:
        raise ValueError("a per-pixel prediction has no masks: use mode 'none'")
    _, *grid, _ = next(iter(prediction.pixels.values())).shape

    def one_image(inputs: Any) -> Decided:
        seen, image, label, allowed, true = inputs
        at = frame(shape, (grid[0], grid[1]), canvas, image, label)
        if mode == "truth":
            weights = true_scores(method, seen, text, vocabulary, true, max_segments, canvas, image, label)
            name, score = paint(weights, true, allowed, shape)
            return named(name, score, score, at, vocabulary)
        return decision(layers_of(method, seen, text, vocabulary, mode), at, vocabulary, allowed)

    # Image after image: the working set is that of one image, whatever the batch.
    return jax.lax.map(one_image, (prediction, image_size, label_size, views, segments))


def named(
    name: Int[Array, "v h w"],
    confidence: Float[Array, "v h w"],
    score: Float[Array, "v h w"],
    at: Frame,
    vocabulary: Vocabulary,
) -> Decided:
    """Returns the categories of names; -1 and 0 outside of the label and where no name may win."""
    found = at.inside & (score > -jnp.inf)
    return Decided(jnp.where(found, vocabulary.owner[name], -1), jnp.where(found, confidence, 0))


def class_scores(
    weights: Float[Array, "t n"], vocabulary: Vocabulary, allowed: Bool[Array, "t"]
) -> Float[Array, "k n"]:
    """Returns the scores of classes, that of its best allowed name each; -inf for a class without one."""
    weights = jnp.where(allowed[:, None], weights, -jnp.inf)
    return jax.ops.segment_max(weights, vocabulary.owner, num_segments=len(vocabulary.isthing))


def _strips(maps: Float[Array, "n h w"], at: Frame, function: Callable[..., Any]) -> Any:
    """`function(upsampled maps [N r W], inside [r W])` of each block of rows; results stacked, [strips ...]."""
    n, width = len(maps), at.columns.shape[0]
    block = row_block(at.rows.shape[0], width * n)

    def strip(inputs: tuple[Array, Array]) -> Any:
        rows, inside = inputs
        x = jnp.einsum("rh,nhw->nrw", rows, maps, precision=PRECISION)
        return function(jnp.einsum("nrw,Ww->nrW", x, at.columns, precision=PRECISION), inside)

    return jax.lax.map(strip, (split_rows(at.rows, block), split_rows(at.inside, block)))


def _joined(x: Array, at: Frame) -> Array:
    """[strips r W ...] as [H W ...]."""
    return x.reshape(-1, *x.shape[2:])[: at.rows.shape[0]]
