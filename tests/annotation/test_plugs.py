"""Annotators over Hugging Face's classes with tiny random models of each family, and what plugs may not return."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ovseg_jax import annotate as command
from ovseg_jax.annotation import plug as plugs
from ovseg_jax.annotation.plug import Boxes, Picture, Stuff, make_plug, parse_plug
from ovseg_jax.annotation.plugs import towers
from ovseg_jax.configs.umg_clip import get_config
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.errors import UserError
from ovseg_jax.models import vit
from ovseg_jax.models.text_towers import SiglipText
from ovseg_jax.pretrained.published import HALF
from ovseg_jax.towers.clip import Clip
from ovseg_jax.vocab.words import WordList
from tests.annotation import tiny_models
from tests.extras import require

OPTIONS = {
    "blip2": dict(longest="4", batch=2),
    "florence2": dict(longest=4, batch=2),
    "qwen_vl": dict(longest=4, batch=2),
    "grounding_dino": dict(labels="red ball; grass; sky; blue kite", threshold="0.0"),
    "owlv2": dict(labels="red ball; grass; sky", threshold=0.0),
    "rt_detr": dict(threshold=0.0),
    "mask2former": dict(threshold=0.1, things=1),
    "oneformer": dict(threshold=0.1, things=1),
}
KINDS = {
    "blip2": ("captions", "region_captions"),
    "florence2": ("captions", "region_captions"),
    "qwen_vl": ("tags", "captions", "region_captions"),
    "grounding_dino": ("boxes",),
    "owlv2": ("boxes",),
    "rt_detr": ("boxes",),
    "sam": ("masks",),
    "sam2": ("masks",),
    "sam3": ("masks",),
    "mask2former": ("stuff",),
    "oneformer": ("stuff",),
}


def pictures():
    rng = np.random.default_rng(0)
    sizes = {"wide": (48, 64, 3), "tall": (64, 40, 3)}
    return [Picture(name, rng.integers(0, 256, size).astype(np.uint8)) for name, size in sizes.items()]


def boxes():
    return [
        Boxes(np.array([[4.0, 5, 30, 40], [0, 0, 10, 10]]), ["ball", "kite"], np.ones(2)),
        Boxes(np.array([[4.0, 5, 30, 40]]), ["ball"], np.ones(1)),
    ]


def same(a, b):
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, np.ndarray) and a.dtype != bool:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    elif isinstance(a, np.ndarray):
        assert a.shape == b.shape and (a != b).mean() < 0.01
    else:
        assert a == b


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_a_family_of_models_annotates(name, tmp_path):
    torch = require("torch")
    require("torchvision")
    torch.manual_seed(
        1 if KINDS[name] == ("stuff",) else 0
    )  # with the other there is no background, or no word
    folder = tiny_models.FAMILIES[name](tmp_path / name)
    kind, *others = KINDS[name]
    made = make_plug({"name": name, "model": folder, **OPTIONS.get(name, {})}, kind)
    for each in (kind, *others):
        given = boxes() if each in ("region_captions", "masks") else None
        together = plugs.call(made, each, pictures(), given)
        alone = [
            plugs.call(made, each, [picture], None if given is None else [given[k]])[0]
            for k, picture in enumerate(pictures())
        ]
        # An image is annotated alike, whatever is beside it in the batch. Grounding DINO and Mask2Former pad to the
        # largest one, which moves their features a little.
        if name not in ("grounding_dino", "mask2former", "oneformer"):
            same(together, alone)
        if each in ("captions", "tags"):
            assert all(texts for texts in together)
        elif each == "region_captions":
            assert [len(regions) for regions in together] == [2, 1]
        elif each == "masks":
            assert [masks.shape for masks in together] == [(2, 48, 64), (1, 64, 40)]
        elif each == "stuff":
            assert all(own.masks.any() and own.labels == ["grass"] for own in together)
        else:
            assert all(
                len(own.labels) and set(own.labels) <= {"red ball", "grass", "sky", "blue kite"}
                for own in together
            )


def test_the_boxes_of_grounding_dino_are_those_of_its_processor(tmp_path):
    torch = require("torch")
    require("torchvision")
    torch.manual_seed(0)
    made = make_plug(
        {
            "name": "grounding_dino",
            "model": tiny_models.grounding_dino(tmp_path),
            **OPTIONS["grounding_dino"],
        },
        "boxes",
    )
    # 11 tokens hold [CLS], [SEP] and labels of one or two words with a full stop each.
    assert [labels for labels, _ in made.passes] == [["red ball", "grass", "sky"], ["blue kite"]]
    picture = pictures()[0]
    found = made.boxes([picture])[0]
    expected, scores = [], []
    for _, prompt in made.passes:
        inputs = made.inputs(images=[Image.fromarray(picture.pixels)], text=[prompt])
        out = made.processor.post_process_grounded_object_detection(
            made.run(inputs), inputs["input_ids"], threshold=0.0, text_threshold=0.0, target_sizes=[(48, 64)]
        )[0]
        expected.append(out["boxes"].numpy())
        scores.append(out["scores"].numpy())
    np.testing.assert_allclose(found.boxes, np.concatenate(expected), atol=1e-4)
    assert (found.scores <= np.concatenate(scores) + 1e-6).all()  # its score may be one of a full stop


def test_what_transformers_hides_is_told(monkeypatch):
    require("torch")

    class Broken(ModuleType):
        logging = SimpleNamespace(disable_progress_bar=lambda: None)

        def __getattr__(self, name):
            try:
                raise RuntimeError("operator torchvision::nms does not exist")
            except RuntimeError as error:
                raise ModuleNotFoundError(f"Could not import module {name!r}") from error

    monkeypatch.setitem(sys.modules, "transformers", Broken("transformers"))
    with pytest.raises(UserError, match=r"Blip2 needs transformers .*torchvision::nms does not exist"):
        make_plug({"name": "blip2"}, "captions")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    require("torchvision")
    with pytest.raises(UserError, match=r"cannot be loaded as SamModel"):
        make_plug({"name": "sam", "model": str(tmp_path)}, "masks")


@pytest.fixture
def own():
    """A module of a user's functions."""
    module = sys.modules["my_annotators"] = ModuleType("my_annotators")
    module.captions = lambda pictures, word="dog", times=1: [[f"a {word}"] * times for _ in pictures]
    module.masks = lambda pictures, boxes, grow=0.5: [
        np.full((len(b.labels), *p.pixels.shape[:2]), grow > 1) for p, b in zip(pictures, boxes, strict=True)
    ]
    module.number = 3
    yield module
    del sys.modules["my_annotators"]


def test_a_function_is_a_plug(own):
    spec = parse_plug("my_annotators:captions,word=cat, and dog,times=2")
    assert spec == {"name": "my_annotators:captions", "word": "cat, and dog", "times": "2"}
    made = make_plug(spec, "captions")
    assert made.captions(pictures()) == [["a cat, and dog"] * 2] * 2
    assert plugs.call(made, "captions", pictures()) == [["a cat, and dog"]] * 2
    assert plugs.call(
        make_plug({"name": "my_annotators:masks", "grow": "2"}, "masks"), "masks", pictures(), boxes()
    )[0].all()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("my_annotators:captions,colour=red", "captions", "has no option 'colour'; its options: word, times"),
        ("my_annotators:captions,times=two", "captions", "times=two is not a number"),
        ("my_annotators:dance", "captions", "cannot be imported"),
        ("my_annotators:number", "captions", "neither a class that derives from Plug nor a function"),
        ("no_such_module:f", "captions", "cannot be imported"),
        ("dance", "captions", "the plug 'dance' is unknown: take blip2, florence2"),
        ("sam", "captions", "the plug 'sam' makes no captions, but masks"),
        ("owlv2", "boxes", "'owlv2' needs the option labels="),
        ("sam,model", "boxes", "the plug 'sam,model' is unknown"),
        ("sam,a=1,a=2", "masks", "not of the form NAME,key=value"),
        ("", "masks", "not of the form NAME,key=value"),
    ],
)  # fmt: skip
def test_plugs_that_cannot_be(own, text, kind, message):
    with pytest.raises(UserError, match=message):
        make_plug(parse_plug(text), kind)


PICTURE = Picture("x", np.zeros((4, 6, 3), np.uint8))
ONE = Boxes(np.array([[0.0, 0, 2, 2]]), ["ball"], np.ones(1))
MASK = np.ones((1, 4, 6), bool)


@pytest.mark.parametrize(
    ("kind", "found", "given", "message"),
    [
        ("captions", "a dog", None, "expected a list of texts, got 'a dog'"),
        ("captions", ["a dog", ""], None, "expected a text, got ''"),
        ("tags", [3], None, "expected a text, got 3"),
        ("scores", [0.1], ["a", "b"], r"scores of shape \[1\], not \[2\]"),
        ("scores", [0.1, np.nan], ["a", "b"], "scores that are not finite"),
        ("boxes", Boxes(np.array([[0, 0, np.nan, 2]]), ["ball"], np.ones(1)), None, "boxes that are not finite"),
        ("boxes", Boxes(np.array([[3.0, 0, 2, 2]]), ["ball"], np.ones(1)), None, "corners in the wrong order"),
        ("boxes", Boxes(np.zeros((2, 4)), ["ball"], np.ones(1)), None, r"boxes of shape \[2, 4\], not \[1, 4\]"),
        ("boxes", Boxes(np.zeros((1, 4)), [" , "], np.ones(1)), None, "a label is empty"),
        ("boxes", Boxes(np.zeros((1, 4)), ["ball"], np.array([1.5])), None, "a score is outside of 0 to 1"),
        ("boxes", [], None, "expected boxes as a tuple with labels and scores"),
        ("region_captions", [["a"], ["b"]], ONE, "captions of 2 regions for 1 boxes"),
        ("region_captions", [["a", " "]], ONE, "expected a text, got ' '"),
        ("masks", np.ones((1, 6, 4), bool), ONE, r"masks of shape \[1, 6, 4\], bool, not \[1, 4, 6\], bool"),
        ("masks", np.ones((1, 4, 6)), ONE, "float64, not"),
        ("stuff", Stuff(MASK, ["sky", "sea"], np.ones(2)), None, r"masks of shape \[1, 4, 6\], bool, not \[2, 4, 6\]"),
        ("stuff", Stuff(MASK, ["sky"], np.array([np.inf])), None, "scores that are not finite"),
    ],
)  # fmt: skip
def test_nonsense_of_a_plug_is_an_error(kind, found, given, message):
    made = plugs.Plug()
    setattr(made, kind, lambda *_: [found])
    with pytest.raises(ValueError, match=message):
        plugs.call(made, kind, [PICTURE], None if given is None else [given])


def test_boxes_are_cut_at_the_image_and_labels_cleaned():
    found = Boxes(
        np.array([[-3.0, 1, 9, 9], [7, 0, 9, 3], [1, 1, 1.5, 3]]), ["Red, ball ", "a", "b"], np.full(3, 0.5)
    )
    cut = plugs.check_boxes(found, PICTURE)
    assert (
        cut.boxes.tolist() == [[0, 1, 6, 4]] and cut.labels == ["red ball"] and cut.scores.tolist() == [0.5]
    )
    none = plugs.check_boxes(Boxes([], [], []), PICTURE)
    assert none.boxes.shape == (0, 4) and none.scores.shape == (0,)
    made = plugs.Plug()
    made.captions = lambda pictures: [["a"]]
    with pytest.raises(ValueError, match="an entry for each of 2 images"):
        plugs.call(made, "captions", [PICTURE, PICTURE])


def test_scores_and_tags_of_our_towers(monkeypatch):
    """Cosines in batches over the devices are those of each image and text alone."""
    config = get_config("adapt=none").towers
    config.image.depth = 1
    clip = Clip(config, WordList(["dog", "red", "ball", "grass", "a"]))
    weights = clip.init(jax.random.key(0))
    load = lambda model, tower, text, size, mesh: (clip.embed_image, clip.embed_phrases, weights, 64)
    monkeypatch.setattr(towers, "_load", load)
    made = make_plug(
        {"name": "towers", "classes": "dog; red ball; grass", "prompt": "a {}", "top": "2", "batch": 2},
        "tags",
    )
    shown = [*pictures(), Picture("third", pictures()[0].pixels[:32, :32])]
    texts = [["a dog"], [], ["red ball", "a dog", "grass"]]
    found = plugs.call(made, "scores", shown, texts)
    tags = plugs.call(made, "tags", shown)
    names = ["dog", "red ball", "grass"]
    classes = np.asarray(clip.embed_phrases(weights, [f"a {name}" for name in names]))
    for picture, own, scores, best in zip(shown, texts, found, tags, strict=True):
        square = np.asarray(Image.fromarray(picture.pixels).resize((64, 64), Image.Resampling.BICUBIC))
        image = np.asarray(clip.embed_image(weights, jnp.asarray(square[None])))[0]
        expected = [float(image @ np.asarray(clip.embed_phrases(weights, [text]))[0]) for text in own]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert best == [names[k] for k in np.argsort(-(classes @ image))[:2]]
    with pytest.raises(UserError, match="needs classes="):
        make_plug({"name": "towers"}, "tags").tags(shown)


def test_scores_of_siglip_are_those_of_hugging_face(monkeypatch, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    one = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    text = dict(
        one, vocab_size=60, max_position_embeddings=9, projection_size=32, bos_token_id=1, eos_token_id=1
    )
    config = transformers.SiglipConfig(
        text_config=text, vision_config=dict(one, image_size=32, patch_size=16)
    )
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    sizes = dict(width=32, depth=1, heads=2, mlp_dim=64, patch=16, grid=(2, 2))
    monkeypatch.setitem(vit.PRESETS, "tiny_siglip", vit.PRESETS["siglip_vitb16"] | sizes)
    monkeypatch.setattr(towers, "pixels_of", lambda _: HALF)
    tiny = SiglipText(vocab_size=60, width=32, layers=1, heads=2, length=9, embed_dim=32, mlp_dim=64)
    monkeypatch.setattr(towers, "text_tower", lambda _: tiny)
    ids = lambda texts: np.array([[len(text) % 50 + k for k in range(9)] for text in texts], np.int32)
    monkeypatch.setattr(
        towers, "load_tokenizer", lambda *_: lambda texts: (ids(texts), np.ones((len(texts), 9), bool))
    )
    made = make_plug(
        {"name": "towers", "model": str(tmp_path), "tower": "tiny_siglip", "text": "tiny"}, "scores"
    )
    shown = [Picture(p.name, np.ascontiguousarray(p.pixels[:32, :32])) for p in pictures()]
    said = ["a dog", "a red ball"]
    found = plugs.call(made, "scores", shown, [said, said])
    pixels = torch.from_numpy(np.stack([p.pixels for p in shown]) / 127.5 - 1).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(ids(said)).long(), pixel_values=pixels)
    np.testing.assert_allclose(found, (out.image_embeds @ out.text_embeds.T).numpy(), atol=1e-4)


def test_the_command_runs_families_together(tmp_path, capsys):
    """Two detectors, and one model for captions of images and regions, from images to the files of all formats."""
    torch = require("torch")
    require("torchvision")
    torch.manual_seed(1)
    folder = {
        name: tiny_models.FAMILIES[name](tmp_path / name)
        for name in ("blip2", "rt_detr", "owlv2", "sam2", "mask2former")
    }
    (tmp_path / "photos").mkdir()
    for picture in pictures():
        Image.fromarray(picture.pixels).save(tmp_path / "photos" / f"{picture.name}.png")
    said = f"blip2,model={folder['blip2']},longest=4,prompts=a photo of;this is"
    given = [
        f"--images={tmp_path / 'photos'}",
        f"--out={tmp_path / 'out'}",
        f"--captions={said}",
        f"--region_captions={said}",
        f"--boxes=rt_detr,model={folder['rt_detr']},threshold=0.0",
        f"--boxes=owlv2,model={folder['owlv2']},labels=sky; ball",
        f"--masks=sam2,model={folder['sam2']}",
        f"--stuff=mask2former,model={folder['mask2former']},threshold=0.1,things=1",
        "--box_score=0",
        "--stability=0",
    ]
    assert command.main(given) == 0
    assert "2 images annotated, 0 before, 0 failed" in capsys.readouterr().out
    source = make_source(dict(name="folder", data_dir=str(tmp_path / "out")))
    told = make_source(
        dict(
            name="region_json",
            data_dir=str(tmp_path / "out/regions"),
            images=str(tmp_path / "out/images"),
            paths=dict(tags=""),
        )
    )
    assert [source[k]["image_id"] for k in range(2)] == ["tall", "wide"] and "grass" in source.classes.index
    assert all(len(told[k]["boxes"]) and any(told[k]["region_captions"]) for k in range(2))
    assert all(source[k]["segments"].any() for k in range(2))


def test_every_plug_says_its_class_licence_and_memory():
    for name, where in plugs.PLUGS.items():
        module = where.partition(":")[0].split(".")[-1]
        text = (Path(plugs.__file__).parent / "plugs" / f"{module}.py").read_text()
        said = text.partition('"""')[2].partition('"""')[0]
        assert " GB" in said and any(x in said for x in ("MIT", "Apache-2.0")), name
