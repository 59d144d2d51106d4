"""Segment images by words of your own.

segmenter = Segmenter.from_checkpoint("runs/openseg")
result = segmenter.segment("photo.jpg", "bride,woman in white; groom; cake")
result.labels, result.scores, result.masks
result.overlay().save("photo.png")
"""

import functools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.data.images import fit_canvas, read_image
from ovseg_jax.decisions.segment import RegionScores, region_scores_of
from ovseg_jax.errors import UserError
from ovseg_jax.inference.result import PixelFeatures, Result
from ovseg_jax.inference.tiles import Blender, Span, View, spans
from ovseg_jax.kernels.cpu_convs import fast_on_cpu
from ovseg_jax.protocols import Prediction, Segmenting, Variables
from ovseg_jax.vocab.classes import ClassList, Labels, as_classes
from ovseg_jax.vocab.vectors import ClassVectors

UNKNOWN_BELOW = 0.04  # the released demo's threshold


class Segmenter:
    """Images and texts in; masks, labels, scores, pictures and features out.

    Args:
      method: what predicts and embeds texts.
      variables: the method's variables.
      config: the config of the run; `config.data.image_size` is the size of the canvas that the model sees.
      classes: the labels to use where none are given.
      batch_size: images, or tiles of large ones, that go through the model together.
    """

    def __init__(
        self,
        method: Segmenting,
        variables: Variables,
        config: ConfigDict,
        classes: ClassList | None = None,
        *,
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: it takes at least 1")
        self.method, self.config, self.classes, self.batch_size = method, config, classes, batch_size
        self.variables = jax.device_put(variables)
        self._predict = jax.jit(fast_on_cpu(method.predict))
        self._texts: dict[tuple[tuple[str, ...], ...], Float[Array, "t d"]] = {}

    @classmethod
    def from_checkpoint(
        cls,
        workdir: epath.PathLike,
        step: int | None = None,
        *,
        averaged: bool = True,
        batch_size: int = 8,
    ) -> "Segmenter":
        """Loads a run: its config, words, classes and, of its checkpoints, the latest or that of `step`.

        Of a run with `optimizer.ema` it takes the averaged parameters, or the last ones where `averaged` is False.

        Raises:
          UserError: the folder holds no run, or no such checkpoint.
        """
        from ovseg_jax.experiment.load import load_run

        run = load_run(
            workdir,
            step=step,
            averaged=averaged,
            kind=Segmenting,
            lacking="does not segment; where it classifies images, --proposals=WORKDIR takes the masks of another run "
            "(in Python, Segmenter.from_two_stages)",
        )
        return cls(run.method, run.variables, run.config, run.classes, batch_size=batch_size)

    @classmethod
    def from_two_stages(
        cls,
        proposals: Any,
        classifier: Any,
        classes: ClassList | None = None,
        *,
        templates: Any = None,
        batch_size: int = 8,
        **rules: Any,
    ) -> "Segmenter":
        """The masks of one run, named by the classifier of another: ZSSeg's two stages, see `methods.zsseg.TwoStage`.

        Args:
          proposals: the folder of a run that proposes masks, or an `experiment.load.Run`.
          classifier: the folder of a run that classifies images, such as a prompt's, or a `Run`.
          classes: the labels to use where none are given, by default those that the proposals were trained with.
            Classes in no group "unseen" or "held_out" are seen; without such a group none is, as in an evaluation
            across data sets.
          templates: hand-written prompts or the file of a learned one, see `towers.templates.read_templates`; by
            default the classifier's own.
          batch_size: images, or tiles of large ones, that go through the models together.
          **rules: see `experiment.transfer.rules_of`.

        Raises:
          UserError: a folder holds no run, or one that does something else; and see `rules_of`.
        """
        from ovseg_jax.experiment.load import Run, load_run
        from ovseg_jax.experiment.transfer import rules_of, seen_names
        from ovseg_jax.methods.zsseg import TwoStage
        from ovseg_jax.protocols import Classifier
        from ovseg_jax.towers.templates import read_templates

        def run_of(given: Any, kind: type, key: str, lacking: str) -> Run:
            return given if isinstance(given, Run) else load_run(given, kind=kind, key=key, lacking=lacking)

        first = run_of(proposals, Segmenting, "--proposals", "proposes no masks")
        second = run_of(classifier, Classifier, "--checkpoint", "classifies no images")
        classes = first.classes if classes is None else classes
        if classes is None:
            raise UserError("say classes=: this Run of proposals does not know what they were trained with")
        method = TwoStage(
            first.method,
            second.method,
            rules_of(first, second.config, **rules),
            seen=seen_names(classes),
            templates=None if templates is None else read_templates(templates),
        )
        both = {"proposals": first.variables, "classifier": second.variables}
        return cls(method, both, first.config, classes, batch_size=batch_size)

    def segment(
        self,
        image: Any,
        labels: Labels | ClassVectors | None = None,
        *,
        threshold: float = UNKNOWN_BELOW,
        tile: tuple[int, int] | None = None,
        features: bool = False,
    ) -> Any:
        """Gives every pixel the category that fits it best (eq. 6), or "unknown".

        Args:
          image: a path, a PIL image or an array, as `read_image` takes them; or a list of such.
          labels: categories with their names: `"bride,woman in white; groom; cake"`, a list of such
            categories, the path of a label file, or a ClassList; or the path of an .npz of names with vectors, which
            `python -m ovseg_jax.prompts` writes, or ClassVectors. By default the classes that the model was trained
            with. A category scores as its best name does; of two equal ones the first wins.
          threshold: pixels with a lower confidence (see `Result`) are unknown.
          tile: (size, overlap) in pixels of the image. A larger image is cut into overlapping tiles which the
            model sees one by one, in more detail; their scores are blended. By default it sees the whole
            image at once.
          features: fill `Result.features` too, from the same pass through the model. Not with `tile`.

        Returns:
          A Result, or for a list of images a list of Results.

        Raises:
          UserError: an image that cannot be read; empty labels; a word that the text side cannot embed; vectors of
            another width; features of tiles.
        """
        many = isinstance(image, list | tuple)
        results = self.stream(
            image if many else [image], labels, threshold=threshold, tile=tile, features=features
        )
        return list(results) if many else next(results)

    def stream(
        self,
        images: Iterable[Any],
        labels: Labels | ClassVectors | None = None,
        *,
        threshold: float = UNKNOWN_BELOW,
        tile: tuple[int, int] | None = None,
        features: bool = False,
    ) -> Iterator[Result]:
        """`segment` for any number of images: one Result after the other, reading a batch ahead."""
        if features and tile:
            raise UserError(
                "features are those of the whole image: leave out tile, or cut the image yourself"
            )
        given, scores = ClassVectors.of(labels), region_scores_of(self.method)
        if given is not None and hasattr(self.method, "region_scores"):
            raise UserError(
                "labels with vectors are for one model: masks of one and names of another take words"
            )
        classes = self._categories(given or labels)
        text, owner = self.embed(given or classes), classes.flat()[1]
        blender: Blender | None = None
        for job, fitted, prediction in self._predictions(images, tile):
            blender = blender or Blender(job.rows, job.columns)
            if given and text.shape[1] != (width := prediction.pixel_embed.shape[-1]):
                raise UserError(
                    f"labels: their vectors have {text.shape[1]} numbers, and this model's {width}"
                )
            maps, weights = _as_maps(prediction, text, owner, region_scores=scores)
            logits = prediction.mask_logits is not None
            view = View(job.row, job.column, self._canvas, fitted, maps, weights, logits)
            if not blender.add(view):
                continue
            confidence: np.ndarray = blender.score
            if logits:
                confidence = confidence / np.maximum(blender.cover, 1)
            label_map = np.where(confidence >= threshold, owner[blender.name], -1).astype(np.int32)
            dense = PixelFeatures.of(prediction, self._canvas, fitted, label_map.shape) if features else None
            yield Result(job.image, classes, label_map, confidence, dense)
            blender = None

    def features(self, image: Any) -> Any:
        """Text-aligned features of an image's pixels and regions: `PixelFeatures`, or a list for a list."""
        if not isinstance(image, list | tuple):
            return next(self.stream_features([image]))
        return list(self.stream_features(image))

    def stream_features(self, images: Iterable[Any]) -> Iterator[PixelFeatures]:
        """`features` for any number of images, one after the other, reading a batch ahead."""
        for job, fitted, prediction in self._predictions(images, None):
            yield PixelFeatures.of(prediction, self._canvas, fitted, job.image.shape[:2])

    def embed(self, labels: Labels | ClassVectors) -> Float[Array, "t d"]:
        """Unit-norm embeddings of all names, category by category; computed once per set of labels."""
        if given := ClassVectors.of(labels):
            return jnp.asarray(given.vectors)
        classes = self._categories(labels)
        if classes.names not in self._texts:
            self._texts[classes.names] = jnp.asarray(
                self.method.embed_text(self.variables, classes.flat()[0])
            )
        return self._texts[classes.names]

    @property
    def _canvas(self) -> int:
        return int(self.config.data.image_size)

    def _categories(self, labels: Labels | ClassVectors | None) -> ClassList:
        if isinstance(labels, ClassVectors):
            return labels.classes
        if labels is None:
            labels = self.classes
        if labels is None:
            raise UserError('no labels were given: name some, for example "dog; grass,lawn"')
        if not isinstance(labels, ClassList):
            labels = as_classes(labels)
        if not len(labels):
            raise UserError('the list of labels is empty: name some, for example "dog; grass,lawn"')
        return labels

    def _predictions(
        self, images: Iterable[Any], tile: tuple[int, int] | None
    ) -> Iterator[tuple["_Job", tuple[int, int], Prediction]]:
        """Every tile of every image through the model: what it is of, its size on the canvas, one view."""
        waiting: deque[_Job] = deque()
        for job in _jobs(images, tile):
            waiting.append(job)
            if len(waiting) == self.batch_size:
                yield from self._see(waiting)
                waiting.clear()
        if waiting:
            yield from self._see(waiting)

    def _see(self, jobs: Iterable["_Job"]) -> Iterator[tuple["_Job", tuple[int, int], Prediction]]:
        jobs = list(jobs)
        fitted = [fit_canvas(job.image[slice(*job.row), slice(*job.column)], self._canvas) for job in jobs]
        # Batches of 1, 2, 4, ...: few compilations, and one image does not pay for eight.
        count = min(self.batch_size, 1 << (len(jobs) - 1).bit_length())
        canvases = np.zeros((count, self._canvas, self._canvas, 3), np.uint8)
        sizes = np.full((count, 2), self._canvas, np.int32)
        for i, (canvas, size) in enumerate(fitted):
            canvases[i], sizes[i] = canvas, size
        prediction = self._predict(self.variables, canvases, sizes)
        for i, (job, (_, size)) in enumerate(zip(jobs, fitted, strict=True)):
            yield job, size, jax.tree.map(lambda x, i=i: x[i : i + 1], prediction)


class _Job(NamedTuple):
    """One tile of one image."""

    image: UInt8[np.ndarray, "h w 3"]
    rows: list[Span]
    columns: list[Span]
    row: Span
    column: Span


def _jobs(images: Iterable[Any], tile: tuple[int, int] | None) -> Iterator[_Job]:
    for image in map(read_image, images):
        rows, columns = spans(image.shape[0], tile), spans(image.shape[1], tile)
        for row in rows:
            for column in columns:
                yield _Job(image, rows, columns, row, column)


@functools.partial(jax.jit, static_argnames="region_scores")
def _as_maps(
    prediction: Prediction, text: Float[Array, "t d"], owner: Int[Array, "t"], *, region_scores: RegionScores
) -> tuple[Float[Array, "n h w"], Float[Array, "t n"]]:
    """The maps of one image, and what each says about each name: mask logits and cosines, or features and
    names."""
    if prediction.mask_logits is None or prediction.region_embed is None:
        features = prediction.pixel_embed[0]
        norm = jnp.sqrt(jnp.maximum(jnp.square(features).sum(-1, keepdims=True), 1e-12))
        return jnp.moveaxis(features / norm, -1, 0), text
    return prediction.mask_logits[0], region_scores(jax.tree.map(lambda x: x[0], prediction), text, owner)


__all__ = ["PixelFeatures", "Result", "Segmenter"]
