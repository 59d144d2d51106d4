"""Data sets of TensorFlow Datasets: a stand-in for the package here, and files that it wrote where it is installed."""

import io
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ovseg_jax.data.sources.tfds_images import TfdsImages
from ovseg_jax.errors import UserError

LABELS = [1, 0, 1, 1]


@pytest.fixture
def package(monkeypatch):
    """A module with what is used of tensorflow_datasets, whose images cannot be decoded while labels are read."""

    def data_source(name, *, split, data_dir, download, decoders):
        assert name == "zoo" and data_dir is None and download is False
        if split != "train":
            raise ValueError(f"Unknown split {split!r}.\nAnd a long list.")
        image = b"not decoded" if decoders else np.full((6, 8, 1), 7, np.uint8)
        return [{"image": image, "label": np.int64(label), "text": "x"} for label in LABELS]

    module = ModuleType("tensorflow_datasets")
    features = {
        "image": None,
        "label": SimpleNamespace(names=["sea_lion", "zebra"]),
        "text": SimpleNamespace(),
    }
    builder = SimpleNamespace(info=SimpleNamespace(features=features))
    module.__dict__.update(
        data_source=data_source,
        builder=lambda name, data_dir: builder,
        decode=SimpleNamespace(SkipDecoding=lambda: "skip"),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_labels_names_and_images(package):
    source = TfdsImages("zoo", "train")
    assert source.name == "zoo" and source.classes.names == (("sea lion",), ("zebra",)) and len(source) == 4
    assert source.labels.tolist() == LABELS and source.labels.dtype == np.int32
    example = source[1]
    assert example["label"] == 0 and example["image_id"] == "1"
    assert (
        example["image"].shape == (6, 8, 3) and (example["image"] == 7).all()
    )  # grey ones have three channels too
    with pytest.raises(IndexError):
        source[4]
    assert list(source.captions()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="dev"), r"'zoo', split 'dev', cannot be opened \(Unknown split 'dev'\.\); tfds build"),
        (dict(split="train", image_key="photo"), "no feature 'photo'; it has image, label, text"),
        (dict(split="train", label_key="text"), "'text' of zoo is not a class"),
    ],
)
def test_what_is_wrong_is_named(package, arguments, message):
    with pytest.raises(UserError, match=message):
        TfdsImages("zoo", **arguments)


@pytest.fixture
def imagenet(package, monkeypatch):
    """ImageNet-A in small: the label feature lists four classes, the images have two."""
    module = sys.modules["tensorflow_datasets"]
    names = ["n01440764", "n01443537", "n01484850", "n01491361"]
    features = {"image": None, "label": SimpleNamespace(names=names)}
    records = [{"image": b"", "label": np.int64(label)} for label in (3, 1, 3)]
    monkeypatch.setattr(
        module, "builder", lambda *_, **__: SimpleNamespace(info=SimpleNamespace(features=features))
    )
    monkeypatch.setattr(module, "data_source", lambda *_, **__: records)


def test_wordnet_ids_need_names_and_absent_classes_do_not_count(imagenet, tmp_path):
    with pytest.raises(
        UserError, match="of imagenet_a are WordNet ids, such as n01443537, which are no words"
    ):
        TfdsImages("imagenet_a", "test")
    file = tmp_path / "names.txt"
    file.write_text(
        "n01440764 tench\nn01443537 goldfish\nn01484850 white shark\nn01491361 tiger shark, shark\n"
    )
    small = TfdsImages("imagenet_a:1.0.0", "test", names=str(file))
    assert small.classes.names == (("goldfish",), ("tiger shark", "shark")) and small.classes.ids == (0, 1)
    assert small.labels.tolist() == [1, 0, 1] and small.labels.dtype == np.int32
    assert small[0]["label"] == 1
    wide = TfdsImages("imagenet2012", "test", names=str(file))
    assert len(wide.classes) == 4 and wide.labels.tolist() == [3, 1, 3]
    assert len(TfdsImages("imagenet2012", "test", names=str(file), present=True).classes) == 2
    assert len(TfdsImages("imagenet_a", "test", names="folders", present=False).classes) == 4
    file.write_text("n01443537 goldfish\n")
    with pytest.raises(UserError, match=r"names.txt has no name for the label 'n01491361' of imagenet_a"):
        TfdsImages("imagenet_a", "test", names=str(file))


def test_what_the_package_raises_is_one_sentence(package, monkeypatch):
    module = sys.modules["tensorflow_datasets"]
    whole = module.data_source

    class Damaged(list):
        def __getitem__(self, index):
            raise Exception("the record is corrupt\nat byte 7")

    def damaged(*args, decoders, **kwargs):
        return whole(*args, decoders=decoders, **kwargs) if decoders else Damaged([0])

    monkeypatch.setattr(module, "data_source", damaged)
    with pytest.raises(UserError, match=r"the image 0 of zoo cannot be read \(the record is corrupt\)$"):
        dict(TfdsImages("zoo", "train")[0])
    records = [{"image": b"", "label": label} for label in (0, -1)]
    monkeypatch.setattr(module, "data_source", lambda *_, **__: records)
    with pytest.raises(UserError, match="the label -1, but only"):
        TfdsImages("zoo", "train")
    monkeypatch.setattr(
        module, "data_source", lambda *_, decoders, **__: [{"label": "x"}] if decoders else records
    )
    with pytest.raises(UserError, match=r"the labels of zoo, split 'train', cannot be read"):
        TfdsImages("zoo", "train")


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        TfdsImages("zoo", "train")


def test_real_files(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    def png(value):
        file = io.BytesIO()
        Image.new("RGB", (8, 6 + value), (value, value, value)).save(file, "PNG")
        file.seek(0)
        return file

    with tfds.core.registered.skip_registration():  # so that the files alone are read

        class Zoo(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                label = tfds.features.ClassLabel(names=["sea_lion", "zebra"])
                features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for value in range(5):
                    yield value, {"image": png(value), "label": value % 2}

    Zoo(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = pickle.loads(pickle.dumps(TfdsImages("zoo", "train", str(tmp_path))))  # as for a worker process
    assert source.classes.names == (("sea lion",), ("zebra",)) and len(source) == 5
    examples = [source[index] for index in range(5)]
    values = [int(example["image"][0, 0, 0]) for example in examples]
    assert sorted(values) == list(range(5)) and [value % 2 for value in values] == source.labels.tolist()
    assert [example["image"].shape for example in examples] == [(6 + value, 8, 3) for value in values]
    assert len(TfdsImages("zoo", "train[:40%]", str(tmp_path))) == 2
    with pytest.raises(UserError, match="Unknown split 'test'"):
        TfdsImages("zoo", "test", str(tmp_path))
