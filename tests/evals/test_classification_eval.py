import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evals_reference import unit
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.evals import nearest, uniformity
from ovseg_jax.evals.classification import ClassificationEvaluator
from ovseg_jax.evals.nearest import names_of, nearest_classes
from ovseg_jax.evals.registry import make_evaluators
from ovseg_jax.kernels.resize import row_block
from ovseg_jax.parallel.sharding import make_mesh
from ovseg_jax.protocols import Classifier, Segmenting, Trainable
from ovseg_jax.towers import features
from ovseg_jax.vocab.classes import ClassList

S, D = 4, 6
NAMES = (("cat", "kitten", "tom"), ("dog",), ("grass", "lawn"), ("sky",), ("emu",), ("sea",), ("red_fox",))
CLASSES = ClassList(
    NAMES, tuple(range(7)), (True,) * 7, {"seen": (0, 1, 2), "held_out": (3, 5, 6), "animals": (0, 1, 4, 6)}
)
PROMPTS = {"hard": ("a photo of a {}.",), "both": ("a photo of a {}.", "art of the {}.")}


class RandomMethod(Trainable, Classifier):
    """Images through a fixed linear map; every text has a vector of its own."""

    def __init__(self):
        self.matrix = np.random.default_rng(7).normal(size=(S * S * 3, D))
        self.asked = []

    def init(self, rng):
        return {"params": {"scale": jnp.ones(())}}

    def loss(self, variables, batch, rng):
        raise AssertionError("an evaluation asks for no loss")

    def embed_image(self, variables, image):
        x = (image.astype(jnp.float32) / 255 - 0.5).reshape(len(image), -1)
        x = x @ jnp.asarray(self.matrix, jnp.float32) * variables["params"]["scale"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def embed_text(self, variables, texts):
        return self.embed_phrases(variables, [f"learned {text}" for text in texts])

    def embed_phrases(self, variables, texts):
        self.asked.append(list(texts))
        return {"": jnp.asarray(np.stack([vector(text) for text in texts]), jnp.float32)}

    def logit_scale(self, variables):
        return jnp.float32(50)


VARIABLES = RandomMethod().init(None)


def vector(text):
    return unit(np.random.default_rng(list(text.encode())).normal(size=D))


def examples(n=23, seed=0):
    rng = np.random.default_rng(seed)
    classes = rng.choice([0, 0, 1, 2, 3, 5, 6], n)  # no emu
    return [
        dict(
            image=rng.integers(0, 256, (S, S, 3)).astype(np.uint8),
            label=np.int32(k),
            index=np.int32(i),
            example_mask=np.bool_(True),
        )
        for i, k in enumerate(classes)
    ]


def batches(examples, size):
    """Batches of equal size; the last is padded with rows that `example_mask` disowns."""

    def start():
        for i in range(0, len(examples), size):
            part = examples[i : i + size]
            part = part + [examples[0] | dict(example_mask=np.bool_(False))] * (size - len(part))
            yield {key: np.stack([e[key] for e in part]) for key in part[0]}

    return start


def evaluate(method=None, *, data=None, size=6, devices=1, classes=CLASSES, prompts=PROMPTS, **more):
    mesh = make_mesh(devices=jax.devices()[:devices])
    source = batches(examples() if data is None else data, size)
    evaluator = ClassificationEvaluator(
        "test", method or RandomMethod(), classes, source, mesh, prompts=prompts, **more
    )
    return evaluator.run(VARIABLES), evaluator


def reference(templates=None, data=None, all_names=False):
    """Every metric, one image and one pair of classes at a time."""
    data, method = data or examples(), RandomMethod()

    def feature(name):
        if templates is None:
            return vector(f"learned {name}")
        return unit(sum(vector(t.replace("{}", name.replace("_", " "))) for t in templates))

    features = [[feature(name) for name in (names if all_names else names[:1])] for names in NAMES]
    ranks, per_class, per_group, own, distance = [], {}, {}, {}, []
    for e in data:
        x = unit((e["image"].reshape(-1) / 255 - 0.5) @ method.matrix)
        score = np.array([max(x @ w for w in names) for names in features])
        k = int(e["label"])
        order = np.argsort(-score)
        ranks.append(int(np.flatnonzero(order == k)[0]))
        per_class.setdefault(k, []).append(ranks[-1] == 0)
        distance.append(((x - features[k][0]) ** 2).sum())
        for group, members in CLASSES.groups.items():
            if k in members:
                per_group.setdefault(group, []).append(ranks[-1] == 0)
                own.setdefault(group, []).append(max(members, key=lambda j: score[j]) == k)
    pairs = [
        math.exp(-2 * ((features[i][0] - features[j][0]) ** 2).sum())
        for i in range(7)
        for j in range(7)
        if i != j
    ]
    percent = lambda hits: 100 * float(np.mean(hits))
    result = {
        "accuracy": percent([r == 0 for r in ranks]),
        "accuracy@5": percent([r < 5 for r in ranks]),
        "per_class": np.mean([percent(hits) for hits in per_class.values()]),
        **{f"accuracy@{group}": percent(hits) for group, hits in per_group.items()},
        **{f"accuracy@{group}@own": percent(own[group]) for group in ("seen", "held_out")},
        "alignment": np.mean(distance),
        "uniformity": math.log(np.mean(pairs)),
    }
    a, b = (result[f"accuracy@{group}@own"] for group in ("seen", "held_out"))
    return result | {"harmonic": 2 / (1 / a + 1 / b)}


@pytest.mark.parametrize("names", ["first", "all"])
def test_every_metric_matches_the_naive_reference(names):
    got, _ = evaluate(names=names)
    chances = {"chance": 100 / 7, "chance@seen@own": 100 / 3, "chance@held_out@own": 100 / 3}
    want = chances.copy()
    for prompt, templates in {"": None, **PROMPTS}.items():
        suffix = f"[{prompt}]" if prompt else ""
        want |= {key + suffix: value for key, value in reference(templates, all_names=names == "all").items()}
    assert got == pytest.approx(want, rel=1e-5)
    assert len({got["accuracy@5"], got["accuracy"], got["per_class"], got["accuracy@seen@own"]}) == 4


def test_devices_batch_size_and_padding_change_no_number():
    one, evaluator = evaluate()
    for change in ({"devices": 8}, {"size": 23}, {"size": 3, "devices": 2}, {"size": 5, "devices": 8}):
        other, same = evaluate(**change)
        assert other == pytest.approx(one, rel=1e-6)
        assert same.tables == evaluator.tables


def test_blocks_of_classes_and_chunks_of_names_change_no_number(monkeypatch):
    whole, evaluator = evaluate(names="all")
    monkeypatch.setattr(nearest, "row_block", lambda rows, floats: row_block(rows, 1, 3))
    monkeypatch.setattr(uniformity, "row_block", lambda rows, floats: row_block(rows, 1, 2))
    monkeypatch.setattr(features, "TEXT_CHUNK", 4)
    uniformity._row_sums.clear_cache()
    method = RandomMethod()
    blocks, same = evaluate(method, names="all")
    uniformity._row_sums.clear_cache()
    assert blocks == pytest.approx(whole, rel=1e-6) and same.tables == evaluator.tables
    assert {len(texts) for texts in method.asked} == {4}
    texts = [str(i) for i in range(9)]
    assert features.embed_in_chunks(lambda t: jnp.array([[float(x)] for x in t]), texts).ravel().tolist() == [
        *range(9)
    ]


def test_a_class_counts_by_the_name_that_prompts_train_on():
    """papers/000: one name a class; an image that is nearest to a synonym is not of its class."""
    first = np.stack([vector(f"learned {names[0]}") for names in NAMES])
    synonyms = [(k, vector(f"learned {name}")) for k, names in enumerate(NAMES) for name in names[1:]]
    own, synonym = next((k, x) for k, x in synonyms if np.argmax(first @ x) != k)

    class Towards(RandomMethod):
        def embed_image(self, variables, image):
            return jnp.broadcast_to(jnp.asarray(synonym, jnp.float32), (len(image), D))

    data = [dict(e, label=np.int32(own)) for e in examples(6)]
    assert evaluate(Towards(), data=data, prompts={})[0]["accuracy"] == 0
    assert evaluate(Towards(), data=data, prompts={}, names="all")[0]["accuracy"] == 100
    method = RandomMethod()
    evaluate(method, prompts={})
    assert method.asked == [[f"learned {names[0]}" for names in NAMES]]
    with pytest.raises(UserError, match=r"evals.test.names='some' is not one of first, all"):
        evaluate(names="some")


def test_templates_are_whole_texts():
    method = RandomMethod()
    evaluate(method, prompts={"x": ("one {}.",)}, names="all")
    assert method.asked[0][0] == "learned cat"
    assert method.asked[1] == [
        f"one {n}." for n in ("cat", "kitten", "tom", "dog", "grass", "lawn", "sky", "emu", "sea")
    ] + ["one red fox."]


@pytest.mark.parametrize("frozen", [False, True])
def test_prompts_of_frozen_towers_are_computed_once(frozen):
    method = RandomMethod()
    method.frozen_towers = frozen
    first, evaluator = evaluate(method)
    assert evaluator.run(VARIABLES) == first
    # The method's own prompt, and two others, of which one has two templates.
    assert len(method.asked) == (1 + 2) + (1 if frozen else 1 + 2)


def test_per_class_weighs_classes_and_the_table_says_what_was_taken_for_what():
    """Three classes whose images say which class is predicted; the third never occurs."""
    classes = ClassList((("a",), ("b", "B"), ("c",)), (0, 1, 2), (True,) * 3, {"base": (0,), "new": (1, 2)})

    class Told(RandomMethod):
        def embed_image(self, variables, image):
            return jnp.eye(3)[image[:, 0, 0, 0]]

        def embed_text(self, variables, texts):
            return {"": jnp.eye(3)[np.array([{"a": 0, "b": 1, "B": 1, "c": 2}[t] for t in texts])]}

    truth, told = [0, 0, 0, 0, 0, 0, 1, 1], [0, 2, 2, 1, 1, 2, 1, 0]
    data = [
        dict(e, label=np.int32(k), image=np.full((S, S, 3), p, np.uint8))
        for e, k, p in zip(examples(), truth, told, strict=False)
    ]
    got, evaluator = evaluate(Told(), data=data, classes=classes, prompts={}, metric="per_class")
    assert got["accuracy"] == pytest.approx(100 * 2 / 8)
    assert got["per_class"] == got["score"] == pytest.approx(100 * (1 / 6 + 1 / 2) / 2)
    assert "accuracy@5" not in got
    assert got["accuracy@new"] == 50 and got["accuracy@base@own"] == 100
    # The image of b that was taken for a has equal cosines with b and c: the first wins.
    assert got["accuracy@new@own"] == 100 and got["harmonic"] == 100
    assert [tuple(row) for row in evaluator.tables["accuracy"]] == [
        ("a", "base", 6, 1, pytest.approx(100 / 6), "c"),
        ("b", "new", 2, 1, 50.0, "a"),
        ("c", "new", 0, 0, None, None),
    ]


def test_cached_features_take_the_place_of_images():
    method, data = RandomMethod(), examples()
    images = np.stack([e["image"] for e in data])
    vectors = np.asarray(method.embed_image(VARIABLES, jnp.asarray(images)))
    cached = [
        {k: v for k, v in e.items() if k != "image"} | {"feature": f}
        for e, f in zip(data, vectors, strict=True)
    ]
    assert evaluate(data=cached)[0] == pytest.approx(evaluate()[0], rel=1e-6)


def test_what_is_no_number_is_right_nowhere():
    class Broken(RandomMethod):
        def embed_image(self, variables, image):
            return super().embed_image(variables, image) * jnp.nan

    got, evaluator = evaluate(Broken())
    assert got["accuracy"] == got["accuracy@5"] == got["accuracy@seen@own"] == got["harmonic"] == 0
    assert all(row.confused_with is None for row in evaluator.tables["accuracy"])


def test_a_second_run_compiles_nothing():
    first, evaluator = evaluate(size=5)
    assert evaluator.run(VARIABLES) == first
    assert evaluator._step._cache_size() == 1


def test_mistakes_are_said():
    with pytest.raises(UserError, match=r"evals\.test: the source has no image"):
        evaluate(data=[dict(e, example_mask=np.bool_(False)) for e in examples()])
    with pytest.raises(UserError, match=r"evals\.test\.metric='f1' is not one of accuracy"):
        evaluate(metric="f1")
    evals = lambda **cfg: ConfigDict({"data": {"image_size": S}, "evals": {"a": cfg}})
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="does not support the method RandomMethod"):
        make_evaluators(evals(type="segmentation", batch_size=1), RandomMethod(), mesh)
    source = dict(name="scenes", split="test", num_examples=2, image_size=32)
    with pytest.raises(UserError, match=r"'scenes' has no label, which evals\.a"):
        make_evaluators(evals(type="classification", batch_size=1, source=source), RandomMethod(), mesh)


def test_protocols_tell_classifiers_from_segmenters():
    assert isinstance(RandomMethod(), Classifier) and not isinstance(RandomMethod(), Segmenting)


def test_nearest_orders_classes_by_their_best_name():
    rng = np.random.default_rng(1)
    image, text = unit(rng.normal(size=(9, D))), unit(rng.normal(size=(10, D)))
    names, owner = names_of(CLASSES), CLASSES.flat()[1]
    allowed = np.array([[1] * 7, [0, 1, 0, 0, 1, 0, 0]], bool)

    def nearest(image, text, count):
        image, text = (jnp.asarray(x, jnp.float32) for x in (image, text))
        return nearest_classes(Classifier().score_images, image, {"": text}, names, allowed, count)

    got = nearest(image, text, 3)
    for b in range(9):
        for v in range(2):
            score = [max(image[b] @ text[owner == k].T) if allowed[v, k] else -9 for k in range(7)]
            want = [k for k in np.argsort(score)[::-1] if allowed[v, k]][:3]
            assert got[v, b].tolist() == want + [-1] * (3 - len(want))
    text[owner == 1] = np.nan
    near = nearest(image, text, 2)
    assert (near[1] == jnp.array([4, -1])).all() and (near[0] >= 0).all() and not (near[0] == 1).any()


@pytest.mark.parametrize("n", [2, 7, 600])
def test_uniformity_is_the_mean_over_all_pairs(n):
    w = unit(np.random.default_rng(n).normal(size=(n, 5)))
    w[-1] = w[0]  # two classes with one name
    squared = ((w[:, None] - w) ** 2).sum(-1)
    want = math.log(np.exp(-2 * squared)[~np.eye(n, dtype=bool)].mean())
    for devices in (1, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        got = uniformity.uniformity(jnp.asarray(w, jnp.float32), mesh)
        assert got == pytest.approx(want, abs=2e-6)
    assert uniformity.uniformity(jnp.ones((1, 5)), mesh) is None


def test_memory_does_not_grow_with_the_classes():
    """21,841 classes: 64 images against all would be 5.6 MB a prompt, all pairs of classes 1.9 GB."""

    def bytes_needed(n):
        names, text = np.arange(n, dtype=np.int32)[:, None], jax.ShapeDtypeStruct((n, 128), jnp.float32)
        image, label = jax.ShapeDtypeStruct((2048, 128), jnp.float32), np.ones((1, n), bool)
        score = Classifier().score_images
        closest = lambda image, text: nearest_classes(score, image, {"": text}, names, label, 5)
        near = jax.jit(closest).lower(image, text)
        pairs = uniformity._row_sums.lower(text, mesh=make_mesh(devices=jax.devices()[:1]))
        return [x.compile().memory_analysis().temp_size_in_bytes for x in (near, pairs)]

    for small, large in zip(bytes_needed(2_000), bytes_needed(21_841), strict=True):
        assert large < 100e6  # [b n] alone is 179 MB
        assert large - small < 3 * 128 * 4 * 21_841
