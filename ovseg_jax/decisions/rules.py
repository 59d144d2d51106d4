"""Decisions: named rules that turn the scores of one image into categories and segments.

    argmax                 the best category of every pixel (papers/004, eq. 6)
    softmax                the same, but sliding windows average probabilities (google-deepmind/tips)
    background_threshold   the same, but none where the confidence is below a threshold
    groupvit               the best category of each pixel's strongest proposal, or background (NVlabs/GroupViT)
    semantic               probabilities of classes times masks, summed over the proposals (MaskFormer)
    panoptic               one proposal per pixel; things stay separate, stuff is merged (Mask2Former, FC-CLIP)
    instances              the best things, which may overlap (Mask2Former)

Evaluators, `Segmenter` and pictures use these; the exported PyTorch model has `background_threshold`, and by name
`panoptic` and `instances`.
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
from ovseg_jax.reading import kind_and_settings


class Segments(NamedTuple):
    """The segments of an image, at most S.

    Attributes:
      number: [H W] the segment of every pixel, from 1; 0 where there is none; the best of overlapping segments.
      category: [S] the category of each segment; -1 beyond the last.
      score: [S] the score of that category.
      masks: [S H W] for segments that may overlap, else None.
    """

    number: Int[Array, "*v h w"]
    category: Int[Array, "*v s"]
    score: Float[Array, "*v s"]
    masks: Bool[Array, "*v s h w"] | None = None


class Decided(NamedTuple):
    """The result of a decision on an image, for each of V views.

    Attributes:
      category: [V H W] index of the category of every pixel, -1 where there is none.
      confidence: [V H W] see `maps.confidence_of`; that of a single proposal if the decision gives a pixel to one.
      segments: for decisions that separate instances; None if a segment is all pixels of a category.
    """

    category: Int[Array, "*v h w"]
    confidence: Float[Array, "*v h w"]
    segments: Segments | None = None


class Rows(NamedTuple):
    """The scores of one window in factors: the score of row r at a pixel is `weights[r] . maps`.

    Attributes:
      weights: [R C] finite weights of each row for each map.
      owner: [R] the category of each row, -1 for background.
      allowed: [R] whether a row may be chosen.
    """

    weights: Float[Array, "r c"]
    owner: Int[Array, "r"]
    allowed: Bool[Array, "r"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """A rule with its settings: a jittable function of (layers, frame, vocabulary, views), static under jit.

    `views` [V T] marks the names that may be chosen in each view.

    Attributes:
      needs_masks: whether it needs proposals.
      strongest: whether, in windows, a pixel belongs to its strongest proposal alone, not to all by their sigmoids.
      separates: whether it separates objects of one category.
    """

    needs_masks: ClassVar[bool] = True
    strongest: ClassVar[bool] = False
    separates: ClassVar[bool] = False

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        raise NotImplementedError

    def rows(self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Rows:
        """Scores one window; the averages over the windows decide, see `decisions.windows`.

        Raises:
          UserError: the decision cannot be averaged over windows.
        """
        raise UserError(f"the decision {type(self).__name__} works on whole images, not on sliding windows")

    def confidence(self, score: Array, cover: Array, masks: bool) -> Array:
        """Returns the confidence of a pixel from the average score of its best row; `cover` is that of all maps."""
        del cover, masks
        return score

    @property
    def least(self) -> float:
        """The confidence below which a pixel has no category after the windows are averaged."""
        return -float("inf")


@dataclasses.dataclass(frozen=True)
class Argmax(Decision):
    """The best category for every pixel."""

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

    def rows(self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Rows:
        """Returns the scores of a window's names."""
        return Rows(layers.weights, vocabulary.owner, allowed)

    def confidence(self, score: Array, cover: Array, masks: bool) -> Array:
        """Returns the confidence of a pixel, see `maps.confidence_of`."""
        return jnp.asarray(confidence_of(score, cover)) if masks else score


@dataclasses.dataclass(frozen=True)
class Softmax(Argmax):
    """The best category for every pixel; sliding windows average the names' probabilities, not their scores.

    Attributes:
      scale: 1/τ, the factor from scores to logits; 1 in google-deepmind/tips, pytorch/TIPS_zeroshot_segmentation.ipynb.
    """

    scale: float = 1.0

    def rows(self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Rows:
        """Returns the logits of a window's names.

        Raises:
          UserError: there are masks, whose scores do not compete at a pixel.
        """
        if layers.masks:
            raise UserError("the decision Softmax scores pixels: take argmax or semantic for masks")
        return Rows(self.scale * layers.weights, vocabulary.owner, allowed)


@dataclasses.dataclass(frozen=True)
class BackgroundThreshold(Argmax):
    """The best category for every pixel, or none where the confidence is below `threshold`."""

    threshold: float = 0.04

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        best = super().__call__(layers, frame, vocabulary, views)
        return best._replace(category=jnp.where(best.confidence >= self.threshold, best.category, -1))

    @property
    def least(self) -> float:
        """The threshold."""
        return self.threshold


@dataclasses.dataclass(frozen=True)
class GroupVit(Decision):
    """The best category of each pixel's strongest proposal, or none (the inference of NVlabs/GroupViT).

    A proposal's affinity to a class is the softmax of its logits over all classes times that over the `top` classes of
    the image, those with the highest score for its embedding, or with the highest mean over the proposals for a method
    without one. A pixel has no category if its best affinity is below `threshold`, or below the best affinity of the
    whole image if that is lower.

    Attributes:
      threshold: affinity below which a pixel is background; published: 0.95 for VOC and COCO, 0.35 for Context.
      scale: 1/τ, the factor from scores to logits; 0 for the method's own, at most 100, or 100 if it has none.
      top: the number of classes that compete.
    """

    strongest: ClassVar[bool] = True
    threshold: float = 0.95
    scale: float = 0.0
    top: int = 5

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""
        strongest = lambda x, inside: x.argmax(0).astype(jnp.int32)
        winner = _joined(_strips(layers.maps, frame, strongest), frame)

        def view(allowed: Bool[Array, "t"]) -> tuple[Array, Array]:
            affinity, least = self._affinity(layers, vocabulary, allowed)
            best, category = affinity.max(0), affinity.argmax(0).astype(jnp.int32)
            found = frame.inside & (best >= least)[winner] & allowed.any()
            return jnp.where(found, category[winner], -1), jnp.where(found, best[winner], 0)

        return Decided(*jax.lax.map(view, views))

    def rows(self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Rows:
        """Returns the affinities of a window's proposals, and 1 for the background where they are too low."""
        affinity, least = self._affinity(layers, vocabulary, allowed)
        k = len(affinity)
        weights = jnp.concatenate([affinity, (affinity.max(0) < least).astype(affinity.dtype)[None]])
        owner = jnp.append(jnp.arange(k, dtype=jnp.int32), -1)
        # As published, the background comes first among equal scores; here no class has exactly 1.
        return Rows(weights, owner, jnp.append(classes_of(vocabulary, allowed), True))

    def _affinity(
        self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]
    ) -> tuple[Float[Array, "k n"], Float[Array, ""]]:
        """Returns the affinity of each class to each proposal, and the least that is not background."""
        score = class_scores(layers.weights, vocabulary, allowed)
        logits = logit_scale(self.scale, layers) * score
        of_image = score.mean(1)
        if layers.image is not None:
            of_image = class_scores(layers.image[:, None], vocabulary, allowed)[:, 0]
        chosen = jax.lax.top_k(of_image, min(self.top, len(of_image)))[1]
        within = jnp.full_like(logits, -jnp.inf).at[chosen].set(logits[chosen])
        affinity = jax.nn.softmax(logits, 0) * jax.nn.softmax(within, 0)
        affinity = jnp.where(jnp.isfinite(score), affinity, 0)
        # Rounding must not make the best proposal background.
        return affinity, jnp.minimum(self.threshold, affinity.max() * (1 - 1e-6))


@dataclasses.dataclass(frozen=True)
class Semantic(Decision):
    """MaskFormer's semantic inference: the probability of a class in each proposal times its mask, summed.

    A proposal's probabilities are the softmax of its logits over the classes, and "no object" if the method has it. For
    scores that are probabilities already, that is `Argmax`.

    Attributes:
      threshold: sum below which a pixel has no category; papers/002 does not state its own.
      scale: see `GroupVit`.
    """

    threshold: float = 0.0
    scale: float = 0.0

    def __call__(
        self, layers: Layers, frame: Frame, vocabulary: Vocabulary, views: Bool[Array, "v t"]
    ) -> Decided:
        """Decides on one image."""

        def view(allowed: Bool[Array, "t"]) -> tuple[Array, Array]:
            rows = self.rows(layers, vocabulary, allowed)
            at = frame.rows, frame.columns, rows.allowed[None]
            row, score, _ = best_names(rows.weights, layers.maps, *at, logits=True)
            found = frame.inside & (score[0] > -jnp.inf) & (score[0] >= self.threshold)
            return jnp.where(found, row[0], -1), jnp.where(found, score[0], 0)

        return Decided(*jax.lax.map(view, views))

    def rows(self, layers: Layers, vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Rows:
        """Returns the probabilities of a window's proposals."""
        scale = logit_scale(self.scale, layers)
        logits = scale * class_scores(layers.weights, vocabulary, allowed)
        k = len(logits)
        if layers.void is not None:
            logits = jnp.concatenate([logits, scale * layers.void[None]])
        can = classes_of(vocabulary, allowed)
        share = jnp.where(can[:, None], jax.nn.softmax(logits, 0)[:k], 0)
        return Rows(share, jnp.arange(k, dtype=jnp.int32), can)

    @property
    def least(self) -> float:
        """The threshold."""
        return self.threshold


@dataclasses.dataclass(frozen=True)
class Panoptic(Decision):
    """One proposal for every pixel: each thing is a segment, all stuff of one category is one segment.

    As in Mask2Former, a proposal is dropped if its best class is "no object" or does not exceed `object_threshold`; a
    pixel belongs to the proposal with the largest score times mask, if that mask is at least 0.5 there; a proposal that
    keeps less than `overlap_threshold` of its mask is dropped with its pixels.

    Attributes:
      object_threshold: lowest score of a proposal; published: 0.8 for Mask2Former on COCO, 0 for FC-CLIP.
      overlap_threshold: lowest share of its mask that a proposal keeps; published: 0.8.
    """

    separates: ClassVar[bool] = True
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
    """The best pairs of a proposal and a thing class; masks may overlap, a proposal may give several pairs.

    As in Mask2Former, a mask is where its sigmoid exceeds 0.5, and the score is the class's score times the mean of the
    mask there.

    Attributes:
      top: the number of pairs; published: 100.
    """

    separates: ClassVar[bool] = True
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
    "softmax": Softmax,
    "background_threshold": BackgroundThreshold,
    "groupvit": GroupVit,
    "semantic": Semantic,
    "panoptic": Panoptic,
    "instances": Instances,
}


def decision_of(value: Any) -> Decision:
    """Creates a decision from its name, or from a mapping of `type` and settings.

    Raises:
      UserError: the name or a setting is unknown, or a setting is not a number.
    """
    if isinstance(value, Decision):
        return value
    fields = {
        name: {field.name: type(field.default) for field in dataclasses.fields(kind)}
        for name, kind in DECISIONS.items()
    }
    name, settings = kind_and_settings(value, fields, "decision")
    return DECISIONS[name](**settings)


def decide(
    method: Segmenting,
    prediction: Prediction,
    text: Text,
    vocabulary: Vocabulary,
    image_size: Int[Array, "b 2"],
    label_size: Int[Array, "b 2"],
    views: Bool[Array, "b v t"],
    *,
    canvas: int | tuple[int, int],
    shape: tuple[int, int],
    decision: Decision = Argmax(),
    mode: Mode = "predicted",
    segments: Int[Array, "b hl wl"] | None = None,
    max_segments: int = 0,
) -> Decided:
    """Decides on every image of a batch at the labels' own size: [B V H W]. Jittable.

    For `argmax`, several views cost little more than one.

    Args:
      method: the method that made the prediction.
      prediction: the prediction for the batch.
      text: embeddings of all names.
      vocabulary: the classes of the names.
      image_size: height and width of each image on the canvas, in pixels.
      label_size: height and width of each label; both at most `shape`.
      views: the names that may be chosen in each image and view.
      canvas: side of the model's square input in pixels, or height and width of another.
      shape: height and width of the maps to return.
      decision: the decision to apply.
      mode: the origin of the masks (Table 4): "predicted" by the model, "none" (each pixel's own feature is scored), or
        "truth" (pixel features are pooled over each true segment, which gets one name).
      segments: for "truth", the segment of every label pixel, from 1; 0 is void and gets no category.
      max_segments: for "truth", the largest segment number that can occur.

    Raises:
      UserError: the decision needs masks, and the method or the mode has none.
    """
    if mode == "truth" and (segments is None or max_segments < 1 or not isinstance(canvas, int)):
        raise ValueError("mode 'truth' needs segments, max_segments and a square canvas")
    masks = mode == "predicted" and prediction.mask_logits is not None
    if decision.needs_masks and not masks:
        raise UserError(
            f"the decision {type(decision).__name__} needs predicted masks, which this method or mode does not have"
        )
    if mode == "predicted" and not masks:
        raise ValueError("a per-pixel prediction has no masks: use mode 'none'")
    if masks:
        assert prediction.mask_logits is not None
        grid = prediction.mask_logits.shape[2:]
    else:
        grid = next(iter(prediction.pixels.values())).shape[1:3]

    def one_image(inputs: Any) -> Decided:
        seen, image, label, allowed, true = inputs
        at = frame(shape, (grid[0], grid[1]), canvas, image, label)
        if mode == "truth":
            assert isinstance(canvas, int)
            weights = true_scores(method, seen, text, vocabulary, true, max_segments, canvas, image, label)
            name, score = paint(weights, true, allowed, shape)
            return named(name, score, score, at, vocabulary)
        return decision(layers_of(method, seen, text, vocabulary, mode), at, vocabulary, allowed)

    # One image at a time, so that memory does not grow with the batch.
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
    """Returns the score of each class, which is that of its best allowed name; -inf for a class without one."""
    weights = jnp.where(allowed[:, None], weights, -jnp.inf)
    return jax.ops.segment_max(weights, vocabulary.owner, num_segments=len(vocabulary.isthing))


def classes_of(vocabulary: Vocabulary, allowed: Bool[Array, "t"]) -> Bool[Array, "k"]:
    """Tells for each class whether one of its names is allowed."""
    return jnp.zeros(len(vocabulary.isthing), bool).at[vocabulary.owner].max(allowed)


def logit_scale(scale: float, layers: Layers) -> Float[Array, ""] | float:
    """Returns the factor from scores to logits: `scale`, or for 0 the method's own, at most 100, or 100."""
    if scale:
        return scale
    return 100.0 if layers.scale is None else jnp.minimum(layers.scale, 100.0)


def _strips(maps: Float[Array, "n h w"], at: Frame, function: Callable[..., Any]) -> Any:
    """Calls `function(upsampled maps [N r W], inside [r W])` for each block of rows and stacks the results."""
    n, width = len(maps), at.columns.shape[0]
    block = row_block(at.rows.shape[0], width * n)

    def strip(inputs: tuple[Array, Array]) -> Any:
        rows, inside = inputs
        x = jnp.einsum("rh,nhw->nrw", rows, maps, precision=PRECISION)
        return function(jnp.einsum("nrw,Ww->nrW", x, at.columns, precision=PRECISION), inside)

    return jax.lax.map(strip, (split_rows(at.rows, block), split_rows(at.inside, block)))


def _joined(x: Array, at: Frame) -> Array:
    """Reshapes [strips r W ...] to [H W ...]."""
    return x.reshape(-1, *x.shape[2:])[: at.rows.shape[0]]
