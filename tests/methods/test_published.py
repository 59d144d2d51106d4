"""Published towers as segmenters, with random weights in the published files, against PyTorch put together again."""

import json
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ovseg_jax import export, predict
from ovseg_jax.configs import clip_dense, openseg
from ovseg_jax.data.windows import Sliding
from ovseg_jax.decisions.published import protocol
from ovseg_jax.errors import UserError
from ovseg_jax.inference.export import export_model
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.kernels import cpu_attention
from ovseg_jax.kernels.cpu_convs import fast_on_cpu
from ovseg_jax.methods import published
from ovseg_jax.methods.clip_dense import LAST, ClipDense
from ovseg_jax.methods.openseg import OpenSeg
from ovseg_jax.models.backbones import BACKBONES
from ovseg_jax.models.text_towers import PRESETS as TEXTS
from ovseg_jax.pretrained import load as weights
from ovseg_jax.pretrained.files import write_safetensors
from ovseg_jax.pretrained.published import HALF, UNIT
from ovseg_jax.pretrained.stated import stated_pixels
from ovseg_jax.towers import clip
from ovseg_jax.towers.clip import SPACE
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.tokenizers import BPE_FILE
from ovseg_jax.vocab.vectors import ClassVectors
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.pretrained import test_tips as tips

W, HEADS, DEPTH = 32, 2, 3
NAMES = ["a red ball", "grass", "the sea", "sky above", "an old wall"]
# Our patches are 16, TIPSv2's 14: sizes in patches, one not square.
SIZES = [(4, 4), (6, 6), (3, 7)]
MEAN, STD = (0.4, 0.5, 0.45), (0.3, 0.25, 0.2)
HF: dict[str, Any] = dict(
    hidden_size=W, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=HEADS
)


def attention(q, k, v, last):
    """[b h n d], in each way of `LAST`."""
    torch = require("torch")
    if last == "value":
        return v
    soft = lambda a, b: torch.softmax(a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5, -1) @ v
    return {
        "sclip": lambda: soft(q, q) + soft(k, k),
        "clearclip": lambda: soft(q, q),
        "": lambda: soft(q, k),
    }[last]()


def last_block(x, norm1, norm2, project, out, mlp, last):
    """The last block of a pre-norm tower; the class token's own row of the result is not used."""
    y = norm1(x)
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in project(y))
    mixed = out(attention(q, k, v, last).transpose(1, 2).flatten(2))
    if last == "clearclip":
        return mixed
    x = x + mixed
    return x + mlp(norm2(x))


def pretrained_tokens(folder, clip):
    """A tokeniser's files: CLIP's own, or a small SentencePiece."""
    if clip:
        file = require("open_clip").__file__.replace("__init__.py", BPE_FILE)
        (folder / BPE_FILE).write_bytes(Path(file).read_bytes())
        return
    texts = [t.format(n) for n in NAMES for t in TEMPLATES] * 20
    require("sentencepiece").SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=False,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        eos_piece="<eos>",
        bos_id=-1,
        minloglevel=2,
    )


TEMPLATES = ("a photo of a {}.", "art of the {}.")


class Clip:
    """transformers' CLIPModel."""

    name, patch = "clip_vitb16", 16
    text: ClassVar[dict[str, Any]] = dict(width=W, layers=2, heads=HEADS, mlp_dim=48)
    image: ClassVar[dict[str, Any]] = dict(width=W, depth=DEPTH, heads=HEADS, mlp_dim=48, grid=(4, 4))

    def __init__(self, folder):
        transformers = require("transformers")
        text = HF | dict(num_hidden_layers=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=0)
        vision = HF | dict(image_size=64, patch_size=16)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        self.model = reference.randomise(transformers.CLIPModel(config))
        self.model.save_pretrained(folder)
        self.image, self.text = self.image | dict(embed_dim=24), self.text | dict(embed_dim=24)
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(image_mean=MEAN, image_std=STD)))
        pretrained_tokens(folder, True)

    def patches(self, pixels, last):
        v = self.model.vision_model
        x = v.pre_layrnorm(v.embeddings(pixels, interpolate_pos_encoding=True))
        for layer in v.encoder.layers[:-1]:
            x = first(layer(x, None))
        end = v.encoder.layers[-1]
        a = end.self_attn
        project = lambda y: (a.q_proj(y), a.k_proj(y), a.v_proj(y))
        x = last_block(x, end.layer_norm1, end.layer_norm2, project, a.out_proj, end.mlp, last)
        return self.model.visual_projection(v.post_layernorm(x[:, 1:]))

    def texts(self, ids, valid):
        return self.model.get_text_features(input_ids=ids).pooler_output


class OpenClip(Clip):
    """open_clip's CLIP."""

    name = "openclip_vitb16"
    image: ClassVar[dict[str, Any]] = Clip.image | dict(embed_dim=24)
    text: ClassVar[dict[str, Any]] = Clip.text | dict(embed_dim=24)

    def __init__(self, folder):
        open_clip = require("open_clip")
        vision = dict(image_size=64, patch_size=16, width=W, layers=DEPTH, head_width=16, mlp_ratio=1.5)
        text = dict(width=W, layers=2, heads=HEADS, mlp_ratio=1.5)
        self.model = reference.randomise(open_clip.CLIP(24, vision, text))
        arrays = {name: x.detach().numpy() for name, x in self.model.state_dict().items()}
        write_safetensors(folder / "open_clip_model.safetensors", arrays)
        config = dict(embed_dim=24, vision_cfg=vision, text_cfg=text)
        config = dict(model_cfg=config, preprocess_cfg=dict(mean=MEAN, std=STD))
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        pretrained_tokens(folder, True)

    def patches(self, pixels, last):
        torch, v = require("torch"), self.model.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        table = v.positional_embedding
        size = tuple(side // 16 for side in pixels.shape[2:])
        rest = table[1:].reshape(1, 4, 4, W).permute(0, 3, 1, 2)
        if size != (4, 4):
            rest = torch.nn.functional.interpolate(
                rest, size, mode="bicubic", antialias=True, align_corners=False
            )
        x = x + rest.flatten(2).transpose(1, 2)
        x = torch.cat([(v.class_embedding + table[0]).expand(len(x), 1, -1), x], 1)
        x = v.ln_pre(x)
        for block in v.transformer.resblocks[:-1]:
            x = block(x)
        end = v.transformer.resblocks[-1]
        project = lambda y: torch.nn.functional.linear(
            y, end.attn.in_proj_weight, end.attn.in_proj_bias
        ).chunk(3, -1)
        x = last_block(x, end.ln_1, end.ln_2, project, end.attn.out_proj, end.mlp, last)
        return v.ln_post(x[:, 1:]) @ v.proj

    def texts(self, ids, valid):
        return self.model.encode_text(ids)


class Siglip(Clip):
    """transformers' SiglipModel, whose pooling sees a patch alone."""

    name = "siglip2_b16"
    image: ClassVar[dict[str, Any]] = dict(width=W, depth=DEPTH, heads=HEADS, mlp_dim=48, grid=(4, 4))
    text: ClassVar[dict[str, Any]] = dict(Clip.text, vocab_size=80, embed_dim=W)

    def __init__(self, folder):
        transformers = require("transformers")
        act = dict(hidden_act="gelu_pytorch_tanh")
        text = HF | act | dict(num_hidden_layers=2, vocab_size=80, max_position_embeddings=64)
        vision = HF | act | dict(image_size=64, patch_size=16)
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        self.model = reference.randomise(transformers.SiglipModel(config))
        self.model.save_pretrained(folder)
        pretrained_tokens(folder, False)

    def patches(self, pixels, last):
        v = self.model.vision_model
        x = v(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return v.head(x.reshape(-1, 1, W)).reshape(x.shape)

    def texts(self, ids, valid):
        return self.model.get_text_features(input_ids=ids).pooler_output


class Tips(Clip):
    """transformers' Tipsv2Model."""

    name, patch = "tipsv2_b14", 14
    image: ClassVar[dict[str, Any]] = dict(width=W, depth=DEPTH, heads=HEADS, mlp_dim=48, grid=(4, 4))
    text: ClassVar[dict[str, Any]] = dict(vocab_size=60, width=W, layers=2, heads=HEADS, mlp_dim=48)

    def __init__(self, folder):
        self.model = tips.original(length=64)
        tips.save(self.model, "joint", folder, False)
        (folder / "preprocessor_config.json").write_text(json.dumps(dict(do_normalize=False)))
        pretrained_tokens(folder, False)

    def patches(self, pixels, last):
        x = pixels.permute(0, 2, 3, 1).numpy()
        torch = require("torch")
        return torch.from_numpy(tips.values_of(self.model, x)).flatten(1, 2)

    def texts(self, ids, valid):
        return self.model.text_model(ids, attention_mask=valid).pooler_output


class TipsJax(Tips):
    """The same as the published JAX files, whose GELU is the approximation."""

    def __init__(self, folder):
        self.model = tips.original(length=64, jax_code=True)
        tips.save(self.model, "jax", folder, False)
        pretrained_tokens(folder, False)


class Eva(Clip):
    """timm's EVA-02-CLIP with open_clip's text tower, in the names of open_clip's files."""

    name = "eva02_clip_b16"
    image: ClassVar[dict[str, Any]] = dict(width=W, depth=DEPTH, heads=HEADS, hidden=48, grid=4, embed_dim=24)
    text: ClassVar[dict[str, Any]] = Clip.text | dict(embed_dim=24)

    def __init__(self, folder):
        torch, timm, open_clip = require("torch"), require("timm"), require("open_clip")
        self.model = reference.randomise(
            timm.models.eva.Eva(
                img_size=64, patch_size=16, embed_dim=W, depth=DEPTH, num_heads=HEADS, mlp_ratio=1.5,
                num_classes=24, global_pool="token", use_rot_pos_emb=True, ref_feat_shape=(16, 16),
                swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False, dynamic_img_size=True,
            )
        )  # fmt: skip
        sizes = dict(width=W, heads=HEADS, layers=2, mlp_ratio=1.5, output_dim=24)
        self.text_model = reference.randomise(open_clip.transformer.TextTransformer(**sizes))
        both = (("visual.trunk.", self.model), ("text.", self.text_model))
        arrays = {p + name: x.detach().numpy() for p, m in both for name, x in m.state_dict().items()}
        write_safetensors(folder / "open_clip_model.safetensors", arrays)
        vision = dict(image_size=64, timm_model_name="eva02_base_patch16_clip_224")
        config = dict(embed_dim=24, vision_cfg=vision, text_cfg=dict(width=W, layers=2, heads=HEADS))
        config = dict(model_cfg=config, preprocess_cfg=dict(mean=MEAN, std=STD))
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        pretrained_tokens(folder, True)
        self.start = torch.nn.Identity()  # before the blocks: a place for hooks

    def patches(self, pixels, last):
        torch, v = require("torch"), self.model
        grid = tuple(side // 16 for side in pixels.shape[2:])
        # As BAAI interpolated the table; timm itself would blur it.
        table = v.pos_embed[:, 1:].reshape(1, 4, 4, W).permute(0, 3, 1, 2)
        table = torch.nn.functional.interpolate(table, grid, mode="bicubic").flatten(2).transpose(1, 2)
        x = v.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + table
        x = self.start(torch.cat([(v.cls_token + v.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1))
        rotary = v.rope.get_embed(shape=grid)[: x.shape[1] - 1]
        for block in v.blocks[:-1]:
            x = block(x, rotary)
        end, turn = v.blocks[-1], require("timm").layers.apply_rot_embed_cat
        a = end.attn

        def project(y):
            each = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            turned = lambda x: torch.cat([each(x)[:, :, :1], turn(each(x)[:, :, 1:], rotary)], 2)
            joined = lambda x: x.transpose(1, 2).flatten(2)
            return joined(turned(a.q_proj(y))), joined(turned(a.k_proj(y))), a.v_proj(y)

        x = last_block(x, end.norm1, end.norm2, project, lambda y: a.proj(a.norm(y)), end.mlp, last)
        return v.head(v.norm(x[:, 1:]))

    def texts(self, ids, valid):
        return self.text_model(ids)


def first(x):
    return x[0] if isinstance(x, tuple) else x


KINDS = {kind.name: kind for kind in (Clip, OpenClip, Eva, Siglip, Tips)} | {"tipsv2 jax": TipsJax}


_SAVED: dict[str, Any] = {}


def saved(name):
    """The reference and the folder with its files, made once for all tests."""
    if name not in _SAVED:
        keep = tempfile.TemporaryDirectory()
        _SAVED[name] = KINDS[name](Path(keep.name)), keep
    return _SAVED[name][0], Path(_SAVED[name][1].name)


def made(name, features="value"):
    """The reference, and our method with the weights in the folder."""
    kind, folder = saved(name)
    config = published.dense_config(kind.name, str(folder), features=features)
    config.towers.image.update(kind.image)
    config.towers.text.update(kind.text)
    config.towers.image_size = 4 * kind.patch
    config.dense = dict(features=features, prompt=TEMPLATES)
    method = ClipDense(config, WordList([]), ClassList((), (), ()))
    return kind, method, {"params": {}, **method.pretrained()}


def normalised(kind, method, image):
    torch = require("torch")
    mean, std = (torch.tensor(tuple(method.config.towers[k])) for k in ("mean", "std"))
    return ((torch.from_numpy(np.array(image)) / 255 - mean) / std).permute(0, 3, 1, 2)


def text_features(kind, method):
    torch = require("torch")
    unit = torch.nn.functional.normalize
    rows = []
    for name in NAMES:
        ids, valid = method.tokenizer([t.format(name) for t in TEMPLATES])
        with torch.no_grad():
            rows.append(
                unit(
                    unit(kind.texts(torch.tensor(ids).long(), torch.tensor(valid).long()), dim=-1).mean(0),
                    dim=0,
                )
            )
    return torch.stack(rows)


def apart(features):
    """Texts that tell places apart, of features [n d]; those of random weights nearly all point one way."""
    chosen = features[:: len(features) // len(NAMES)][: len(NAMES)]
    return require("torch").nn.functional.normalize(chosen - features.mean(0), dim=-1)


def vectors(text):
    count = len(NAMES)
    classes = ClassList(tuple((name,) for name in NAMES), tuple(range(count)), (False,) * count)
    return ClassVectors(classes, text.numpy())


@pytest.mark.parametrize(
    ("name", "features"),
    [(name, f) for name in ("clip_vitb16", "eva02_clip_b16") for f in LAST]
    + [
        ("openclip_vitb16", "sclip"),
        ("openclip_vitb16", "clearclip"),
        ("siglip2_b16", "value"),
        ("tipsv2_b14", "value"),
        ("tipsv2 jax", "value"),
    ],
)
def test_dense_features_equal_the_published_models(name, features, monkeypatch):
    """In general, and in the form for a CPU with a batch of large images."""
    torch = require("torch")
    kind, method, variables = made(name, features)
    rng = np.random.default_rng(0)
    predict = jax.jit(method.predict)
    for size in SIZES:
        height, width = (side * kind.patch for side in size)
        image = rng.integers(0, 256, (2, height, width, 3), np.uint8)
        with torch.no_grad():
            want = kind.patches(normalised(kind, method, image), LAST[features]).numpy()
        found = predict(variables, jnp.asarray(image), jnp.array([[height, width]] * 2)).pixels[SPACE]
        error = reference.relative_error(found, want.reshape(found.shape))
        print(f"{name} {features} {size}: {error:.1e}")
        assert error < 1e-4
    for place, value in ((cpu_attention, "LEAST"), (clip, "MANY")):
        monkeypatch.setattr(place, value, 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    predict = jax.jit(fast_on_cpu(method.predict))
    found = predict(variables, jnp.asarray(image), jnp.array([[height, width]] * 2)).pixels[SPACE]
    assert reference.relative_error(found, want.reshape(found.shape)) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_texts_equal_the_published_models(name):
    kind, method, variables = made(name)
    error = reference.relative_error(
        method.embed_text(variables, NAMES)[SPACE], text_features(kind, method).numpy()
    )
    print(f"{name} texts: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("name", [name for name in KINDS if name != "tipsv2 jax"])
def test_a_whole_photograph_is_labelled_as_by_pytorch(name):
    """Of an image that is not square: what the canvas has beside it changes nothing."""
    torch = require("torch")
    kind, method, variables = made(name)
    canvas = 6 * kind.patch
    method.config.data.image_size = canvas
    segmenter = Segmenter(method, variables, method.config)
    image = photograph(2 * canvas // 3, canvas)
    # Positions are those of the canvas: the part of the image is cut out.
    with torch.no_grad():
        want = cut_out(kind, method, image, canvas)
        text = apart(want.flatten(1).T)
        scores = torch.einsum("td,dhw->thw", text, want)
        size = image.shape[:2]
        labels = torch.nn.functional.interpolate(scores[None], size, mode="bilinear")[0].argmax(0).numpy()
    result = segmenter.segment(image, vectors(text))
    assert (result.label_map == labels).mean() > 0.999 and len(np.unique(labels)) > 1
    assert (result.label_map >= 0).all()


@pytest.mark.parametrize(
    ("name", "features"),
    [(name, f) for name in ("openclip_vitb16", "eva02_clip_b16") for f in LAST]
    + [("siglip2_b16", "value"), ("tipsv2_b14", "value"), ("tipsv2 jax", "sclip")],
)
def test_an_exported_tower_labels_pixels_as_ours(name, features, tmp_path):
    """Of a photograph that is not square, by the same texts; those by the exported text tower are compared too."""
    torch, load = require("torch"), require("ovseg_jax.torch").load
    kind, method, variables = made(name, features)
    method.config.data.image_size = canvas = 6 * kind.patch
    segmenter = Segmenter(method, variables, method.config)
    export_model(lambda: segmenter, "torch", str(tmp_path))
    loaded = load(tmp_path)
    image = photograph(canvas // 2, canvas)
    out = loaded.net(torch.from_numpy(image.transpose(2, 0, 1))[None], torch.tensor([[len(image), canvas]]))
    text = apart(torch.nn.functional.normalize(out.pixel_embed[0].flatten(1).T, dim=-1)).detach()
    ours, theirs = segmenter.segment(image, vectors(text)), loaded.segment(image, NAMES, vectors=text)
    same = (ours.label_map == theirs.label_map).mean()
    print(f"{name} {features}: {same:.5f} of the pixels")
    assert same > 0.999 and len(np.unique(ours.label_map)) > 1 and (theirs.label_map >= 0).all()
    error = reference.relative_error(method.embed_text(variables, NAMES)[SPACE], loaded.embed(NAMES).numpy())
    assert error < 1e-4
    with pytest.raises(UserError, match="this model has no classes of its own: give labels"):
        loaded.segment(image)


@pytest.mark.usefixtures("quick_onnx")
def test_a_published_tower_is_exported_to_onnx(tmp_path, monkeypatch):
    """By the command, with two images of a batch that fill the canvas in different ways."""
    torch, onnx, runtime = require("torch"), require("onnx"), require("onnxruntime")
    require("onnxscript")
    load = require("ovseg_jax.torch").load
    _, method, variables = made("eva02_clip_b16", "sclip")
    method.config.data.image_size = 64
    found = Segmenter(method, variables, method.config)
    monkeypatch.setattr(Segmenter, "from_pretrained", lambda name, **options: found)
    assert export.main(["--model=eva02_clip_b16", "--to=onnx", f"--out={tmp_path}"]) == 0
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8)
    size = np.array([[64, 64], [40, 64]], np.int32)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (pixels,) = session.run(["pixel_embed"], {"image": image, "image_size": size})
    with torch.no_grad():
        want = load(tmp_path).net(torch.from_numpy(image), torch.from_numpy(size)).pixel_embed.numpy()
    assert reference.relative_error(pixels, want) < 1e-4


def test_features_of_names_are_kept_and_the_text_tower_stays_closed(tmp_path, monkeypatch):
    """The second time the files of its words are read, but neither its weights nor its tokeniser."""
    kind, folder = saved("clip_vitb16")
    whole = published.dense_config

    def tiny(*arguments):
        config = whole(*arguments)
        config.towers.image.update(kind.image)
        config.towers.text.update(kind.text)
        config.towers.image_size, config.data.image_size = 4 * kind.patch, 6 * kind.patch
        return config

    monkeypatch.setattr(published, "dense_config", tiny)
    image, labels = photograph(60, 90), "a red ball, ball; grass; the sea"
    load = lambda **options: Segmenter.from_pretrained(kind.name, folder, **options)
    want = load().segment(image, labels)
    first = load(texts=tmp_path).segment(image, labels)
    np.testing.assert_array_equal(first.confidence, want.confidence)
    (file,) = tmp_path.iterdir()

    def never(self):
        raise AssertionError("a text was embedded")

    with monkeypatch.context() as patch:
        patch.setattr("ovseg_jax.towers.clip.Clip.tokenizer", property(never))
        segmenter = load(texts=tmp_path)
        assert "text" not in segmenter.variables["towers"]
        again = segmenter.segment(image, labels)
        np.testing.assert_array_equal(again.confidence, want.confidence)
        np.testing.assert_array_equal(again.label_map, want.label_map)
        other = segmenter.segment(image, "grass; a red ball")
        assert set(other.labels) <= {"grass", "a red ball"}
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(load(texts=tmp_path).segment(image, labels).confidence, want.confidence)
    segmenter, read, whole_load = load(texts=tmp_path), [], weights.load
    monkeypatch.setattr(weights, "load", lambda *a, **k: read.append(1) or whole_load(*a, **k))
    for words in ("sky above; grass", "a tree; grass"):
        segmenter.segment(image, words)
    assert len(read) == 1  # the text tower, once for all new names
    assert len(list(tmp_path.iterdir())) == 1


def photograph(height, width):
    small = np.random.default_rng(5).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def cut_out(kind, method, image, canvas):
    """Unit features [d h w] of the image's part of the canvas, without attention to the rest, by our own tower.

    No published code masks a canvas: the reference drops the tokens beyond the image before the first block.
    """
    torch = require("torch")
    height = image.shape[0] // kind.patch
    padded = np.zeros((1, canvas, canvas, 3), np.uint8)
    padded[0, : image.shape[0]] = image
    pixels = normalised(kind, method, padded)
    kept = height * (canvas // kind.patch)
    hooks = []
    if isinstance(kind, Eva):
        blocks = [kind.start]
    elif isinstance(kind, OpenClip):
        blocks = kind.model.visual.transformer.resblocks
    else:
        encoder = kind.model.vision_model.encoder
        blocks = getattr(encoder, "layers", getattr(encoder, "layer", None))
    front = {"siglip2_b16": 0, "tipsv2_b14": 2}.get(kind.name, 1)
    cut = lambda module, inputs: (inputs[0][:, : front + kept], *inputs[1:])
    hooks.append(blocks[0].register_forward_pre_hook(cut))
    try:
        if isinstance(kind, Tips):
            found = tips.value_tokens(kind.model, pixels)
        else:
            found = kind.patches(pixels, "value")
    finally:
        for hook in hooks:
            hook.remove()
    found = torch.nn.functional.normalize(found[0], dim=-1)
    return found.T.reshape(-1, height, canvas // kind.patch)


@pytest.mark.parametrize(
    ("name", "by"), [("tipsv2_b14", "tipsv2"), ("clip_vitb16", "sclip"), ("clip_vitb16", "clearclip")]
)
def test_windows_are_those_of_the_published_code(name, by):
    """google-deepmind/tips, pytorch/TIPS_zeroshot_segmentation.ipynb; wangf3014/SCLIP and mc-lan/ClearCLIP."""
    torch = require("torch")
    kind, method, variables = made(name, "value" if by == "tipsv2" else by)
    rules = protocol(by)
    side, stride, short = rules["image_size"], rules["windows"]["stride"], rules["windows"]["short"]
    method.config.data.image_size = side
    image = photograph(300, 401)
    size = (short, short * 401 // 300) if by == "tipsv2" else (short, round(short * 401 / 300))
    if by == "tipsv2":
        resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    else:  # OpenCV's resize, which the tests of windows compare
        cut, resized = Sliding.of(rules["windows"]).cut(image, side), np.zeros((*size, 3), np.uint8)
        for window, (y, x), (h, w) in zip(cut.image, cut.window_at, cut.image_size, strict=True):
            resized[y : y + h, x : x + w] = window[:h, :w]
    pixels = normalised(kind, method, resized[None])
    last = LAST[method.config.dense.features]
    with torch.no_grad():
        text = apart(kind.patches(pixels[..., :side, :side], last)[0])
    total, count = torch.zeros((len(NAMES), *size)), torch.zeros(size)
    for y in range(max(size[0] - side + stride - 1, 0) // stride + 1):
        for x in range(max(size[1] - side + stride - 1, 0) // stride + 1):
            bottom, right = min(y * stride + side, size[0]), min(x * stride + side, size[1])
            at = np.s_[bottom - side : bottom, right - side : right]
            with torch.no_grad():
                own = kind.patches(
                    pixels[(slice(None), slice(None), *at)], LAST[method.config.dense.features]
                )
            own = torch.nn.functional.normalize(own[0], dim=-1) @ text.T
            own = own.T.reshape(1, len(NAMES), side // kind.patch, side // kind.patch)
            own = torch.nn.functional.interpolate(own, (side, side), mode="bilinear")[0]
            total[(slice(None), *at)] += own.softmax(0) if by == "tipsv2" else own
            count[at] += 1
    scores = torch.nn.functional.interpolate((total / count)[None], image.shape[:2], mode="bilinear")[0]
    want = scores.argmax(0).numpy()
    segmenter = Segmenter(method, variables, method.config)
    same = (segmenter.segment(image, vectors(text), protocol=by).label_map == want).mean()
    print(f"{name} by the protocol {by}: {same:.5f} of the pixels")
    assert same > 0.999 and len(np.unique(want)) > 1


def test_pixels_are_those_of_the_files(tmp_path):
    assert stated_pixels(tmp_path) is None
    write = lambda name, **content: (tmp_path / name).write_text(json.dumps(content))
    write("open_clip_config.json", model_cfg={}, preprocess_cfg=dict(mean=MEAN, std=STD))
    assert stated_pixels(tmp_path) == (MEAN, STD)
    write("preprocessor_config.json", image_mean=MEAN, image_std=STD, do_normalize=False)
    assert stated_pixels(tmp_path) == UNIT
    write("preprocessor_config.json", image_mean=[1, 1, 1], image_std=[1, 1, 1], rescale_factor=2 / 255)
    np.testing.assert_allclose(stated_pixels(tmp_path), HALF)
    write("preprocessor_config.json", image_mean=MEAN, image_std=STD, do_rescale=False)
    with pytest.raises(UserError, match="do_rescale is false"):
        stated_pixels(tmp_path)


def test_what_cannot_be_is_one_sentence(tmp_path):
    for arguments, message in (
        (dict(name="tipsv3"), "the model 'tipsv3' is not one of tipsv2_b14, tipsv2_l14"),
        (
            dict(name="siglip2_base_NaFlex"),
            "'siglip2_base_NaFlex' is left out: only SigLIP 2's models of fixed",
        ),
        (dict(name="dino.txt"), "'dino.txt' is left out: transformers has no class for dino.txt"),
        (dict(name="dinov2_vitl14_dinotxt"), "is left out: transformers has no class"),
        (dict(name="tipsv2_b14", trust=0.5), "trust=0.5 has no effect on tipsv2_b14"),
        (
            dict(name="tipsv2_b14", features="pseudo_masks"),
            "features='pseudo_masks' is not one of activation",
        ),
        (
            dict(name="fcclip_convnext_l", features="sclip"),
            "features=sclip has no effect on fcclip_convnext_l",
        ),
        (dict(name="tipsv2_b14", weights=str(tmp_path / "x")), "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            Segmenter.from_pretrained(**arguments)


def test_every_model_of_the_table_can_be_built():
    assert all(model.text in TEXTS for model in published.PUBLISHED.values())
    for line, (name, model) in zip(
        published.listed().splitlines()[1:], published.PUBLISHED.items(), strict=True
    ):
        assert line.startswith(name) and model.licence in line and line.endswith(published.place_of(name))
        if model.protocol:
            assert (
                published._native(model.image or name) % 14 == 0
                or published._native(model.image or name) % 16 == 0
            )
            protocol(model.protocol)


def test_the_config_takes_every_published_tower(tmp_path):
    """With the fields that `predict --model` gives it, whether its files are on this disk or not."""
    for name, model in published.PUBLISHED.items():
        if name == "fcclip_convnext_l":
            continue
        arg = f"data=sets,eval_sets=s,towers={name}"
        given = clip_dense.get_config(f"{arg},weights={tmp_path}")
        want = published.dense_config(name, str(tmp_path))
        want.towers.tokenizer = ""  # beside the weights
        assert given.towers == want.towers and given.dense == want.dense, name
        remote = clip_dense.get_config(arg).towers
        assert remote.init == published.place_of(name) and remote.image == given.towers.image
        assert remote.logit_scale == model.scale
    weights = saved("tipsv2 jax")[1]
    given = clip_dense.get_config(f"data=sets,eval_sets=s,towers=tipsv2_b14,weights={weights}").towers
    assert given.text.epsilon == 1e-6 and given.image.activation == "gelu_tanh"
    with pytest.raises(UserError, match="no published weights are known for 'fcclip_convnext_l'"):
        clip_dense.get_config("data=sets,eval_sets=s,towers=fcclip_convnext_l")


@pytest.mark.parametrize("name", [name for name in KINDS if name != "tipsv2 jax"])
def test_a_published_tower_is_a_backbone_of_openseg(name, monkeypatch):
    kind, method, variables = made(name)
    config = openseg.get_config(f"data=folder,data_dir=x,backbone={kind.name},weights={saved(name)[1]}")
    tower = config.model.backbone.name
    module, fields = BACKBONES[tower]
    monkeypatch.setitem(BACKBONES, tower, (module, fields | kind.image))
    small = dict(width=16, num_queries=3, position_grid=4, decoder_layers=1, head_convs=1, dtype="float32")
    config.model.update(small)
    config.data.image_size = 96
    config.text = dict(learned=True, vectors="")
    if name in ("clip_vitb16", "openclip_vitb16", "eva02_clip_b16"):
        with pytest.raises(UserError, match=r"the mean of pixels is \[0.4, 0.5, 0.45\], but this config has"):
            OpenSeg(config, WordList(["a"]), ClassList((), (), ())).pretrained()
    config.model.update({key: method.config.towers[key] for key in ("mean", "std")})
    student = OpenSeg(config, WordList(["a"]), ClassList((), (), ()))
    found = student.pretrained()["params"]["image"]["backbone"]["tower"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 96, 64, 3)), jnp.float32)
    tokens = lambda module, weights: np.asarray(jax.jit(module.apply)({"params": weights}, x).tokens)
    ours = tokens(student.net.backbone.tower, found)
    if kind.patch == 16:
        np.testing.assert_array_equal(ours, tokens(method.clip.image, variables["towers"]["image"]["params"]))
    assert ours.shape == (1, 6, 4, W) and np.ptp(ours)


def shrink(monkeypatch):
    """Makes the published "tipsv2_b14" as small as `Tips`."""
    whole = published.dense_config

    def small(*arguments):
        config = whole(*arguments)
        config.towers.image.update(Tips.image)
        config.towers.text.update(Tips.text)
        config.towers.image_size, config.data.image_size = 56, 84
        return config

    monkeypatch.setattr(published, "dense_config", small)


def test_the_command_segments_by_a_published_model(tmp_path, monkeypatch, capsys):
    """As by a run: label maps, JSON, features, tiles; a request that makes no sense is one sentence."""
    weights = saved("tipsv2_b14")[1]
    shrink(monkeypatch)
    Image.fromarray(photograph(60, 90)).save(tmp_path / "photo.png")
    flags = ["--model=tipsv2_b14", f"--weights={weights}", f"--images={tmp_path / 'photo.png'}"]
    flags += ["--labels=a red ball; grass,lawn", f"--out={tmp_path / 'out'}"]
    assert predict.main([*flags, "--features"]) == 0
    labels = np.asarray(Image.open(tmp_path / "out" / "photo.labels.png"))
    assert labels.shape == (60, 90) and labels.min() >= 1
    with np.load(tmp_path / "out" / "photo.features.npz") as features:
        assert features["pixels"].shape[-1] == W
    assert predict.main([*flags[:-1], f"--out={tmp_path / 'tiles'}", "--tile=50"]) == 0
    record = json.loads((tmp_path / "tiles" / "photo.json").read_text())
    assert record["segments"]
    for wrong, message in (
        (flags[1:], "give either --checkpoint, a run, or --model"),
        (["--checkpoint=x", *flags[1:]], "--weights needs --model"),
        ([*flags, "--proposals=x"], "--proposals needs --checkpoint"),
        (["--model=tipsv3", *flags[1:]], "the model 'tipsv3' is not one of"),
    ):
        capsys.readouterr()
        assert predict.main(wrong) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.parser().parse_args(["--model=list"])
    assert "tipsv2_l14" in capsys.readouterr().out
