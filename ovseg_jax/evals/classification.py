"""Classification of whole images by class names: accuracies, and alignment and uniformity of the features.

One pass over the images computes all metrics, for the method's own prompt and for any number of others: the images are
embedded on the mesh, each device finds the classes nearest to its images, and every process gathers these few numbers
of each image and counts them on the host.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.evals.base import BatchEvaluator
from ovseg_jax.evals.nearest import names_of, nearest_classes
from ovseg_jax.evals.passes import each_batch
from ovseg_jax.evals.registry import Setup
from ovseg_jax.evals.uniformity import distances, uniformity
from ovseg_jax.parallel.sharding import AXES, replicated
from ovseg_jax.protocols import Classifier, Variables, only
from ovseg_jax.towers.features import class_features
from ovseg_jax.towers.prompt_file import Prompt
from ovseg_jax.vocab.classes import ClassList

PAIRS = (("base", "new"), ("seen", "unseen"), ("seen", "held_out"))
"""Groups that are also scored among their own classes only, and together as a harmonic mean."""


class Outcomes(NamedTuple):
    """The results of images under each of P prompts.

    Attributes:
      label: the true class; -1 for padding.
      predicted: the nearest of all classes.
      top5: whether the true class is among the five nearest.
      own: the nearest class within each of V groups.
      distance: ||x - w_y||² of the image to its class's first name; None if features are not unit vectors.
    """

    label: Int[np.ndarray, "b"]
    predicted: Int[np.ndarray, "p b"]
    top5: Bool[np.ndarray, "p b"]
    own: Int[np.ndarray, "p v b"]
    distance: Float[np.ndarray, "p b"] | None


class AccuracyRow(NamedTuple):
    """A line of the per-class table, for the method's own prompt.

    Attributes:
      name: the class's first name.
      group: its groups, joined by "+".
      images: the number of its images.
      correct: the number of them that are classified correctly.
      accuracy: in percent; None without images.
      confused_with: the class predicted most often for the others; None if there are none.
    """

    name: str
    group: str
    images: int
    correct: int
    accuracy: float | None
    confused_with: str | None


class ClassificationEvaluator(BatchEvaluator):
    """An evaluator of accuracy over all classes of a source, in percent, and alignment and uniformity.

    Metrics: those of `scores`, and `uniformity` (papers/000, eq. 7, over the classes' first names). Without a suffix
    they belong to the method's own prompt; those of each further prompt have the suffix `[<prompt>]`. `score` repeats
    the metric that the option `metric` names, the main one of the data set.
    """

    needs = frozenset({"image", "label"})
    takes = Classifier
    overrides = ("image_size",)
    options = ("prompts", "metric", "names")

    def __init__(
        self,
        *common: Any,
        prompts: Mapping[str, Sequence[str] | Prompt] | None = None,
        metric: str | None = None,
        names: str = "first",
        every: int = 0,
    ):
        """Creates an evaluator.

        Args:
          *common, every: see `BatchEvaluator`; batches may hold unit-norm features (`feature`) in place of `image`.
          prompts: hand-written or learned prompts by name; the unit features of several templates are averaged and
            normalised (CLIP's prompt ensemble).
          metric: the metric to repeat as `score`, such as "accuracy" or "per_class"; none by default.
          names: "first" scores a class by its first name, on which prompts are trained, as in papers/000; "all" by the
            best of its names.

        Raises:
          UserError: `names` is neither.
        """
        super().__init__(*common, every=every)
        if names not in ("first", "all"):
            raise UserError(f"evals.{self.name}.names={names!r} is not one of first, all")
        self._prompts, self._metric = dict(prompts or {}), metric
        self._groups = own_groups(self._classes)
        scored = self._classes
        if names == "first":
            scored = dataclasses.replace(scored, names=tuple(own[:1] for own in scored.names))
        self._names, self._texts = names_of(scored), scored.flat()[0]
        everything = np.arange(len(scored))
        own = [np.isin(everything, scored.groups[group]) for group in self._groups]
        self._allowed = np.stack([everything >= 0, *own])
        self._step = jax.jit(self._outcomes, out_shardings=replicated(self._mesh))
        self._kept: Any = None

    @classmethod
    def arguments(cls, setup: Setup) -> dict[str, Any]:
        """Returns the constructor's keyword arguments, with the prompts read by `Setup.prompts`."""
        return super().arguments(setup) | {"prompts": setup.prompts()}

    def run(self, variables: Variables) -> dict[str, float]:
        """Computes the metrics and fills `tables`.

        Raises:
          UserError: there is no image with a class, or no such `metric`.
        """
        with jax.set_mesh(self._mesh):
            text = jax.device_put(self._text(variables), replicated(self._mesh))
            step = partial(self._step, variables, text)
            outcomes = list(each_batch(self._batches(), step, self._mesh))
            spread: list[float | None] = [None] * (1 + len(self._prompts))
            if self._method.unit_norm:
                first = only(text)[:, self._names[:, 0]]
                spread = [uniformity(features, self._mesh) for features in first]
            if self._method.text_per_image:
                spread[0] = None
        if not outcomes or not (known := np.concatenate([o.label for o in outcomes]) >= 0).any():
            raise UserError(f"evals.{self.name}: the source has no image with a class to evaluate on")
        total = jax.tree.map(lambda *parts: np.concatenate(parts, -1)[..., known], *outcomes)
        result: dict[str, float] = {}
        for p, prompt in enumerate(["", *self._prompts]):
            suffix = f"[{prompt}]" if prompt else ""
            found = scores(total, p, self._classes)
            if (uniform := spread[p]) is not None:
                found["uniformity"] = uniform
            if self._metric is not None:
                if self._metric not in found:
                    raise UserError(
                        f"evals.{self.name}.metric={self._metric!r} is not one of {', '.join(found)}"
                    )
                found["score"] = found[self._metric]
            # Chance does not depend on the prompt.
            result |= {k + suffix: v for k, v in found.items() if not (suffix and k.startswith("chance"))}
        self.tables = {"accuracy": table(total, self._classes)}
        return result

    def _text(self, variables: Variables) -> dict[str, Float[Array, "p t d"]]:
        """Embeds every name under every prompt, [P T D] by space; zeros for a prompt that depends on the image."""
        under = lambda templates: class_features(self._method, variables, self._texts, templates)
        if self._method.text_per_image:
            like = self._method.embed_phrases(variables, self._texts[:1])
            own = {space: jnp.zeros((len(self._texts), *x.shape[1:])) for space, x in like.items()}
        else:
            own = under(None)
        others = self._kept
        if others is None:
            others = [under(templates) for templates in self._prompts.values()]
        if self._method.frozen_towers:
            self._kept = others
        return jax.tree.map(lambda *prompts: jnp.stack(prompts), own, *others)

    def _outcomes(
        self, variables: Variables, text: dict[str, Float[Array, "p t d"]], batch: dict[str, Array]
    ) -> Outcomes:
        cached = batch.get("feature")
        image = self._method.embed_image(variables, batch["image"]) if cached is None else cached
        label = jnp.where(batch["example_mask"], batch["label"], -1)
        split = PartitionSpec(AXES)
        of_prompts = PartitionSpec(None, AXES)
        classify: Any = jax.shard_map(
            self._classify_shard,
            mesh=self._mesh,
            in_specs=(split, split, PartitionSpec(), PartitionSpec()),
            out_specs=(split, of_prompts, of_prompts, PartitionSpec(None, None, AXES), of_prompts),
            # A scan's constant initial value is not marked as varying between devices, which the check requires.
            check_vma=False,
        )
        return Outcomes(*classify(image, label, text, variables if self._method.text_per_image else None))

    def _classify_shard(self, image, label, text, variables) -> tuple[Array | None, ...]:
        """Computes the outcomes of one device's images, in the order of `Outcomes`."""

        def under(text, image=image, label=label):
            near = nearest_classes(self._method.score_images, image, text, self._names, self._allowed, 5)
            distance = None
            if self._method.unit_norm:
                distance = distances(image, only(text)[self._names[:, 0]], jnp.maximum(label, 0))
            return near[0, :, 0], (near[0] == label[:, None]).any(-1), near[1:, :, 0], distance

        def of_image(example):
            image, label = example
            text = self._method.embed_text_for(variables, self._texts, image)
            return under(text, image[None], label[None])

        found = jax.lax.map(under, text)
        if self._method.text_per_image:
            own = jax.lax.map(of_image, (image, label))
            found = jax.tree.map(lambda x, y: x.at[0].set(jnp.moveaxis(y[..., 0], 0, -1)), found, own)
        return (label, *found)


def own_groups(classes: ClassList) -> list[str]:
    """Returns the groups that are scored among their own classes: the first pair of `PAIRS` that the list has."""
    for pair in PAIRS:
        if all(classes.groups.get(group) for group in pair):
            return list(pair)
    return []


def scores(outcomes: Outcomes, p: int, classes: ClassList) -> dict[str, float]:
    """Computes the scores under prompt `p`, in percent except for `alignment`.

    - `accuracy`: share of images whose class is the nearest of all. `accuracy@5`: share of images whose class is among
      the five nearest; omitted for five classes or fewer.
    - `per_class`: the accuracy averaged over the classes that occur, the metric of Caltech101, Pets, Flowers102 and
      Aircraft (papers/000, table 11).
    - for each group, `accuracy@<group>`: accuracy on the group's images, among all classes.
    - for base and new, or seen and held_out or unseen: `accuracy@<group>@own`, among the group's classes only, and
      `harmonic`, the harmonic mean of these two (CoCoOp's protocol of base and new classes).
    - `chance`, `chance@<group>@own`: the expected accuracy of random answers.
    - `alignment`: mean of ||x - w_y||² (papers/000, eq. 6), lower is better.

    A score whose divisor is zero is omitted.
    """
    label, right = outcomes.label, outcomes.predicted[p] == outcomes.label
    n = len(classes)
    images, correct = np.bincount(label, minlength=n), np.bincount(label[right], minlength=n)
    result = {"accuracy": _percent(right)}
    if n > 5:
        result["accuracy@5"] = _percent(outcomes.top5[p])
    result["per_class"] = 100.0 * float((correct[images > 0] / images[images > 0]).mean())
    own = own_groups(classes)
    both = []
    for group, members in classes.groups.items():
        inside = np.isin(label, list(members))
        if not inside.any():
            continue
        result[f"accuracy@{group}"] = _percent(right[inside])
        if group in own:
            both.append(_percent((outcomes.own[p, own.index(group)] == label)[inside]))
            result[f"accuracy@{group}@own"] = both[-1]
            result[f"chance@{group}@own"] = 100.0 / len(members)
    if len(both) == 2:
        result["harmonic"] = 2 * both[0] * both[1] / sum(both) if sum(both) else 0.0
    result["chance"] = 100.0 / n
    if outcomes.distance is not None:
        result["alignment"] = float(outcomes.distance[p].astype(np.float64).mean())
    return result


def table(outcomes: Outcomes, classes: ClassList) -> list[AccuracyRow]:
    """Returns a row for each class, under the method's own prompt."""
    label, predicted, n = outcomes.label, outcomes.predicted[0], len(classes)
    images, correct = np.bincount(label, minlength=n), np.bincount(label[predicted == label], minlength=n)
    wrong = (predicted != label) & (predicted >= 0)
    mistakes, times = np.unique(label[wrong].astype(np.int64) * n + predicted[wrong], return_counts=True)
    confused_with: dict[int, int] = {}
    for mistake in mistakes[np.argsort(-times, kind="stable")]:
        confused_with.setdefault(int(mistake // n), int(mistake % n))
    groups: list[list[str]] = [[] for _ in range(n)]
    for group, members in classes.groups.items():
        for k in members:
            groups[k].append(group)
    return [
        AccuracyRow(
            classes.display(k),
            "+".join(groups[k]),
            int(images[k]),
            int(correct[k]),
            100.0 * float(correct[k] / images[k]) if images[k] else None,
            classes.display(confused_with[k]) if k in confused_with else None,
        )
        for k in range(n)
    ]


def _percent(right: Bool[np.ndarray, "n"]) -> float:
    return 100.0 * int(right.sum()) / len(right)
