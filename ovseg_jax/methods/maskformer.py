"""MaskFormer (Cheng et al. 2021): masks with classes of a closed vocabulary, the supervised baseline."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from ovseg_jax.config import keys
from ovseg_jax.data.source_base import Source, check_provides
from ovseg_jax.errors import UserError
from ovseg_jax.losses.matching import Matched, PointWeights, Weights, matched_losses
from ovseg_jax.models.backbones import build_backbone
from ovseg_jax.models.maskformer import MaskFormer as Model
from ovseg_jax.models.maskformer import MaskFormerNet, QueryClassifier
from ovseg_jax.models.openseg import inside
from ovseg_jax.parallel.accumulate import in_parts
from ovseg_jax.parallel.sharding import active_batch_axes
from ovseg_jax.protocols import Aux, Batch, Prediction, Segmenting, Text, Trainable, Variables
from ovseg_jax.towers.vocabulary import spoken_words
from ovseg_jax.vocab.classes import ClassList, rows_of_names
from ovseg_jax.vocab.words import WordList

SPACE = "class"
"""The name of the only space: a probability for each class of the training data."""

NET_FIELDS = "num_queries width mask_dim layers heads ffn dropout deep_supervision remat".split()
OTHER_FIELDS = ("backbone", "mean", "std", "dtype")


def build_net(model: ConfigDict, more: Sequence[str] = ()) -> MaskFormerNet:
    """Creates the network of a config's `model` section, which may also have the keys `more`.

    Raises:
      UserError: a key is unknown.
    """
    known = {*NET_FIELDS, *OTHER_FIELDS, *more}
    if unknown := set(model) - known:
        raise UserError(
            f"unknown keys of config.model: {', '.join(sorted(unknown))}; known keys: {', '.join(sorted(known))}"
        )
    dtype = jnp.dtype(model.get("dtype", "float32"))
    fields = {key: model[key] for key in NET_FIELDS if key in model}
    backbone = build_backbone(model.backbone, dtype)
    return MaskFormerNet(backbone, tuple(model.mean), tuple(model.std), dtype=dtype, **fields)


def pretrained_backbone(net: Any, shapes: Mapping[str, Any], init: str) -> dict[str, Any]:
    """Returns published weights of the backbone as variables of the network.

    Args:
      net: a network with `backbone`, `mean` and `std`.
      shapes: its variables by collection, as arrays or shapes.
      init: see `pretrained.load.load`.
    """
    from ovseg_jax.pretrained.load import load

    own = {name: tree["backbone"] for name, tree in shapes.items() if "backbone" in tree}
    found = load(init, net.backbone, own, pixels=(net.mean, net.std))
    return {name: {"backbone": tree} for name, tree in found.items()}


def without_text(variables: Variables) -> dict[str, Any]:
    """Returns the variables of network and classifier."""
    params = {name: tree for name, tree in variables["params"].items() if name != "text"}
    return {**variables, "params": params}


def trained_classes(method: str, classes: ClassList) -> Bool[np.ndarray, " k1"]:
    """Returns whether each class is trained; the last entry is that of masks without a class, -1.

    Raises:
      UserError: none is, since all are in the groups "unseen" and "held_out".
    """
    withheld = classes.withheld()
    if len(withheld) == len(classes):
        raise UserError(
            f"{method}: the training data has no class outside of the groups 'unseen' and 'held_out'"
        )
    return np.array([k not in withheld for k in range(len(classes))] + [False])


def total_loss(
    sums: Mapping[str, Array], weights: Weights | PointWeights
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Computes the loss and the metrics of the last layer from the sums of `Matched`, all but its queries."""
    losses = Matched(**sums, query=jnp.zeros((0, 0, 0), jnp.int32))
    assert losses.label is not None and losses.label_weight is not None
    loss = losses.total(weights)
    return loss, {
        "loss": (loss, jnp.ones(())),
        f"{weights._fields[0]}_loss": (losses.mask[-1], losses.masks),
        "dice_loss": (losses.dice[-1], losses.masks),
        "class_loss": (losses.label[-1], losses.label_weight[-1]),
    }


class MaskFormer(Trainable, Segmenting):
    """The method MaskFormer; `config` is the whole config of a run.

    The classifier has the classes of the training data, in their order. The vocabulary is closed: any other name is an
    error. Masks of the groups "unseen" and "held_out" are not used in training, so that these classes are never
    predicted. A region's score for a class is its probability, and `Prediction.void` that of "no object"; the decision
    `argmax` is then the paper's semantic inference (3.4).

    Keys of `config.model`: those of `MaskFormerNet`, `backbone.init` (weights of the backbone) and `init` (a published
    MaskFormer with the same classes in the same order). Keys of `config.loss`: `focal`, `dice` and `label` weight costs
    and losses, `no_object` the class "no object".
    """

    modes = ("predicted",)
    probabilities = True
    weights_type: ClassVar[type[Weights] | type[PointWeights]] = Weights

    @classmethod
    def fields(cls, config: ConfigDict) -> tuple[str, ...]:
        """Returns the batch fields that the loss reads."""
        del config
        return ("image", "masks", "mask_classes")

    @classmethod
    def vocabulary(cls, config: ConfigDict, source: Source) -> Sequence[str]:
        """Returns the words of class names, of which no text side needs any.

        Raises:
          UserError: the source has no segments with classes.
        """
        check_provides(source, ("segments", "class_ids"), f"the method {config.method}")
        return spoken_words(config.data, source, ()).words

    @classmethod
    def keys(cls, config: ConfigDict) -> dict[str, dict[str, bool]]:
        """Returns the method's own keys in each section, and whether each has an effect, see `experiment.keys`."""
        del config
        return {
            "model": dict.fromkeys([*NET_FIELDS, *OTHER_FIELDS, "init"], True),
            "loss": keys(" ".join((*cls.weights_type._fields, "no_object"))),
        }

    def __init__(self, config: ConfigDict, words: WordList, classes: ClassList):
        del words
        self.config, self.classes = config, classes
        self.net = self._network()
        if config.model.get("init") and config.model.backbone.get("init"):
            raise UserError(
                "model.init and model.backbone.init are both set: leave out the second, since the first has a backbone"
            )
        self.model = Model(self.net, self._classifier())
        self.weights = self.weights_type(*(float(config.loss[key]) for key in self.weights_type._fields))
        self.no_object = float(config.loss.no_object)
        self._trained = trained_classes(config.method, classes)

    def _network(self) -> Any:
        known = self.keys(self.config)["model"]
        return build_net(self.config.model, [key for key in known if key not in NET_FIELDS])

    def _classifier(self) -> Any:
        return QueryClassifier(len(self.classes))

    def _logits(self, variables: Variables, classified: Any) -> Array:
        """Returns logits of the training data's classes and "no object" from the classifier's output."""
        del variables
        return classified

    def init(self, rng: jax.Array) -> Variables:
        """Creates `params` {"net", "classifier"}, and `batch_stats` if the backbone has them."""
        size = self.config.data.image_size
        image = jnp.zeros((1, size, size, 3), jnp.uint8)
        return self.model.init(rng, image, jnp.full((1, 2), size))

    def pretrained(self) -> dict[str, Any]:
        """Returns the weights of `model.init` or of `model.backbone.init`."""
        whole, backbone = self.config.model.get("init", ""), self.config.model.backbone.get("init", "")
        if not whole and not backbone:
            return {}
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        if whole:
            from ovseg_jax.pretrained.load import load

            return load(whole, self.model, shapes, pixels=(self.net.mean, self.net.std))
        inner = {name: tree["net"] for name, tree in shapes.items()}
        found = pretrained_backbone(self.net, inner, backbone)
        return {name: {"net": tree} for name, tree in found.items()}

    def loss(self, variables: Variables, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Aux]:
        """Computes the losses of matched masks and of all classes, summed over the layers."""
        network = in_parts(self._forward, self.config.get("accumulate", 1))
        _, sums, mutated = network(variables, batch, rng)
        loss, metrics = total_loss(sums, self.weights)
        return loss, Aux(metrics, mutated)

    def _forward(
        self, variables: Variables, batch: Batch, rng: jax.Array
    ) -> tuple[None, dict[str, Array], dict]:
        """Computes for some images the sums of the losses and the updated collections."""
        mutable = [name for name in variables if name != "params"]
        (out, classified), mutated = self.model.apply(
            without_text(variables),
            batch["image"],
            batch["image_size"],
            train=True,
            mutable=mutable,
            rngs={"dropout": rng},
        )
        classes = batch["mask_classes"]
        losses = self._matched(
            out,
            batch,
            rng,
            masks=batch["masks"],
            mask_valid=batch["mask_valid"] & jnp.asarray(self._trained)[classes],
            weight=batch["example_mask"].astype(jnp.float32),
            class_logits=self._logits(variables, classified),
            classes=classes,
            no_object=self.no_object,
            batch_axes=active_batch_axes(),
        )
        sums = losses._asdict()
        del sums["query"]
        return None, sums, dict(mutated)

    def _matched(self, out: Any, batch: Batch, rng: jax.Array, **options: Any) -> Matched:
        """Matches masks with queries and computes the losses of all layers; `options` are those of both losses."""
        del rng
        assert isinstance(self.weights, Weights)
        (h, w), side = batch["masks"].shape[2:], batch["image"].shape[1]
        cells = inside(batch["image_size"], (h, w), (side / h, side / w))
        return matched_losses(out.mask_logits, inside=cells, costs=self.weights, **options)

    def predict(
        self, variables: Variables, image: UInt8[Array, "b s t 3"], image_size: Int[Array, "b 2"]
    ) -> Prediction:
        """Predicts masks with the probability of each class and of "no object"."""
        out, logits = self._outputs(variables, image, image_size)
        share = jax.nn.softmax(logits[:, -1])
        return Prediction(out.mask_logits[:, -1], {SPACE: share[..., :-1]}, {}, share[..., -1])

    def _outputs(self, variables: Variables, *inputs: Any) -> Any:
        return self.model.apply(without_text(variables), *inputs)

    def embed_text(self, variables: Variables, texts: Sequence[str]) -> Text:
        """Returns for each name the class that it means, as one of K unit vectors.

        Raises:
          UserError: a name belongs to no class of the training data.
        """
        del variables
        rows = rows_of_names(self.classes.names, texts, "this MaskFormer has no text side and")
        return {SPACE: jax.nn.one_hot(rows, len(self.classes))}
