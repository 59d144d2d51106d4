"""Rows of batches: which fields they hold, and that nothing else is read."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data import transforms
from ovseg_jax.data.pipeline import train_iterator
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.scenes.source import Scenes
from ovseg_jax.data.source_base import Example, Source, replaced
from ovseg_jax.data.sources.coco import Coco
from ovseg_jax.data.sources.folder import Folder
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.run import train
from ovseg_jax.towers.vocabulary import SPOKEN, counted_words, spoken_words
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.word_tokenizer import WordTokenizer
from ovseg_jax.vocab.words import WordList
from tests import tiny
from tests.data.sources.test_coco import write_coco

SCENES = Scenes("train", 12, image_size=48, size="tiny")
WORDS = spoken_words({}, SCENES, SPOKEN)
TOKENIZE = WordTokenizer(WORDS, 20)
LEFT = WordTokenizer(WordList(["a", "red", "ball", "on", "the", "left"]), 6)
EVERYTHING = "image masks mask_classes mask_isthing mask_iscrowd pixel_classes boxes box_tokens box_words box_tags tags"
EVERYTHING = (*EVERYTHING.split(), "words", "tokens")


def make_config(**data):
    defaults = {
        "image_size": 32,
        "mask_stride": 1,
        "max_masks": 4,
        "max_words": 8,
        "max_tags": 5,
        "threads": 0,
    }
    return {"seed": 3, "steps": 10, "batch_size": 4, "data": {**defaults, "keep_prob": 1.0, **data}}


def make_rows(*fields, tokenize=TOKENIZE, **data):
    return Rows.from_config(make_config(**data), fields, WORDS, tokenize)


class OnlyTexts(Source):
    """Examples whose masks must not be read."""

    name, classes = "only_texts", ClassList((("dog",),), (0,), (True,))
    provides = frozenset({"image", "segments", "class_ids", "boxes", "captions"})

    def __len__(self):
        return 6

    def __getitem__(self, index):
        def refuse(_):
            raise AssertionError("a mask was read")

        image = lambda _: np.full((40, 30, 3), index, np.uint8)
        kept = dict(image=image, captions=["a red dog", "a dog"][: index % 3], image_id=str(index))
        return Example(
            segments=refuse, class_ids=refuse, boxes=refuse, isthing=refuse, iscrowd=refuse, **kept
        )


def test_captions_alone_train_a_run_and_read_no_mask(tmp_path):
    config = tiny.get_config("steps=1")
    config.batch_size = config.loss.group = 8
    config.loss.mask_weight = 0.0
    config.evals = config.final_evals = {}
    config.data.train = [dict(name="tests.data.test_rows:OnlyTexts")]
    summary = train(config, tmp_path)
    assert summary["steps"] == 1
    config.loss.mask_weight = 1.0
    with pytest.raises(AssertionError, match="a mask was read"):
        train(config, tmp_path / "masks")


def write_folder(root):
    """Two images, one with a mask, both with captions."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (10, 8), "red").save(root / "images" / name)
    Image.new("L", (10, 8), 3).save(root / "masks/a.png")
    (root / "captions.json").write_text(json.dumps({"a.png": ["a red dog"], "b.png": ["a cat"]}))


@pytest.mark.parametrize("fields", [("image", "words"), ("image", "tokens")])
def test_captions_alone_need_no_mask_files(tmp_path, fields):
    write_coco(tmp_path / "coco")
    write_folder(tmp_path / "folder")
    sources = Coco(tmp_path / "coco", "val2017"), Folder(tmp_path / "folder")
    shutil.rmtree(tmp_path / "coco/annotations")
    shutil.rmtree(tmp_path / "folder/masks")
    for source in sources:
        words = spoken_words({}, source, fields)
        rows = Rows.from_config(make_config(), fields, words, WordTokenizer(words, 9))
        batches = train_iterator(make_config(), rows, source=source)
        assert next(batches)["image"].any() and len(list(source.captions()))
        with pytest.raises(UserError, match=r"\.png"):
            list(
                source.regions()
                if source.name == "folder"
                else (source[k]["segments"] for k in range(len(source)))
            )


def test_masks_alone_and_labels_read_no_caption():
    def refuse(_):
        raise AssertionError("a caption was read")

    example = replaced(
        SCENES[0], captions=refuse, tags=refuse, region_captions=refuse, region_tags=refuse, label=2
    )
    row = make_rows("image", "masks", "boxes", "label")(0, example)
    assert row["mask_valid"].any() and row["label"] == 2
    # The picture is the same whether or not its words are read.
    np.testing.assert_array_equal(row["image"], make_rows("image", "words")(0, SCENES[0])["image"])
    features = {"feature": np.ones(3, np.float32), "label": 1}
    assert set(make_rows("feature", "label")(0, features)) == {"feature", "label", "example_mask"}


def test_every_field_of_scenes_reaches_a_batch():
    batch = next(train_iterator(make_config(), make_rows(*EVERYTHING), source=SCENES))
    shapes = {name: value.shape[1:] for name, value in batch.items()}
    assert shapes == {
        "image": (32, 32, 3), "image_size": (2,), "example_mask": (),
        "masks": (4, 32, 32), "mask_valid": (4,), "mask_weight": (), "pixel_classes": (32, 32),
        "mask_classes": (4,), "mask_isthing": (4,), "mask_iscrowd": (4,),
        "boxes": (4, 4), "box_valid": (4,), "box_tokens": (4, 20), "box_token_valid": (4, 20),
        "box_word_ids": (4, 8), "box_word_valid": (4, 8), "box_tags": (4, 5, 20), "box_tag_valid": (4, 5, 20),
        "tags": (5, 20), "tag_valid": (5, 20), "word_ids": (8,), "word_valid": (8,),
        "tokens": (20,), "token_valid": (20,),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["mask_valid"], batch["box_valid"])
    np.testing.assert_array_equal(batch["box_token_valid"].any(2), batch["box_valid"])
    np.testing.assert_array_equal(batch["box_tag_valid"].any((2, 3)), batch["box_valid"])


def said(ids, valid):
    return " ".join(WORDS.words[k] for k in ids[valid][1:-1])


@pytest.mark.parametrize(
    "geometry", [{"scale_jitter": (0.7, 1.8)}, {"augment": {"crop": (0.3, 1.0), "randaugment": 0}}]
)
def test_regions_stay_together_under_flip_scale_and_crop(geometry):
    """A slot's mask, class, box, caption and tags are those of one segment, wherever it has moved."""
    rows = make_rows(*EVERYTHING, **geometry)
    for index in range(40):
        example = SCENES[index % len(SCENES)]
        row = rows(index, example)
        for k in np.flatnonzero(row["mask_valid"]):
            mask = (row["masks"][k] > 0).astype(np.int32)
            np.testing.assert_array_equal(row["boxes"][k], transforms.segment_boxes(mask, 1)[0])
            assert set(np.unique(row["pixel_classes"][mask > 0])) == {row["mask_classes"][k]}
            caption = said(row["box_tokens"][k], row["box_token_valid"][k])
            tags = [said(*pair) for pair in zip(row["box_tags"][k], row["box_tag_valid"][k], strict=True)]
            own = (caption, [tag for tag in tags if tag], row["mask_classes"][k], row["mask_isthing"][k])
            texts = zip(example["region_captions"], example["region_tags"], strict=True)
            assert own in [
                (captions[0], tags[:5], class_id, isthing)
                for (captions, tags), class_id, isthing in zip(
                    texts, example["class_ids"], example["isthing"], strict=True
                )
            ]
        padding = ~row["mask_valid"]
        assert (row["mask_classes"][padding] == -1).all() and not row["boxes"][padding].any()
        assert not row["masks"][padding].any() and not row["box_word_ids"][padding].any()
        areas = row["masks"].astype(int).sum((1, 2))
        assert (np.diff(areas) <= 0).all()
        tags = [said(*pair) for pair in zip(row["tags"], row["tag_valid"], strict=True)]
        assert [tag for tag in tags if tag] == example["tags"][:5]


def test_boxes_without_masks_move_as_the_image_does():
    """Boxes of a source without segments; the largest come first, crowds and what is cut off are left out."""
    boxes = np.array([[0, 0, 8, 8], [10, 4, 40, 30], [20, 20, 30, 30], [5, 5, 5, 9]], np.float32)
    example = {"image": np.zeros((40, 40, 3), np.uint8), "boxes": boxes, "iscrowd": np.arange(4) == 2}
    rows = make_rows("image", "boxes", max_boxes=3, image_size=20, flip=False)
    row = rows(0, example)
    assert row["box_valid"].tolist() == [True, True, False]
    np.testing.assert_allclose(row["boxes"], [[5, 2, 20, 15], [0, 0, 4, 4], [0, 0, 0, 0]])
    mirrored = [
        make_rows("image", "boxes", max_boxes=3, image_size=20)(index, example) for index in range(20)
    ]
    assert {tuple(row["boxes"][0].tolist()) for row in mirrored} == {(5, 2, 20, 15), (0, 2, 15, 15)}


def test_crowds_are_among_the_masks_where_they_are_named():
    example = replaced(SCENES[0], iscrowd=lambda e: np.arange(len(e["class_ids"])) == 0)
    named = make_rows("image", "masks", "mask_iscrowd", flip=False)(0, example)
    hidden = make_rows("image", "masks", flip=False)(0, example)
    assert named["mask_valid"].sum() == hidden["mask_valid"].sum() + 1 and named["mask_iscrowd"].sum() == 1
    np.testing.assert_array_equal(
        named["masks"][~named["mask_iscrowd"] & named["mask_valid"]], hidden["masks"][hidden["mask_valid"]]
    )


def test_texts_kept_whole_are_not_mirrored_where_they_speak_of_sides():
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, :8] = 255
    rows = Rows.from_config(make_config(image_size=16), ("image", "tokens"), None, LEFT)
    seen = set()
    for index in range(200):
        row = rows(index, {"image": image, "captions": ["a red ball", "a ball on the left"]})
        ids = row["tokens"][row["token_valid"]][1:-1].tolist()
        # Six tokens have room for four words.
        assert ids in ([1, 2, 3], [1, 3, 4, 5]) and row["tokens"].dtype == np.int32
        seen.add((len(ids), bool(row["image"][:, 0].max() < 128)))
    assert seen == {(3, True), (3, False), (4, False)}
    silent = rows(0, {"image": image, "captions": []})
    assert not silent["token_valid"].any() and silent["example_mask"]
    with pytest.raises(UserError, match="'dog'"):
        rows(0, {"image": image, "captions": ["a dog"]})
    example = {
        "image": image,
        "boxes": np.array([[0, 0, 8, 16]], np.float32),
        "region_captions": [["the left ball"]],
    }
    rows = Rows.from_config(
        make_config(image_size=16, max_masks=1), ("image", "boxes", "box_tokens"), None, LEFT
    )
    assert all(rows(index, example)["boxes"][0, 0] == 0 for index in range(20))
    drop = [{"name": "blur", "probability": 1.0, "drop": ("all",)}]
    with pytest.raises(UserError, match="'tokens' keeps texts whole"):
        Rows.from_config(make_config(batch_augment=drop), ("image", "tokens"), None, LEFT)


def test_tags_are_word_ids_without_a_tokeniser():
    row = make_rows("image", "tags", "box_tags", "boxes", tokenize=None)(0, SCENES[0])
    words = [
        [WORDS.words[k] for k in ids[valid]] for ids, valid in zip(row["tags"], row["tag_valid"], strict=True)
    ]
    assert [tag[0] for tag in words if tag] == SCENES[0]["tags"][:5]
    assert row["box_tags"].shape == (4, 5, 8)


def test_views_of_a_feature():
    feature = np.arange(5, dtype=np.float32)
    rows = make_rows("feature", "label")
    example = {"feature": np.stack([feature, -feature]), "label": 1}
    made = [rows(index, example) for index in range(40)]
    assert {row["feature"][1] for row in made} == {1, -1} and made[0]["feature"].shape == (5,)
    # Consecutive rows that show one example show different views of it.
    example = {"feature": np.arange(4, dtype=np.float32)[:, None], "label": 1}
    rows = make_rows("feature", "label", views=4)
    drawn = np.array([rows(index, example)["feature"][0] for index in range(80)]).reshape(20, 4)
    assert (np.sort(drawn) == np.arange(4)).all() and len({tuple(group) for group in drawn}) > 5


def test_words_are_those_that_are_counted():
    rows = Rows.from_config(make_config(), ("image", "words"), counted_words({}, SCENES))
    assert rows(0, SCENES[0])["word_valid"].any()


def test_boxes_are_drawn_where_an_image_has_more():
    boxes = np.array([[k, 0, 30, 10 + k] for k in range(6)], np.float32)
    example = {
        "image": np.zeros((32, 32, 3), np.uint8),
        "boxes": boxes,
        "region_captions": [[f"a {k}"] for k in "abcdef"],
    }
    words = WordTokenizer(WordList(["a", *"bcdef"]), 5)
    drawn = []
    for index in range(40):
        rows = make_rows(
            "image", "boxes", "box_tokens", tokenize=words, max_boxes=2, flip=False, box_draw="random"
        )
        row = rows(index, example)
        corners = row["boxes"][:, 0].astype(int).tolist()
        ids = row["box_tokens"][:, 2].tolist()  # start, "a", the letter
        assert ids == [1 + k for k in corners] and row["box_valid"].all()
        drawn.append(tuple(corners))
        np.testing.assert_array_equal(row["boxes"], rows(index, example)["boxes"])
    assert len(set(drawn)) > 8 and {k for pair in drawn for k in pair} == set(range(6))
    few = make_rows("image", "boxes", max_boxes=8, flip=False, box_draw="random")(0, example)
    assert few["box_valid"].sum() == 6
    with pytest.raises(UserError, match="box_draw=random does not fit the batch field 'masks'"):
        make_rows("image", "boxes", "masks", box_draw="random")
    with pytest.raises(UserError, match="box_draw='some' is not one of largest, random"):
        make_rows("image", "boxes", box_draw="some")


def test_texts_of_boxes_and_tags_are_cut_before_their_end():
    plain = make_rows("boxes", "box_tokens", "tags", "box_tags", max_box_tags=2)(0, SCENES[0])
    short = make_rows(
        "boxes", "box_tokens", "tags", "box_tags", max_box_tags=2, max_box_tokens=6, max_tag_tokens=3
    )(0, SCENES[0])
    end = TOKENIZE.vocab_size - 1
    longer = 0
    for field, valid in (
        ("box_tokens", "box_token_valid"),
        ("tags", "tag_valid"),
        ("box_tags", "box_tag_valid"),
    ):
        length = 6 if field == "box_tokens" else 3
        assert short[field].shape == (*plain[field].shape[:-1], length) and short[field].dtype == np.int32
        for place in np.ndindex(plain[field].shape[:-1]):
            said, kept = plain[field][place][plain[valid][place]], short[field][place][short[valid][place]]
            want = said if len(said) <= length else [*said[: length - 1], end]
            assert kept.tolist() == list(want)
            longer += len(said) > length
    assert longer and plain["box_tags"].shape == (4, 2, 20) and plain["tags"].shape == (5, 20)
    with pytest.raises(UserError, match="max_tag_tokens=2 is neither 0 nor at least 3"):
        make_rows("tags", max_tag_tokens=2)
