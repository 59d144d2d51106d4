"""The streams of batches: form, words, reproducibility, resumption, sharing, padding, errors."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from ovseg_jax.data import batch_augment
from ovseg_jax.data.mixing import MixingOrder
from ovseg_jax.data.mixture import Mixture
from ovseg_jax.data.pipeline import eval_batches, train_iterator, view_batches
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.source_base import Example, Source
from ovseg_jax.data.sources.build import Cached, make_source
from ovseg_jax.errors import UserError
from ovseg_jax.towers.vocabulary import counted_words, spoken_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.word_tokenizer import WordTokenizer
from ovseg_jax.vocab.words import WordList

SCENE = ("image", "masks", "pixel_classes", "words")
LABELS = ("image", "label")
SEGMENTS = ("image", "segments", "class_ids")
CLASSES = ClassList((("sky",), ("dog", "puppy")), (1, 2), (False, True), {"stuff": (0,)})


class Pictures(Source):
    """Pictures whose every pixel is the example's number, above a dog on sky."""

    provides = frozenset({"image", "segments", "class_ids", "boxes", "captions"})

    def __init__(
        self, count=7, size=(24, 20), captions=("a red dog on the left under a blue sky",), name="pictures"
    ):
        self.count, self.size, self.spoken, self.name, self.classes = (
            count,
            size,
            list(captions),
            name,
            CLASSES,
        )

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        segments = np.ones(self.size, np.int32)
        segments[-8:, :6] = 2
        segments[0] = 0
        return {
            "image": np.full((*self.size, 3), index, np.uint8),
            "segments": segments,
            "class_ids": np.array([0, 1], np.int32),
            "isthing": np.array([False, True]),
            "iscrowd": np.zeros(2, bool),
            "boxes": np.array([[0, 1, 20, 24], [0, 16, 6, 24]], np.float32),
            "captions": self.spoken,
            "image_id": f"{self.name}-{index}",
        }


def make_config(source=(), *, batch_size=4, **data):
    defaults = {
        "train": source, "image_size": 16, "mask_stride": 2, "max_masks": 3, "max_words": 6, "keep_prob": 1.0,
        "scale_jitter": (0.8, 1.2), "threads": 0,
    }  # fmt: skip
    return {"seed": 5, "steps": 10, "batch_size": batch_size, "data": defaults | data}


def batches(config, source, count, fields=SCENE, **kwargs):
    words = counted_words(config["data"], source)
    iterator = train_iterator(config, Rows.from_config(config, fields, words), source=source, **kwargs)
    return [next(iterator) for _ in range(count)]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_batch_form():
    config = make_config()
    (batch,) = batches(config, Pictures(), 1)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "image": ("uint8", (4, 16, 16, 3)),
        "image_size": ("int32", (4, 2)),
        "masks": ("uint8", (4, 3, 8, 8)),
        "mask_valid": ("bool", (4, 3)),
        "mask_weight": ("float32", (4,)),
        "word_ids": ("int32", (4, 6)),
        "word_valid": ("bool", (4, 6)),
        "pixel_classes": ("int32", (4, 8, 8)),
        "example_mask": ("bool", (4,)),
    }
    assert (
        batch["mask_valid"].tolist() == [[True, True, False]] * 4 and batch["mask_weight"].tolist() == [1] * 4
    )
    assert not batch["masks"][:, 2].any() and batch["masks"][:, :2].any((2, 3)).all()
    assert set(np.unique(batch["pixel_classes"])) == {-1, 0, 1}
    assert not batch["word_ids"][~batch["word_valid"]].any() and batch["word_ids"][batch["word_valid"]].all()


def test_flip_takes_left_and_right_out_of_the_caption():
    config = make_config(scale_jitter=(1.0, 1.0), flip=True)
    source = Pictures(size=(16, 16))
    words = counted_words(config["data"], source)
    seen = set()
    for batch in batches(config, source, 4):
        for row in range(4):
            flipped = batch["pixel_classes"][row, -1, -1] == 1
            said = words.id("left") in batch["word_ids"][row]
            assert said == (not flipped)
            seen.add(bool(flipped))
    assert seen == {True, False}


def test_batches_follow_from_seed_and_number():
    config, source = make_config(), Pictures()
    once, again = (batches(config, source, 4) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        assert_same(a, b)
    other = batches({**config, "seed": 6}, source, 4)
    assert any((a["image"] != b["image"]).any() for a, b in zip(once, other, strict=True))


def test_every_epoch_holds_each_example_once_in_another_order():
    source = Pictures(8)
    stream = batches(make_config(), source, 4)
    numbers = np.concatenate([b["image"].max((1, 2, 3)) for b in stream]).reshape(2, 8)
    assert sorted(numbers[0]) == sorted(numbers[1]) == list(range(8))
    assert numbers[0].tolist() != numbers[1].tolist()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_stream_may_start_anywhere(threads):
    config, source = make_config(threads=threads), Pictures()
    whole = batches(config, source, 6)
    for a, b in zip(whole[3:], batches(config, source, 3, start=3), strict=True):
        assert_same(a, b)


def test_processes_share_one_batch():
    config, source = make_config(), Pictures()
    whole = batches(config, source, 3)
    shares = [batches(config, source, 3, process_index=p, process_count=2) for p in range(2)]
    for step, batch in enumerate(whole):
        for p in range(2):
            assert_same({k: v[2 * p : 2 * p + 2] for k, v in batch.items()}, shares[p][step])
    with pytest.raises(UserError, match="batch_size=4 is not a multiple of the 3"):
        batches(config, source, 1, process_count=3)


def test_worker_processes_give_the_same_batches_and_resume_and_keep_off_devices(tmp_path):
    # A fresh interpreter, whose flags nobody has parsed, as in a notebook; its workers import no more than it
    # does.
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            import os
            import numpy as np
            from ovseg_jax.data.pipeline import train_iterator
            from ovseg_jax.data.sources.build import make_source
            from ovseg_jax.data.rows import Rows
            from ovseg_jax.towers.vocabulary import counted_words

            from ovseg_jax.data.source_base import Wrapped

            class Spy(Wrapped):
                def __getitem__(self, index):
                    if os.environ.get("JAX_PLATFORMS") != "cpu":
                        raise RuntimeError("a worker may see the accelerator")
                    return self.source[index]

            def main():
                os.environ["JAX_PLATFORMS"] = "tpu"
                part = {"name": "scenes", "split": "train", "num_examples": 12, "image_size": 32}
                data = {"train": part, "image_size": 32, "mask_stride": 4, "max_masks": 4, "max_words": 8}
                config = {"seed": 1, "steps": 10, "batch_size": 4, "data": data | {"threads": 0}}
                source = make_source(part)
                rows = Rows.from_config(config, ("image", "masks", "words"), counted_words(data, source))
                plain = train_iterator(config, rows, source=source)
                config["data"]["workers"] = 2
                many = train_iterator(config, rows, source=Spy(source))
                for step in range(4):
                    a, b = next(plain), next(many)
                    assert all(np.array_equal(a[k], b[k]) for k in a), step
                many.close()
                config["data"]["workers"] = 1
                again = train_iterator(config, rows, start=3, source=Spy(source))
                c = next(again)
                assert all(np.array_equal(a[k], c[k]) for k in a)
                again.close()
                print("same")

            if __name__ == "__main__":
                main()
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, env=env)
    assert run.stdout.strip() == "same", run.stderr


def test_hue_and_blur_hit_whole_batches_and_take_their_words():
    entries = [
        {"name": "channels", "probability": 0.5, "drop": ("lexicon:colour",)},
        {
            "name": "blur",
            "probability": 0.5,
            "factor": 4,
            "mask_weight": 0.1,
            "drop": ("pos:noun",),
            "spare": ["words:sky"],
        },
    ]
    config = make_config(batch_augment=entries, flip=False, batch_size=8)
    source = Pictures()
    words = counted_words(config["data"], source)
    full = {words.id(w) for w in ("red", "dog", "left", "blue", "sky")}
    without = {"channels": {"red", "blue"}, "blur": {"dog", "left"}, None: set()}
    augments = batch_augment.parse_batch_augments(entries)
    kinds = set()
    for number, batch in enumerate(batches(config, source, 12)):
        chosen = batch_augment.choose(augments, 5, number, number / 10)
        kind = chosen.name if chosen else None
        kinds.add(kind)
        expected = full - {words.id(w) for w in without[kind]}
        for row in range(8):
            assert set(batch["word_ids"][row][batch["word_valid"][row]]) == expected, kind
        assert np.allclose(batch["mask_weight"], 0.1 if kind == "blur" else 1.0)
    assert kinds == {"channels", "blur", None}


def test_probability_moves_between_40_and_100_percent():
    augment = batch_augment.BatchAugment("blur", 0.6, probability_end=0.0)
    moved = [augment.probability_at(p) for p in (0.0, 0.4, 0.7, 1.0, 2.0)]
    np.testing.assert_allclose(moved, [0.6, 0.6, 0.3, 0.0, 0.0], atol=1e-12)
    share = np.mean([batch_augment.choose((augment,), 0, b, 0.0) is not None for b in range(2000)])
    assert abs(share - 0.6) < 0.04


def test_keep_prob_drops_words_and_leaves_one():
    source = Pictures(captions=["a red dog and a blue cat near a green tree"])
    config = make_config(keep_prob={"noun": 1.0, "adj": 0.5}, batch_size=50)
    words = counted_words(config["data"], source)
    counts = np.zeros(len(words))
    for batch in batches(config, source, 4):
        counts += np.bincount(batch["word_ids"].ravel(), minlength=len(words))
    assert (counts[words.ids(["dog", "cat", "tree"])] == 200).all()
    assert (np.abs(counts[words.ids(["red", "blue", "green"])] - 100) < 30).all()
    (batch,) = batches(make_config(keep_prob=0.0, batch_size=50), source, 1)
    assert (batch["word_valid"].sum(1) == 1).all()


def test_spoiled_or_absent_captions_leave_no_word():
    entry = {"name": "blur", "probability": 1.0, "drop": ("all",)}
    (batch,) = batches(make_config(batch_augment=[entry]), Pictures(), 1)
    assert not batch["word_valid"].any() and batch["mask_valid"].any()
    config, silent = make_config(), Pictures(captions=[])
    (batch,) = batches(config, silent, 1)
    assert not batch["word_valid"].any()


def test_caption_only_images_have_no_mask_weight():
    class Captioned(Pictures):
        def __getitem__(self, index):
            e = super().__getitem__(index)
            none = {key: e[key][:0] for key in ("class_ids", "isthing", "iscrowd", "boxes")}
            return {**e, **none, "segments": e["segments"] * 0}

    (batch,) = batches(make_config(), Captioned(), 1)
    assert not batch["mask_weight"].any() and not batch["mask_valid"].any() and batch["word_valid"].any()
    assert (batch["pixel_classes"] == -1).all()


def test_too_many_masks_and_words_are_cut():
    (batch,) = batches(make_config(max_masks=1, max_words=2), Pictures(), 1)
    assert batch["masks"].shape[1] == 1 and batch["mask_valid"].all() and batch["word_valid"].all()
    # The sky is the larger segment.
    assert (batch["masks"][:, 0].astype(int).sum((1, 2)) > 255 * 16).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mask_stride": 3}, "mask_stride=3"),
        ({"scale_jitter": (1.2, 0.8)}, "scale_jitter"),
        ({"keep_prob": 1.5}, "keep_prob"),
        ({"keep_prob": {"nouns": 1.0}}, "no key 'nouns'"),
        ({"batch_augment": [{"name": "rain", "probability": 1.0}]}, "rain"),
        ({"batch_augment": [{"name": "blur", "probability": 1.0, "sigma": 3}]}, "no key 'sigma'"),
        (
            {"batch_augment": [{"name": "blur", "probability": 1.0, "drop": ("colour",)}]},
            "word rule 'colour'",
        ),
        ({"batch_augment": [{"name": "blur", "probability": 2.0}]}, r"is outside 0\.\.1"),
    ],
)
def test_bad_settings(data, message):
    with pytest.raises(UserError, match=message):
        Rows.from_config(make_config(**data), SCENE, WordList(["dog"]))


def test_mixing_is_exact_and_in_changing_order():
    order = MixingOrder([1.0, 3.0], seed=0)
    draws = [order[k] for k in range(640)]
    for part, share in ((0, 160), (1, 480)):
        indices = [index for k, index in draws if k == part]
        assert indices == list(range(share))
    assert [k for k, _ in draws[:32]] != [k for k, _ in draws[32:64]]
    odd = MixingOrder([0.123, 0.456, 0.777], seed=0)
    shares = np.bincount([odd[k][0] for k in range(5000)]) / 5000
    np.testing.assert_allclose(shares, np.array([0.123, 0.456, 0.777]) / 1.356, atol=0.01)


def test_mixture_joins_classes_and_draws_evenly():
    big, small = Pictures(50, name="big"), Pictures(3, name="small", captions=["a cat"])
    small.classes = ClassList((("dog", "hound"), ("cat",)), (1, 2), (True, True))
    mixture = Mixture([big, small])
    assert mixture.classes.names == (("sky",), ("dog", "puppy", "hound"), ("cat",))
    assert len(mixture) == 53 and mixture[50]["image_id"] == "small-0" and mixture[49]["image_id"] == "big-49"
    assert mixture[0]["class_ids"].tolist() == [0, 1] and mixture[52]["class_ids"].tolist() == [1, 2]
    assert mixture.extent() == (24, 20, 2) and mixture.name == "big+small"
    config = make_config(batch_size=32)
    words = counted_words(config["data"], mixture)
    assert "cat" in words and "sky" in words
    for batch in batches(config, mixture, 2):
        cats = (batch["word_ids"] == words.id("cat")).any(1)
        assert cats.sum() == 16
    with pytest.raises(UserError, match="weight above 0"):
        Mixture([big, small], [1.0, 0.0])


def test_joined_sources_are_one_part_whose_examples_are_equally_likely():
    scenes = {"name": "scenes", "split": "train", "image_size": 32}
    parts = [{**scenes, "num_examples": count, "seed": count} for count in (30, 2)]
    mixture = make_source([{**scenes, "num_examples": 4}, {"name": "joined", "sources": parts}])
    assert len(mixture.sources) == 2 and mixture.weights == [1.0, 1.0] and len(mixture) == 36
    joined = make_source({"name": "joined", "sources": parts})
    assert len(joined) == 32 and joined[31]["image_id"] == make_source(parts[1])[1]["image_id"]
    # Training draws evenly from the parts of a mixture alone.
    assert not isinstance(joined, Mixture) and joined.provides == make_source(parts[0]).provides


def test_make_source():
    scenes = {"name": "scenes", "split": "train", "num_examples": 3, "image_size": 32}
    assert make_source(scenes).name == "scenes"
    cached = make_source([{**scenes, "cache": True}])
    assert isinstance(cached, Cached) and cached[1] is cached[1] and len(cached) == 3
    mixture = make_source([scenes, {**scenes, "seed": 1, "weight": 2.0}])
    assert mixture.weights == [1.0, 2.0] and len(mixture) == 6
    with pytest.raises(UserError, match="'cocoa' is not one of scenes, coco, folder, "):
        make_source({"name": "cocoa"})
    with pytest.raises(UserError, match="has no argument 'colour'"):
        make_source({**scenes, "colour": 1})
    with pytest.raises(UserError, match="'coco' needs the argument data_dir="):
        make_source({"name": "coco"})
    with pytest.raises(UserError, match="names no source"):
        make_source([])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_bad_file_ends_in_one_sentence(tmp_path, threads):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3), np.uint8)).save(
        tmp_path / "images/x.jpg"
    )
    (tmp_path / "captions.tsv").write_text("x.jpg\ta red dog\n")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.ones((30, 30), np.uint8)).save(tmp_path / "masks/x.png")
    source = make_source({"name": "folder", "data_dir": str(tmp_path)})
    photo = tmp_path / "images/x.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"x\.jpg cannot be read"):
        batches(make_config(threads=threads), source, 1)
    with pytest.raises(UserError, match=r"x\.jpg cannot be read"):
        list(
            eval_batches(
                source, SEGMENTS, make_config(threads=threads, label_size=64, max_segments=2), batch_size=1
            )
        )


def test_eval_batch_form_and_content():
    config = make_config()
    source = Pictures(5)
    (first, second) = eval_batches(source, SEGMENTS, config, batch_size=3)
    assert {k: (v.dtype.name, v.shape) for k, v in first.items()} == {
        "image": ("uint8", (3, 16, 16, 3)),
        "image_size": ("int32", (3, 2)),
        "label": ("int32", (3, 24, 20)),
        "segments": ("int32", (3, 24, 20)),
        "label_size": ("int32", (3, 2)),
        "segment_valid": ("bool", (3, 2)),
        "segment_classes": ("int32", (3, 2)),
        "segment_isthing": ("bool", (3, 2)),
        "segment_iscrowd": ("bool", (3, 2)),
        "index": ("int32", (3,)),
        "example_mask": ("bool", (3,)),
    }
    assert second["example_mask"].tolist() == [True, True, False] and second["index"].tolist() == [3, 4, -1]
    assert (
        (second["label"][2] == -1).all()
        and not second["segment_valid"][2].any()
        and not second["image"][2].any()
    )
    assert first["image_size"].tolist() == [[16, 13]] * 3 and first["label_size"].tolist() == [[24, 20]] * 3
    assert first["image"][2, :, :13].min() == 2 and not first["image"][:, :, 13:].any()
    np.testing.assert_array_equal(first["segments"][0], source[0]["segments"])
    np.testing.assert_array_equal(first["label"][0], source[0]["segments"] - 1)


def test_eval_processes_cover_the_source_in_equal_numbers():
    config, source = make_config(label_size=(30, 32)), Pictures(7)
    shares = [
        list(eval_batches(source, SEGMENTS, config, batch_size=2, process_index=p, process_count=3))
        for p in range(3)
    ]
    assert {len(share) for share in shares} == {2}
    seen = [
        i
        for share in shares
        for b in share
        for i, on in zip(b["index"], b["example_mask"], strict=True)
        if on
    ]
    assert sorted(seen) == list(range(7))
    assert shares[0][0]["label"].shape == (2, 30, 32) and (shares[0][0]["label"][:, 24:] == -1).all()
    assert [
        len(list(eval_batches(source, SEGMENTS, config, batch_size=2, limit=n))) for n in (0, 1, 2, 3, 99)
    ] == [
        0,
        1,
        1,
        2,
        4,
    ]


def test_eval_crowds_and_absent_segments_are_no_proposals_to_find():
    class Crowded(Pictures):
        def __getitem__(self, index):
            e = super().__getitem__(index)
            e["class_ids"], e["iscrowd"] = np.array([0, 1, 1], np.int32), np.array([False, True, False])
            e["isthing"] = np.array([False, True, True])
            return e

    (batch,) = eval_batches(Crowded(1), SEGMENTS, make_config(), batch_size=1)
    assert batch["segment_valid"].tolist() == [[True, False, False]]
    assert batch["segment_iscrowd"].tolist() == [[False, True, False]]
    assert batch["segment_classes"].tolist() == [[0, 1, 1]]
    assert batch["segment_isthing"].tolist() == [[False, True, True]]
    assert (batch["label"] == 1).any()  # but a crowd's pixels have their class


def test_eval_says_what_is_too_small():
    for data, message in (
        ({"label_size": (20, 20)}, r"'pictures-0' is 24 x 20 .* data\.label_size=\(20, 20\)"),
        ({"max_segments": 1}, r"'pictures-0' has 2 segments, more than data\.max_segments=1"),
    ):
        with pytest.raises(UserError, match=message):
            list(eval_batches(Pictures(1), SEGMENTS, make_config(**data), batch_size=1))


def test_flags_are_left_to_the_program():
    # Only grain's own are touched, and only where worker processes are asked for.
    before = flags.FLAGS.is_parsed()
    batches(make_config(), Pictures(), 1)
    assert flags.FLAGS.is_parsed() == before


class Labelled(Source):
    """Pictures whose every pixel is the example's number; the class is its remainder."""

    provides = frozenset({"image", "label", "captions"})

    def __init__(self, count=6, names=("cat", "dog"), name="labelled"):
        self.name, self.count = name, count
        self.classes = ClassList(tuple((n,) for n in names), tuple(range(len(names))), (True,) * len(names))
        self.labels = (np.arange(count) % len(names)).astype(np.int32)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = np.full((12, 18, 3), index, np.uint8)
        label = int(self.labels[index])
        captions = [f"a {self.classes.display(label)}"]
        return {"image": image, "label": label, "image_id": str(index), "captions": captions}


def labels_config(batch_size=4, **data):
    config = make_config(batch_size=batch_size, augment={"randaugment": 0}, **data)
    del config["data"]["scale_jitter"]
    return config


@pytest.mark.parametrize("views", [1, 4])
def test_classification_batches(views):
    config, source = labels_config(views=views), Labelled()
    stream = batches(config, source, 3 * views, LABELS)
    assert {k: (v.dtype.name, v.shape) for k, v in stream[0].items()} == {
        "image": ("uint8", (4, 16, 16, 3)), "image_size": ("int32", (4, 2)), "label": ("int32", (4,)),
        "example_mask": ("bool", (4,)),
    }  # fmt: skip
    numbers = np.concatenate([b["image"].max((1, 2, 3)) for b in stream])
    labels = np.concatenate([b["label"] for b in stream])
    np.testing.assert_array_equal(labels, numbers % 2)
    shown = numbers.reshape(-1, views)
    assert (shown == shown[:, :1]).all()  # the views of an example stand together
    epochs = shown[:, 0].reshape(2, 6)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    for a, b in zip(stream[views:], batches(config, source, 2 * views, LABELS, start=views), strict=True):
        assert_same(a, b)


def test_views_differ():
    class Noisy(Labelled):
        def __getitem__(self, index):
            image = np.random.default_rng(index).integers(0, 255, (20, 20, 3), np.uint8)
            return {**super().__getitem__(index), "image": image}

    (batch,) = batches(labels_config(views=4), Noisy(), 1, LABELS)
    assert len({image.tobytes() for image in batch["image"]}) == 4


def test_one_pass_of_views_in_order():
    source, config = Labelled(5), labels_config(threads=2)
    made = view_batches(config, Rows.from_config(config, LABELS), source, 3)
    numbers = [batch["image"].max((1, 2, 3)).tolist() for batch in made]
    assert np.concatenate(numbers).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert {len(row) for row in numbers} == {4}


def test_caption_batches():
    source = Labelled(names=("cat", "dog of the sea"))
    config = labels_config()
    words = spoken_words({}, source, ("tokens",))
    make_row = Rows.from_config(config, ("image", "tokens"), words, WordTokenizer(words, 7))
    batch = next(train_iterator(config, make_row, source=source))
    assert {k: v.shape for k, v in batch.items()} == {
        "image": (4, 16, 16, 3), "image_size": (4, 2), "tokens": (4, 7), "token_valid": (4, 7), "example_mask": (4,),
    }  # fmt: skip
    for image, ids in zip(batch["image"], batch["tokens"], strict=True):
        assert (words.id("cat") in ids) == (image.max() % 2 == 0) and words.id("a") in ids


def test_mixture_of_classification_sources():
    one, other = Labelled(6, ("cat", "dog"), "one"), Labelled(4, ("dog", "owl"), "other")
    mixture = Mixture([one, other])
    assert mixture.classes.names == (("cat",), ("dog",), ("owl",))
    assert mixture.labels.tolist() == [0, 1, 0, 1, 0, 1, 1, 2, 1, 2]
    assert [mixture[k]["label"] for k in range(10)] == mixture.labels.tolist()
    assert Cached(mixture).labels is mixture.labels and Cached(mixture)[7]["label"] == 2
    images = np.concatenate([b["image"] for b in batches(labels_config(batch_size=32), mixture, 3, LABELS)])
    labels = np.concatenate([b["label"] for b in batches(labels_config(batch_size=32), mixture, 3, LABELS)])
    # Half of the rows are of each part, whose six or four examples come in turn.
    assert np.bincount(labels).tolist() == [24, 48, 24]
    assert set(zip(images.max((1, 2, 3)).tolist(), labels.tolist(), strict=True)) == {
        (0, 0), (1, 1), (2, 0), (3, 1), (4, 0), (5, 1), (0, 1), (1, 2), (2, 1), (3, 2),
    }  # fmt: skip
    assert Mixture([Pictures(), one]).labels is None


def test_fields_need_their_kind_of_source():
    with pytest.raises(UserError, match=r"data\.fields: 'outlines' is not one of image, words"):
        batches(labels_config(), Labelled(), 1, ("outlines",))
    with pytest.raises(UserError, match=r"'pictures' has no label, which the batch field 'label' needs"):
        batches(labels_config(), Pictures(), 1, LABELS)
    with pytest.raises(
        UserError, match=r"'labelled' has no class_ids and no segments, which the batch field 'masks'"
    ):
        batches(make_config(), Labelled(), 1)
    for fields in (("tokens",), ("image", "box_tokens")):
        with pytest.raises(UserError, match="need a tokeniser"):
            batches(make_config(), Labelled(), 1, fields)
    with pytest.raises(UserError, match="need a vocabulary"):
        Rows.from_config(make_config(), SCENE)
    with pytest.raises(UserError, match="views=0"):
        batches(labels_config(views=0), Labelled(), 1, LABELS)


def test_classification_eval_batches():
    source = Labelled(5)
    first, second = eval_batches(source, LABELS, labels_config(), batch_size=3)
    assert {k: (v.dtype.name, v.shape) for k, v in first.items()} == {
        "image": ("uint8", (3, 16, 16, 3)), "label": ("int32", (3,)), "index": ("int32", (3,)),
        "example_mask": ("bool", (3,)),
    }  # fmt: skip
    assert first["label"].tolist() == [0, 1, 0] and first["image"].max((1, 2, 3)).tolist() == [0, 1, 2]
    assert second["example_mask"].tolist() == [True, True, False] and second["index"].tolist() == [3, 4, -1]


class Guarded(Labelled):
    """Pictures with a class and with segments, of which a test allows some fields to be read."""

    provides = Labelled.provides | Pictures.provides

    def __init__(self, allowed):
        super().__init__(3)
        self.allowed = {*allowed, "image_id"}

    def __getitem__(self, index):
        def refuse(name):
            def read(_):
                raise AssertionError(f"{name} is read")

            return read

        known = {**Pictures(3, (12, 18))[index], **super().__getitem__(index)}
        return Example(**{k: v if k in self.allowed else refuse(k) for k, v in known.items()})


def test_an_evaluation_reads_what_its_evaluator_needs_and_nothing_else():
    """Whatever else a source provides: images of it alone, their class alone, and segments though it has classes."""
    images = Guarded(["image"])
    (batch,) = eval_batches(images, ["image"], make_config(), batch_size=4)
    assert batch["image_size"].tolist() == [[11, 16]] * 3 + [[0, 0]]
    assert batch["image"].max((1, 2, 3)).tolist() == [0, 1, 2, 0] and set(batch) == {
        *("image", "image_size", "index", "example_mask")
    }
    (batch,) = eval_batches(Guarded(LABELS), LABELS, make_config(), batch_size=4)
    assert batch["label"].tolist() == [0, 1, 0, 0] and "segments" not in batch
    allowed = (*SEGMENTS, "isthing", "iscrowd")
    (batch,) = eval_batches(Guarded(allowed), SEGMENTS, make_config(), batch_size=4)
    assert batch["label"].shape == (4, 12, 18) and batch["segment_valid"].sum() == 6
    with pytest.raises(AssertionError, match="segments is read"):
        list(eval_batches(images, SEGMENTS, make_config(), batch_size=4))


def test_an_evaluation_needs_its_fields():
    with pytest.raises(UserError, match="'pictures' has no label, which this evaluation needs"):
        eval_batches(Pictures(), LABELS, make_config(), batch_size=1)
