"""Localized Narratives and the retrieval splits in their official layouts."""

import json

import pytest

from ovseg_jax.datasets.narratives import LocalizedNarratives
from ovseg_jax.datasets.retrieval import CocoRetrieval, Flickr30kRetrieval
from ovseg_jax.errors import UserError
from tests.datasets.packing import as_json, both_forms, jpeg, read_all, unpacked


def narratives(dataset: str, *rows: tuple[str, str]) -> bytes:
    made = [
        {
            "dataset_id": dataset,
            "image_id": image,
            "annotator_id": 7,
            "caption": caption,
            "timed_caption": [{"utterance": "In", "start_time": 0.0, "end_time": 0.4}],
            "traces": [[{"x": 0.1, "y": 0.2, "t": 0.0}]],
            "voice_recording": "coco_train/x.ogg",
        }
        for image, caption in rows
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made).encode()


PART = "coco_train_localized_narratives-0000{}-of-00002.jsonl"
COCO = {
    PART.format(0): narratives(
        "mscoco_train2017", ("9", "In this image\u2028we see a cat."), ("25", " A  dog. ")
    ),
    PART.format(1): narratives("mscoco_train2017", ("9", "A cat\nlies."), ("25", "")),
    "coco_val_captions.jsonl": narratives("mscoco_val2017", ("4", "A bird.")),
    "flickr30k_test_localized_narratives.jsonl": narratives("Flickr30k", ("1000092795", "Two men.")),
    "open_images_validation_localized_narratives.jsonl": narratives(
        "OpenImages", ("0001eeaf4aed83f9", "A plane.")
    ),
    "train2017/000000000009.jpg": jpeg(2, 3),
    "train2017/000000000025.jpg": jpeg(2, 3, 1),
    "train2017/000000000030.jpg": jpeg(2, 3, 1),
    "val2017/000000000004.jpg": jpeg(2, 3, 1),
    "flickr30k-images/1000092795.jpg": jpeg(2, 3, 2),
    "validation/0001eeaf4aed83f9.jpg": jpeg(2, 3, 3),
}
ARCHIVES = {
    "train2017.zip": "train2017/",
    "val2017.zip": "val2017/",
    "flickr30k-images.tar.gz": "flickr30k-images/",
    "validation.tar.gz": "validation/",
}


def test_narratives(tmp_path):
    for folder in both_forms(tmp_path, COCO, ARCHIVES):
        data = LocalizedNarratives(folder)
        found = read_all(data, "train")
        assert {key: own["captions"] for key, own in found.items()} == {
            "25": ["A dog."],
            "9": ["In this image we see a cat.", "A cat lies."],
        }
        assert found["9"]["image"] == COCO["train2017/000000000009.jpg"]
        assert read_all(data, "val")["4"]["captions"] == ["A bird."]
        flickr = LocalizedNarratives(folder, images="flickr30k")
        assert read_all(flickr, "test")["1000092795"]["captions"] == ["Two men."]
        openimages = LocalizedNarratives(folder, images="open_images")
        assert read_all(openimages, "val")["0001eeaf4aed83f9"]["captions"] == ["A plane."]


def test_faults_of_narratives(tmp_path):
    with pytest.raises(
        UserError, match="the part on ADE20K is not read, since its images are those of the benchmark"
    ):
        LocalizedNarratives(tmp_path, images="ade20k")
    data = LocalizedNarratives(unpacked(tmp_path / "a", COCO))
    with pytest.raises(
        UserError, match="localized_narratives has no split 'test'; its splits are train, val"
    ):
        list(data.entries("test"))
    with pytest.raises(
        UserError, match=r"holds no flickr30k_train_localized_narratives.jsonl, packed or unpacked"
    ):
        list(LocalizedNarratives(tmp_path / "a", images="flickr30k").entries("train"))
    (tmp_path / "a" / PART.format(1)).unlink()
    with pytest.raises(
        UserError, match=r"holds 1 of 2 parts, such as coco_train_localized_narratives-00000-of-00002"
    ):
        list(LocalizedNarratives(tmp_path / "a").entries("train"))
    for name, content, message in (
        ("b", b"{", r"captions.jsonl, line 1, cannot be read: it is not valid JSON"),
        ("c", b"\n[]\n", r"captions.jsonl, line 1, cannot be read: expected an object"),
        ("d", b'{"image_id": "4"}\n', r"line 1, cannot be read: it has no 'caption'"),
        ("e", b'{"image_id": 4, "caption": "x"}\n', r"'image_id': expected a text, got 4"),
        ("f", b'{"image_id": "x", "caption": "x"}\n', r"'image_id': 'x' is no number of COCO"),
        (
            "g",
            b'{"image_id": "5", "caption": "x"}\n',
            r"1 of 1 images of val are not in .*, such as 0000000000",
        ),
        ("h", b"\xff\n", r"captions.jsonl cannot be read: it is not UTF-8"),
    ):
        data = LocalizedNarratives(unpacked(tmp_path / name, COCO | {"coco_val_captions.jsonl": content}))
        with pytest.raises(UserError, match=message):
            list(data.entries("val"))


def karpathy(*rows: tuple[str, str, int | None]) -> bytes:
    images = [
        {
            "filename": file,
            "split": split,
            "imgid": k,
            "sentids": [k],
            "sentences": [
                {"raw": f"Caption {c} of {file}. ", "tokens": [], "sentid": k, "imgid": k} for c in range(5)
            ],
            **({} if number is None else {"cocoid": number, "filepath": "val2014"}),
        }
        for k, (file, split, number) in enumerate(rows)
    ]
    return as_json({"images": images, "dataset": "coco"})


LISTING = karpathy(
    ("COCO_val2014_000000000004.jpg", "test", 4),
    ("COCO_val2014_000000000005.jpg", "restval", 5),
    ("COCO_train2014_000000000009.jpg", "train", 9),
    ("COCO_val2014_000000000006.jpg", "val", 6),
)
RETRIEVAL = {
    "dataset_coco.json": LISTING,
    "dataset_flickr8k.json": b"{}",
    "dataset_flickr30k.json": karpathy(
        ("1000092795.jpg", "train", None), ("10002456.jpg", "val", None), ("36979.jpg", "test", None)
    ),
    "val2014/COCO_val2014_000000000004.jpg": jpeg(2, 3),
    "val2014/COCO_val2014_000000000005.jpg": jpeg(2, 3, 1),
    "val2014/COCO_val2014_000000000006.jpg": jpeg(2, 3, 2),
    "train2014/COCO_train2014_000000000009.jpg": jpeg(2, 3, 3),
    "flickr30k-images/1000092795.jpg": jpeg(2, 3, 4),
    "flickr30k-images/10002456.jpg": jpeg(2, 3, 5),
    "flickr30k-images/36979.jpg": jpeg(2, 3, 6),
}
RETRIEVAL_ARCHIVES = {
    "caption_datasets.zip": "dataset_",
    "val2014.zip": "val2014/",
    "train2014.zip": "train2014/",
    "flickr30k-images.tar.gz": "flickr30k-images/",
}


def test_retrieval(tmp_path):
    for folder in both_forms(tmp_path, RETRIEVAL, RETRIEVAL_ARCHIVES):
        data = CocoRetrieval(folder)
        found = read_all(data, "test")
        assert list(found) == ["COCO_val2014_000000000004"]
        assert found["COCO_val2014_000000000004"]["captions"] == [
            f"Caption {c} of COCO_val2014_000000000004.jpg." for c in range(5)
        ]
        assert list(read_all(data, "train")) == ["COCO_val2014_000000000005", "COCO_train2014_000000000009"]
        assert list(read_all(CocoRetrieval(folder, restval="leave_out"), "train")) == [
            "COCO_train2014_000000000009"
        ]
        assert list(read_all(data, "val")) == ["COCO_val2014_000000000006"]
        flickr = Flickr30kRetrieval(folder)
        assert list(read_all(flickr, "train")) == ["1000092795"] and len(read_all(flickr, "val")) == 1


def test_images_of_coco_2017_serve_as_those_of_2014(tmp_path):
    files = {"dataset_coco.json": LISTING, "val2017/000000000004.jpg": jpeg(2, 3)}
    found = read_all(CocoRetrieval(unpacked(tmp_path, files)), "test")
    assert found["COCO_val2014_000000000004"]["image"] == files["val2017/000000000004.jpg"]


def test_faults_of_retrieval(tmp_path):
    for name, content, message in (
        ("a", b"{}", r"dataset_coco.json cannot be read: it has no 'images'"),
        (
            "b",
            as_json({"images": [{"split": "test", "filename": "a.jpg"}]}),
            r"cannot be read: it has no 'sentences'",
        ),
        (
            "c",
            as_json({"images": [{"split": "test", "filename": "a.jpg", "sentences": [{}]}]}),
            r"sentence 0 has no 'raw'",
        ),
        (
            "d",
            karpathy(("x.jpg", "test", 12)),
            r"1 of 1 images of test are not in .*, such as x.jpg",
        ),
    ):
        data = CocoRetrieval(unpacked(tmp_path / name, RETRIEVAL | {"dataset_coco.json": content}))
        with pytest.raises(UserError, match=message):
            list(data.entries("test"))
