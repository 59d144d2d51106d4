"""The class for using a trained model: segmentation of images by words of your own.

segmenter = Segmenter.from_checkpoint("runs/openseg")
result = segmenter.segment("photo.jpg", "bride,woman in white; groom; cake")
result.labels, result.scores, result.masks
result.overlay().save("photo.png")
"""

import collections
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.data.images import fit_canvas, read_image
from ovseg_jax.data.windows import Sliding
from ovseg_jax.decisions.maps import Layers, Mode, confidence_of, layers_of, vocabulary_of
from ovseg_jax.decisions.published import protocol as published
from ovseg_jax.decisions.rules import (
    Argmax,
    BackgroundThreshold,
    Decided,
    Decision,
    Segments,
    decide,
    decision_of,
)
from ovseg_jax.decisions.windows import Windows, decide_windows
from ovseg_jax.errors import UserError
from ovseg_jax.files import SUMS_FILE
from ovseg_jax.inference.crf import refine
from ovseg_jax.inference.kept_texts import KeptTexts, digest
from ovseg_jax.inference.result import PixelFeatures, Result
from ovseg_jax.inference.tiles import Blender, Span, View, spans
from ovseg_jax.kernels.cpu_convs import fast_on_cpu
from ovseg_jax.models.alike import traced_once
from ovseg_jax.parallel.sharding import AXES, batch_sharding, make_mesh, replicated
from ovseg_jax.protocols import PRECISION, Prediction, Segmenting, Text, Variables, Vocabulary
from ovseg_jax.vocab.classes import ClassList, Labels, as_classes
from ovseg_jax.vocab.tokenizers import TOKENIZER
from ovseg_jax.vocab.vectors import ClassVectors

MOST_SMOOTH = 1000  # names whose confidence over time is kept
SHAPE_STEP = 128  # pixels to which sizes are rounded up, for decisions that are compiled for an image's size


class Segmenter:
    """A trained model that segments images by words: returns masks, labels, scores, pictures and features.

    Args:
      method: the method that predicts and embeds texts.
      variables: the method's variables.
      config: the config of the run; `config.data.image_size` is the size of the model's square input.
      classes: the labels to use if none are given.
      batch_size: number of images, or tiles of large ones, in a batch; a model whose canvases differ in size
        (`method.whole`) takes images one by one.
      devices: this process's devices that share each batch; by default its first one; None for all, or the first for a
        model that takes images one by one. The batch size is rounded up to a multiple of their number.
      embed_text: embeds names in place of the method, whose variables may then lack a text tower.

    Raises:
      UserError: the batch size is less than 1, or there are several devices and images that are taken one by one.
    """

    def __init__(
        self,
        method: Segmenting,
        variables: Variables,
        config: ConfigDict,
        classes: ClassList | None = None,
        *,
        batch_size: int = 8,
        devices: Sequence[jax.Device] | None = (),
        embed_text: Callable[[Sequence[str]], Text] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is less than 1")
        self.method, self.config, self.classes = method, config, classes
        if devices is None:
            devices = () if method.whole else jax.local_devices()
        if method.whole:
            if len(devices) > 1:
                raise UserError(
                    "this model takes images one by one, each in its own size: give a single device"
                )
            batch_size = 1
        self._mesh = make_mesh(devices=devices) if len(devices) > 1 else None
        self.batch_size = -(-batch_size // max(len(devices), 1)) * max(len(devices), 1)
        self.variables = jax.device_put(variables, self._mesh and replicated(self._mesh))
        run = traced_once(fast_on_cpu(method.predict))
        self._predict = jax.jit(run)
        # By default XLA runs independent operations concurrently. In sequence, those of the paper's network need half
        # of the memory on a CPU; tiles are for large images, which need much of it.
        low_memory = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        on_cpu = jax.default_backend() == "cpu"
        self._predict_tiles = jax.jit(run, compiler_options=low_memory if on_cpu else None)
        self._layers = jax.jit(partial(_layers, method))
        self._decide = jax.jit(partial(decide, method), static_argnames=("canvas", "shape", "decision"))
        self._decide_windows = jax.jit(
            partial(decide_windows, method), static_argnames=("canvas", "shape", "decision", "mode")
        )
        self._decide_all = jax.jit(self._decide_batch, static_argnames=("canvas", "shape", "decision"))
        self._texts: dict[tuple[tuple[str, ...], ...], Text] = {}
        self._embed_text = embed_text or (lambda names: self.method.embed_text(self.variables, names))

    @classmethod
    def from_checkpoint(
        cls,
        workdir: epath.PathLike,
        step: int | None = None,
        *,
        averaged: bool = True,
        texts: epath.PathLike | None = None,
        batch_size: int = 8,
        devices: Sequence[jax.Device] | None = (),
    ) -> "Segmenter":
        """Loads a run, with its latest checkpoint or that of `step`.

        From a run with `optimizer.ema` it takes the averaged parameters, or the last ones if `averaged` is False; for
        `texts`, which has an effect where `Segmenting.kept_space` says so, see `from_pretrained`; for `batch_size` and
        `devices` see the class.

        Raises:
          UserError: the folder holds no run or no such checkpoint, or the run does not segment.
        """
        from ovseg_jax.experiment.load import load_run

        run = load_run(
            workdir,
            step=step,
            averaged=averaged,
            kind=Segmenting,
            lacking="does not segment; if it classifies images, add --proposals=WORKDIR, the masks of another run "
            "(in Python, Segmenter.from_two_stages)",
        )
        return cls(
            run.method,
            run.variables,
            run.config,
            run.classes,
            batch_size=batch_size,
            devices=devices,
            embed_text=None
            if texts is None
            else _kept_texts_of_run(Path(texts), Path(workdir), run, averaged),
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        weights: epath.PathLike = "",
        classes: ClassList | None = None,
        *,
        tokenizer: epath.PathLike = "",
        features: str = "",
        trust: float = 0.0,
        texts: epath.PathLike | None = None,
        batch_size: int = 8,
        devices: Sequence[jax.Device] | None = (),
    ) -> "Segmenter":
        """Loads a published model from its own files.

        Args:
          name: a key of `methods.published.PUBLISHED`, such as "tipsv2_l14" or "fcclip_convnext_l".
          weights: its folder or file, or another place, see `pretrained.hub`; by default it is downloaded from the hub.
          classes: the labels to use if none are given; FC-CLIP has COCO's panoptic classes.
          tokenizer: the folder of the tokeniser, or its name on the hub, if it is not with the weights.
          features: for towers without masks, "value", "sclip", "clearclip" or "activation", see `methods.clip_dense`.
          trust: for FC-CLIP, see `methods.fcclip`; 0.5 for OVRCOAT's rule.
          texts: a folder in which features of names are kept between processes, see `inference.kept_texts`. The text
            tower is then used, and of towers without masks read, only for names that are not there.
          batch_size: see the class.
          devices: see the class.

        Raises:
          UserError: the name is unknown, an argument has no effect, or the weights are missing, damaged or of another
            model.
        """
        from ovseg_jax.methods.published import published_model

        method, variables, own = published_model(
            name, weights, tokenizer, features=features, trust=trust, text=texts is None
        )
        classes = own if classes is None else classes
        embed = None if texts is None else _kept_texts(Path(texts), name, method, variables)
        return cls(
            method,
            variables,
            method.config,
            classes,
            batch_size=batch_size,
            devices=devices,
            embed_text=embed,
        )

    @classmethod
    def from_two_stages(
        cls,
        proposals: Any,
        classifier: Any,
        classes: ClassList | None = None,
        *,
        templates: Any = None,
        batch_size: int = 8,
        devices: Sequence[jax.Device] | None = (),
        **rules: Any,
    ) -> "Segmenter":
        """Loads the masks of one run and the classifier of another: ZSSeg's two stages, see `TwoStage`.

        Args:
          proposals: the folder of a run that proposes masks, or an `experiment.load.Run`.
          classifier: the folder of a run that classifies images, such as a prompt's, or a `Run`.
          classes: the labels to use if none are given, by default the training classes of the proposals. Classes
            outside of the groups "unseen" and "held_out" are seen; without such groups none is, as in an evaluation
            across data sets.
          templates: hand-written prompts or the file of a learned one, see `towers.templates.read_templates`; by
            default the classifier's own prompt.
          batch_size: number of images, or tiles of large ones, in a batch.
          devices: see the class.
          **rules: see `experiment.transfer.rules_of`.

        Raises:
          UserError: a folder holds no run, or a run of the wrong kind; and see `rules_of`.
        """
        from ovseg_jax.experiment.load import Run, load_run
        from ovseg_jax.experiment.transfer import rules_of, seen_names
        from ovseg_jax.methods.zsseg import TwoStage
        from ovseg_jax.protocols import Classifier
        from ovseg_jax.towers.templates import read_templates

        def run_of(given: Any, kind: type, key: str, lacking: str) -> Run:
            return given if isinstance(given, Run) else load_run(given, kind=kind, key=key, lacking=lacking)

        first = run_of(proposals, Segmenting, "--proposals", "does not propose masks")
        second = run_of(classifier, Classifier, "--checkpoint", "does not classify images")
        classes = first.classes if classes is None else classes
        if classes is None:
            raise UserError("the argument classes= is missing: this Run of proposals has no training classes")
        method = TwoStage(
            first.method,
            second.method,
            rules_of(first, second.config, **rules),
            seen=seen_names(classes),
            templates=None if templates is None else read_templates(templates),
        )
        both = {"proposals": first.variables, "classifier": second.variables}
        return cls(method, both, first.config, classes, batch_size=batch_size, devices=devices)

    def segment(
        self,
        image: Any,
        labels: Labels | ClassVectors | None = None,
        *,
        threshold: float | None = None,
        decision: Any = None,
        tile: tuple[int, int] | None = None,
        features: bool = False,
        protocol: str | None = None,
        crf: bool = False,
    ) -> Any:
        """Gives every pixel the category that fits it best (eq. 6), or "unknown"; or applies `decision`.

        Args:
          image: a path, a PIL image or an array, see `read_image`; or a list of these.
          labels: categories with their names: `"bride,woman in white; groom; cake"`, a list of such categories, the
            path of a label file or a name of `vocab.classes.LABEL_FILES`, or a ClassList; or the path of an .npz of
            names with vectors, which `python -m ovseg_jax.prompts` writes, or ClassVectors. By default the training
            classes of the model. The score of a category is that of its best name; among equal scores the first
            category wins.
          threshold: pixels with a lower confidence (see `Result`) are unknown; by default the method's own, see
            `protocols.Segmenting`.
          decision: how scores become categories and segments, in place of the threshold: the name of a decision, such
            as "panoptic", or a mapping of its `type` and settings, see `decisions.rules`.
          tile: (size, overlap) in pixels of the image. A larger image is segmented in overlapping tiles, in more
            detail, and the scores of the tiles are blended. By default the whole image is one input.
          features: whether to also fill `Result.features`, from the same forward pass. Not with `tile`.
          protocol: a name of `decisions.published.DECISIONS`: resizes the image, averages sliding windows and decides
            as in that published evaluation, in place of `threshold`, `decision` and `tile`.
          crf: whether to move the borders of the label map to those of the image, see `inference.crf`.

        Returns:
          A Result, or for a list of images a list of Results.

        Raises:
          UserError: an image cannot be read; labels are empty; the text side cannot embed a word; vectors have another
            width; features are requested with tiles; the decision is unknown, needs masks, or does not support tiles;
            the protocol is unknown or combined with what it replaces; or a CRF with a decision on instances.
        """
        many = isinstance(image, list | tuple)
        results = self.stream(
            image if many else [image],
            labels,
            threshold=threshold,
            decision=decision,
            tile=tile,
            features=features,
            protocol=protocol,
            crf=crf,
        )
        return list(results) if many else next(results)

    def stream(
        self,
        images: Iterable[Any],
        labels: Labels | ClassVectors | None = None,
        *,
        threshold: float | None = None,
        decision: Any = None,
        tile: tuple[int, int] | None = None,
        features: bool = False,
        protocol: str | None = None,
        crf: bool = False,
        smooth: float = 0.0,
    ) -> Iterator[Result]:
        """Segments any number of images, see `segment`; yields one Result at a time, reading a batch ahead.

        With `smooth` = a > 0, the images are frames of a video, of one size: the confidence c of every name on the
        model's grid becomes a * c of the frame before + (1 - a) * c, and is upsampled to the frame's pixels. (Without
        it masks are upsampled, so that borders may differ by a pixel.)

        Raises:
          UserError: see `segment`; or `threshold` is not finite; or `smooth` is not in [0, 1), or is combined with
            `tile`, `protocol`, a decision other than "argmax" and "background_threshold", more than 1,000 names, or
            frames of several sizes.
        """
        _check_together(threshold, decision, tile, features, protocol, crf, smooth)
        if protocol:
            found = self._in_windows(images, labels, protocol)
        else:
            found = self._whole_or_tiled(images, labels, threshold, decision, tile, features, smooth)
        yield from map(_refined, found) if crf else found

    def _whole_or_tiled(
        self,
        images: Iterable[Any],
        labels: Labels | ClassVectors | None,
        threshold: float | None,
        decision: Any,
        tile: tuple[int, int] | None,
        features: bool,
        smooth: float,
    ) -> Iterator[Result]:
        """Yields the result of each image, as a whole or in tiles, by a decision; see `stream`."""
        least = self.method.unknown_below if threshold is None else threshold
        chosen = BackgroundThreshold(least) if decision is None else decision_of(decision)
        # For Argmax and BackgroundThreshold one compiled program processes blocks and tiles of images of any size.
        blocks = isinstance(chosen, Argmax) and not self.method.whole
        if tile and self.method.whole:
            raise UserError("tile: this model resizes whole images: leave out tile")
        if smooth and not blocks:
            raise UserError(
                "smooth averages the confidence of names: it works with the decisions argmax and background_threshold, "
                "and models of one input size"
            )
        if tile and not blocks:
            raise UserError(
                f"tile: the decision {type(chosen).__name__} works on whole images: leave out tile"
            )
        given = ClassVectors.of(labels)
        classes = self._categories(given or labels)
        text, owner = self.embed(given or classes), classes.flat()[1]
        if smooth and len(owner) > MOST_SMOOTH:
            raise UserError(f"smooth works with up to {MOST_SMOOTH:,} names, not {len(owner):,}")
        vocabulary = vocabulary_of(classes, self.method.seen_names())
        before: tuple[tuple[int, ...], Array] | None = None
        texts: dict[Any, Text] = {}
        blender: Blender | None = None
        device: Any = None
        # Results are fetched after later ones have been started, so that no device waits for the host.
        started: collections.deque[Callable[[], Result]] = collections.deque()
        most = self._mesh.size if self._mesh is not None else int(jax.default_backend() != "cpu")
        for job, fitted, prediction in self._predictions(images, tile):
            at = next(iter(jax.tree.leaves(prediction)[0].devices()))
            if at not in texts:
                own = _text_of(given, prediction) if given else text
                texts[at] = jax.device_put(own, at) if self._mesh is not None else own
            size = job.image.shape[:2]
            dense = PixelFeatures.of(prediction, self.canvas, fitted, size) if features else None
            if not blocks:
                # Sizes are rounded up, to limit compilations.
                shape = tuple(-(-pixels // SHAPE_STEP) * SHAPE_STEP for pixels in size)
                decided = self._decide(
                    prediction,
                    texts[at],
                    vocabulary,
                    np.array([fitted], np.int32),
                    np.array([size], np.int32),
                    np.ones((1, 1, len(owner)), bool),
                    canvas=self.canvas_of(fitted),
                    shape=shape,
                    decision=chosen,
                )
                started.append(partial(_decided, job.image, classes, decided, dense))
            else:
                layers = self._layers(prediction, texts[at], vocabulary)
                del prediction  # before the network runs again
                if smooth:
                    if before is not None and before[0] != size:
                        raise UserError(
                            f"smooth: a frame of {size[0]} x {size[1]} pixels follows one of "
                            f"{before[0][0]} x {before[0][1]}"
                        )
                    last = None if before is None else jax.device_put(before[1], at)
                    layers = _smoothed(layers, last, jnp.float32(smooth))
                    before = size, layers.maps
                if blender is None:
                    blender, device = Blender(job.rows, job.columns), at
                elif device != at:  # a tile that another device has seen
                    layers = jax.device_put(layers, device)
                if not blender.add(View(job.row, job.column, self.canvas, fitted, layers)):
                    continue
                started.append(partial(_blended, job.image, classes, blender, owner, chosen, dense))
                blender = None
            while len(started) > most:
                yield started.popleft()()
        while started:
            yield started.popleft()()

    def _in_windows(
        self, images: Iterable[Any], labels: Labels | ClassVectors | None, protocol: str
    ) -> Iterator[Result]:
        """Yields the result of each image by a published protocol."""
        rules = published(protocol)
        sliding, size, decision = (
            Sliding.of(rules["windows"]),
            rules["image_size"],
            decision_of(rules["decision"]),
        )
        given = ClassVectors.of(labels)
        classes = self._categories(given or labels)
        text, owner = self.embed(given or classes), classes.flat()[1]
        vocabulary = vocabulary_of(classes, self.method.seen_names())
        where = self._mesh and batch_sharding(self._mesh)
        for image in map(read_image, images):
            cut = sliding.cut(image, size)
            # A power of two, to limit compilations.
            count = 1 << (int(cut.window_valid.sum()) - 1).bit_length()
            if self._mesh is not None:
                count = -(-count // self._mesh.size) * self._mesh.size
            resize = lambda x, n=count: np.pad(x[:n], [(0, max(0, n - len(x)))] + [(0, 0)] * (x.ndim - 1))
            sizes, at, valid = (
                jnp.asarray(resize(x)) for x in (cut.image_size, cut.window_at, cut.window_valid)
            )
            places = Windows(sizes, at, valid, jnp.asarray(cut.resized))
            inputs = jax.device_put((resize(cut.image), places.image_size), where)
            prediction = self._predict(self.variables, *inputs)
            if given:
                text = _text_of(given, prediction)
            decided = self._decide_windows(
                *jax.tree.map(lambda x: x[None], (prediction,)),
                text,
                vocabulary,
                jax.tree.map(lambda x: x[None], places),
                np.array([image.shape[:2]], np.int32),
                np.ones((1, 1, len(owner)), bool),
                canvas=size,
                shape=tuple(-(-pixels // SHAPE_STEP) * SHAPE_STEP for pixels in image.shape[:2]),
                decision=decision,
                mode="none" if prediction.mask_logits is None else "predicted",
            )
            yield _result(image, classes, jax.device_get(decided), None)

    def features(self, image: Any) -> Any:
        """Computes text-aligned features of an image's pixels and regions: `PixelFeatures`, or a list for a list."""
        if not isinstance(image, list | tuple):
            return next(self.stream_features([image]))
        return list(self.stream_features(image))

    def has_features(self) -> bool:
        """Tells whether pixels have the features of regions, so that `features` does not raise."""
        image = jax.ShapeDtypeStruct((1, self.canvas, self.canvas, 3), np.uint8)
        size = jax.ShapeDtypeStruct((1, 2), np.int32)
        seen = jax.eval_shape(self.method.predict, self.variables, image, size)
        return bool(seen.pixels) and seen.regions.keys() <= seen.pixels.keys()

    def stream_features(self, images: Iterable[Any]) -> Iterator[PixelFeatures]:
        """Computes `features` of any number of images; yields one at a time, reading a batch ahead."""
        for job, fitted, prediction in self._predictions(images, None):
            yield PixelFeatures.of(prediction, self.canvas, fitted, job.image.shape[:2])

    def stream_batches(self, images: Iterable[Any]) -> Iterator["Batch"]:
        """Predicts any number of images; yields a batch at a time."""
        for jobs in _batched(_jobs(images, None), self.batch_size):
            yield Batch([job.image.shape[:2] for job in jobs], *self._forward(jobs, self._predict))

    def stream_maps(
        self, images: Iterable[Any], labels: Labels | None = None, *, decision: Any = "argmax"
    ) -> Iterator["LabelMap"]:
        """Decides on any number of images, a batch on all devices at a time; for the arguments see `segment`."""
        chosen, classes = decision_of(decision), self._categories(labels)
        where = self._mesh and replicated(self._mesh)
        vocabulary = vocabulary_of(classes, self.method.seen_names())
        asked = jax.device_put((self.embed(classes), vocabulary), where)
        waiting: list[tuple[Batch, Decided]] = []
        for batch in self.stream_batches(images):
            shape = tuple(
                -(-max(size[i] for size in batch.sizes) // SHAPE_STEP) * SHAPE_STEP for i in range(2)
            )
            rows = len(jax.tree.leaves(batch.prediction)[0])
            fitted, sizes = np.ones((2, rows, 2), np.int32)
            fitted[: len(batch.sizes)], sizes[: len(batch.sizes)] = batch.fitted, batch.sizes
            views = np.ones((rows, 1, len(vocabulary.owner)), bool)
            own = jax.device_put((fitted, sizes, views), self._mesh and batch_sharding(self._mesh))
            canvas = self.canvas_of(batch.fitted[0])
            decided = self._decide_all(
                batch.prediction, *asked, *own, canvas=canvas, shape=shape, decision=chosen
            )
            waiting.append((batch, decided))
            if len(waiting) > 1:  # The devices work on the next batch meanwhile.
                yield from _label_maps(*waiting.pop(0))
        for last in waiting:
            yield from _label_maps(*last)

    def _decide_batch(
        self,
        prediction: Prediction,
        text: Text,
        vocabulary: Vocabulary,
        *own: Any,
        canvas: int | tuple[int, int],
        shape: tuple[int, int],
        decision: Decision,
    ) -> Decided:
        """Decides on a batch; each device on its own images."""
        mode: Mode = "none" if prediction.mask_logits is None else "predicted"
        run: Any = partial(decide, self.method, canvas=canvas, shape=shape, decision=decision, mode=mode)
        if self._mesh is not None:
            split, whole = PartitionSpec(AXES), PartitionSpec()
            specs = (split, whole, whole, split, split, split)
            # A scan's constant initial value is not marked as varying between devices, which the check requires.
            run = jax.shard_map(run, mesh=self._mesh, in_specs=specs, out_specs=split, check_vma=False)
        return run(prediction, text, vocabulary, *own)._replace(segments=None)

    def embed(self, labels: Labels | ClassVectors) -> Text:
        """Embeds all names, category by category, in each space of the method; computed once per set of labels.

        ClassVectors have one space without a name: {"": vectors}.
        """
        if given := ClassVectors.of(labels):
            return {"": jnp.asarray(given.vectors)}
        classes = self._categories(labels)
        if classes.names not in self._texts:
            text = self._embed_text(classes.flat()[0])
            self._texts[classes.names] = jax.tree.map(jnp.asarray, text)
        return self._texts[classes.names]

    @property
    def canvas(self) -> int:
        """The side of the model's square input in pixels."""
        return int(self.config.data.image_size)

    def canvas_of(self, fitted: tuple[int, int]) -> int | tuple[int, int]:
        """Returns the side of the canvas of an image that has this size on it, or height and width of a canvas."""
        return self.method.whole.canvas(fitted) if self.method.whole else self.canvas

    def _categories(self, labels: Labels | ClassVectors | None) -> ClassList:
        if isinstance(labels, ClassVectors):
            return labels.classes
        if labels is None:
            labels = self.classes
        if labels is None:
            raise UserError('no labels were given: give for example "dog; grass,lawn"')
        if not isinstance(labels, ClassList):
            labels = as_classes(labels)
        if not len(labels):
            raise UserError('the list of labels is empty: give for example "dog; grass,lawn"')
        return labels

    def _predictions(
        self, images: Iterable[Any], tile: tuple[int, int] | None
    ) -> Iterator[tuple["_Job", tuple[int, int], Prediction]]:
        """Yields every tile of every image with its size in the model's input and its prediction."""
        for jobs in _batched(_jobs(images, tile), self.batch_size):
            fitted, prediction = self._forward(jobs, self._predict_tiles if tile else self._predict)
            rows = len(jax.tree.leaves(prediction)[0])
            for i, (job, size) in enumerate(zip(jobs, fitted, strict=True)):
                mesh = self._mesh
                at = mesh and mesh.devices.flat[i * mesh.size // rows]
                yield job, size, jax.tree.map(partial(_row, i, at), prediction)
            del prediction  # before the network runs again

    def _forward(
        self, jobs: Sequence["_Job"], predict: Callable[..., Prediction]
    ) -> tuple[list[tuple[int, int]], Prediction]:
        """Returns the sizes of some tiles in the model's input, and their prediction, padded to more rows."""
        fit = self.method.whole.fit if self.method.whole else partial(fit_canvas, size=self.canvas)
        fitted = [fit(job.image[slice(*job.row), slice(*job.column)]) for job in jobs]
        # Batches of 1, 2, 4, ... images: few compilations, and a single image is not padded to a full batch.
        count = min(self.batch_size, 1 << (len(jobs) - 1).bit_length())
        if self._mesh is not None:
            count = -(-count // self._mesh.size) * self._mesh.size
        canvases = np.zeros((count, *fitted[0][0].shape), np.uint8)
        sizes = np.broadcast_to(np.int32(canvases.shape[1:3]), (count, 2)).copy()
        for i, (canvas, size) in enumerate(fitted):
            canvases[i], sizes[i] = canvas, size
        where = self._mesh and batch_sharding(self._mesh)
        prediction = predict(self.variables, *jax.device_put((canvases, sizes), where))
        return [size for _, size in fitted], prediction


class Batch(NamedTuple):
    """The prediction of some images.

    Attributes:
      sizes: height and width of each image.
      fitted: height and width of each in the model's input.
      prediction: its first rows are those images, the others padding.
    """

    sizes: list[tuple[int, int]]
    fitted: list[tuple[int, int]]
    prediction: Prediction


class LabelMap(NamedTuple):
    """The decision on an image.

    Attributes:
      category: [H W] index of the category of every pixel, -1 where there is none.
      confidence: [H W] see `decisions.rules.Decided`.
    """

    category: Int[np.ndarray, "h w"]
    confidence: Float[np.ndarray, "h w"]


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


def _batched(jobs: Iterator[_Job], count: int) -> Iterator[list[_Job]]:
    while some := list(itertools.islice(jobs, count)):
        yield some


def _label_maps(batch: Batch, decided: Decided) -> Iterator[LabelMap]:
    category, confidence = jax.device_get((decided.category[:, 0], decided.confidence[:, 0]))
    for i, (height, width) in enumerate(batch.sizes):
        yield LabelMap(category[i, :height, :width], confidence[i, :height, :width])


def _kept_texts(
    folder: Path, name: str, method: Any, variables: Variables
) -> Callable[[Sequence[str]], Text]:
    """Returns a function that embeds names and keeps their features, for a published model."""
    from ovseg_jax.methods.clip_dense import ClipDense
    from ovseg_jax.pretrained.hub import find
    from ovseg_jax.towers.clip import SPACE

    config, init = method.config, method.config.towers.init
    weights = lambda: variables
    if isinstance(method, ClipDense):
        weights = cache(lambda: {"towers": jax.device_put(method.clip.pretrained("text"))})
    else:  # FC-CLIP, whose file has both towers
        init = str(find(config.model.init))

    def embed(names: list[str]) -> Array:
        return method.embed_text(weights(), names)[SPACE]

    files = [path for path in map(Path, dict.fromkeys((init, config.towers.tokenizer))) if path.exists()]
    key = digest(files, name, config.towers.to_dict(), method.templates)
    kept = KeptTexts(folder / f"{name}-{key}.npz", embed, method.clip.dim)
    return lambda names: {SPACE: jnp.asarray(kept(names))}


def _kept_texts_of_run(
    folder: Path, workdir: Path, run: Any, averaged: bool
) -> Callable[[Sequence[str]], Text] | None:
    """Returns a function that embeds names and keeps their features, for a run in a local folder that is worth it."""
    from ovseg_jax.towers.frozen_text import TEXT_TOWER
    from ovseg_jax.train.checkpoints import FROZEN

    space = run.method.kept_space()
    # Beside the variables, this file has the checksums of all others of the checkpoint.
    saved = workdir / "checkpoints" / str(run.step)
    if space is None or not (saved / SUMS_FILE).is_file():
        return None
    # Its own files, and those that its config names, such as a prompt's.
    parts = [workdir, saved, saved.with_name(FROZEN), workdir / TEXT_TOWER, workdir / TOKENIZER]
    named = [
        Path(x) for x in jax.tree.leaves(run.config.to_dict()) if isinstance(x, str) and os.path.isfile(x)
    ]
    key = digest([path for path in parts if path.exists()] + named, averaged)

    def embed(names: list[str]) -> Array:
        return run.method.embed_text(run.variables, names)[space[0]]

    kept = KeptTexts(folder / f"run-{key}.npz", embed, space[1])
    return lambda names: {space[0]: jnp.asarray(kept(names))}


def _layers(method: Segmenting, prediction: Prediction, text: Text, vocabulary: Vocabulary) -> Layers:
    """Computes the scores of the only image of a prediction."""
    return layers_of(method, jax.tree.map(lambda x: x[0], prediction), text, vocabulary)


@jax.jit
def _smoothed(layers: Layers, before: Float[Array, "t h w"] | None, share: Float[Array, ""]) -> Layers:
    """Returns layers whose maps are the confidence of each name, averaged with those of the frames before."""
    maps = jax.nn.sigmoid(layers.maps) if layers.masks else layers.maps
    score = jnp.einsum("tc,chw->thw", layers.weights, maps, precision=PRECISION)
    now = jnp.asarray(confidence_of(score, maps.sum(0))) if layers.masks else score
    now = now if before is None else share * before + (1 - share) * now
    return Layers(jnp.eye(len(now)), now, None, False)


def _text_of(given: ClassVectors, prediction: Prediction) -> Text:
    """Returns class vectors as embeddings in the only space of a prediction."""
    spaces = prediction.pixels if prediction.mask_logits is None else prediction.regions
    if len(spaces) > 1:
        raise UserError("labels with vectors cannot be used with two runs: give the labels as words")
    (space, features), vectors = *spaces.items(), given.vectors
    if vectors.shape[1] != (width := features.shape[-1]):
        raise UserError(
            f"labels: their vectors have {vectors.shape[1]} numbers, but this model's have {width}"
        )
    return {space: jnp.asarray(vectors)}


def _check_together(
    threshold: float | None,
    decision: Any,
    tile: tuple[int, int] | None,
    features: bool,
    protocol: str | None,
    crf: bool,
    smooth: float,
) -> None:
    """Checks that arguments of `Segmenter.stream` can be used together.

    Raises:
      UserError: they cannot.
    """
    if threshold is not None and not math.isfinite(threshold):
        raise UserError(f"threshold={threshold} is not a finite number")
    if not 0 <= smooth < 1:
        raise UserError(f"smooth={smooth} is not a number from 0 to below 1")
    if smooth and (tile or protocol):
        raise UserError("smooth works on whole frames: leave out tile and protocol")
    if protocol is not None and (decision is not None or tile or features):
        raise UserError("protocol works on sliding windows: leave out decision, tile and features")
    if threshold is not None and (protocol is not None or decision is not None):
        name = "protocol" if decision is None else "decision"
        raise UserError(f"{name} decides by its own rule: leave out threshold")
    if crf and decision is not None and decision_of(decision).separates:
        raise UserError("crf works on label maps: leave out the decision, which separates objects")
    if features and tile:
        raise UserError("features works on whole images: leave out tile, or cut the image yourself")


def _refined(result: Result) -> Result:
    """Returns a result whose label map follows the borders of its image."""
    labels = refine(result.image, result.label_map)
    return Result.of(result.image, result.classes, labels, result.confidence, features=result.features)


def _row(i: int, device: jax.Device | None, x: jax.Array) -> jax.Array:
    """Returns row i of an array, [1 ...], on a device, without a copy from another one if it holds the row."""
    for shard in x.addressable_shards if device is not None else ():
        start, stop, _ = shard.index[0].indices(len(x))
        if shard.device == device and start <= i < stop:
            return shard.data[i - start : i - start + 1]
    if device is None and len(x) == 1:
        return x  # without a copy
    return x[i : i + 1] if device is None else jax.device_put(x[i : i + 1], device)


def _decided(image: np.ndarray, classes: ClassList, decided: Decided, dense: PixelFeatures | None) -> Result:
    return _result(image, classes, jax.device_get(decided), dense)


def _blended(
    image: np.ndarray,
    classes: ClassList,
    blender: Blender,
    owner: np.ndarray,
    decision: Decision,
    dense: PixelFeatures | None,
) -> Result:
    """Creates the result of an image whose tiles have all been added."""
    blender.finish()
    confidence = blender.confidence
    label_map = owner.astype(np.int32, copy=False)[blender.name]
    if isinstance(decision, BackgroundThreshold):
        label_map[~(confidence >= decision.threshold)] = -1
    return Result.of(image, classes, label_map, confidence, features=dense)


def _result(image: np.ndarray, classes: ClassList, decided: Decided, dense: PixelFeatures | None) -> Result:
    """Creates the result of the only image and view of a decision, cropped to the image."""
    height, width = image.shape[:2]
    cut = lambda x: np.asarray(x)[0, 0][..., :height, :width]
    segments = decided.segments
    if segments is not None:
        masks = None if segments.masks is None else cut(segments.masks)
        segments = Segments(cut(segments.number), segments.category[0, 0], segments.score[0, 0], masks)
    return Result.of(image, classes, cut(decided.category), cut(decided.confidence), segments, dense)


__all__ = ["PixelFeatures", "Result", "Segmenter"]
