"""FC-CLIP end to end: a published checkpoint's names, against open_clip and transformers' Mask2Former put together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ovseg_jax.configs import fcclip as configs
from ovseg_jax.data.windows import Whole
from ovseg_jax.decisions.maps import vocabulary_of
from ovseg_jax.decisions.rules import Argmax, Instances, Panoptic, decide
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import check_config
from ovseg_jax.experiment.run import train
from ovseg_jax.inference import export
from ovseg_jax.inference.segmenter import Segmenter
from ovseg_jax.methods import fcclip
from ovseg_jax.methods.fcclip import FCClip
from ovseg_jax.methods.trunks import prepared
from ovseg_jax.parallel.sharding import path_name
from ovseg_jax.pretrained.files import read_arrays
from ovseg_jax.pretrained.published import CLIP
from ovseg_jax.vocab.classes import ClassList
from ovseg_jax.vocab.templates import VILD
from ovseg_jax.vocab.words import WordList
from tests import reference
from tests.extras import require
from tests.methods.test_groupvit_method import VOCAB, pieces
from tests.models.test_convnext import randomise as randomise_clip
from tests.segments import assert_same_segments

QUERIES, WIDTH, LAYERS, EMBED, LENGTH = 12, 32, 4, 24, 48
SIZE = (64, 96)
TRAINED = ClassList((("dog", "puppy"), ("sky",), ("cat",)), (1, 2, 3), (True, False, True))
# One class was trained by its second name, one is new.
ASKED = ClassList(
    (("hound", "puppy"), ("sea", "water"), ("sky", "cloud"), ("cat",)),
    (1, 2, 3, 4),
    (True, False, False, True),
)


def config(**changes):
    found = ConfigDict(
        dict(
            method="fcclip",
            steps=0,
            batch_size=2,
            towers=dict(
                image=dict(name="convnext", depths=(1, 1, 2, 1), width=8, embed_dim=EMBED, head_hidden=48),
                text=dict(
                    name="clip",
                    vocab_size=VOCAB,
                    length=LENGTH,
                    width=16,
                    heads=2,
                    layers=1,
                    embed_dim=EMBED,
                    activation="gelu",
                ),
                init="",
                tokenizer="",
                image_size=64,
            ),
            model=dict(
                num_queries=QUERIES,
                width=WIDTH,
                mask_dim=WIDTH,
                layers=LAYERS,
                heads=4,
                ffn=48,
                encoder_layers=2,
                encoder_ffn=40,
                init="",
            ),
            fcclip=dict(prompt="vild", seen=0.4, unseen=0.8, trust=0.0),
            data=dict(image_size=96),
        )
    )
    found.update_from_flattened_dict(changes)
    return found


class Published:
    """FC-CLIP's modules with random weights, and its rules in PyTorch."""

    def __init__(self):
        torch, open_clip, transformers = require("torch"), require("open_clip"), require("transformers")
        from transformers.models.mask2former import modeling_mask2former as hf

        self.torch = torch
        # Of parameters that the modules draw themselves; with it, masks have several classes, and some none.
        torch.manual_seed(6)
        generator = torch.Generator().manual_seed(5)
        clip = open_clip.get_model_config("convnext_large_d")
        clip.update(
            embed_dim=EMBED,
            text_cfg=dict(context_length=LENGTH, vocab_size=VOCAB, width=16, heads=2, layers=1),
        )
        self.clip = randomise_clip(open_clip.model.CLIP(**clip))
        self.clip.logit_scale.data.fill_(np.log(30.0))
        for name, parameter in self.clip.named_parameters():
            if "embedding" in name:
                parameter.data.normal_(0, 0.5, generator=generator)
        sizes = transformers.Mask2FormerConfig(
            feature_size=WIDTH,
            mask_feature_size=WIDTH,
            hidden_dim=WIDTH,
            encoder_feedforward_dim=40,
            dim_feedforward=48,
            encoder_layers=2,
            decoder_layers=LAYERS + 1,
            num_attention_heads=4,
            num_queries=QUERIES,
        )
        self.pixels = reference.randomise(hf.Mask2FormerPixelDecoder(sizes, [8, 16, 32, 64]))
        self.decoder = reference.randomise(hf.Mask2FormerTransformerModule(WIDTH, sizes))
        for module in (self.pixels, self.decoder):
            for name, parameter in module.named_parameters():
                if name.endswith(("level_embed", "level_embed.weight")) or "queries_" in name:
                    parameter.data.normal_(0, 1, generator=generator)
                elif name.endswith("in_proj_bias"):
                    parameter.data.normal_(0, 0.3, generator=generator)
                elif name.endswith("sampling_offsets.bias"):
                    parameter.data.normal_(0, 2, generator=generator)
                elif name.endswith("in_proj_weight"):
                    parameter.data.normal_(0, WIDTH**-0.5, generator=generator)
            for name, parameter in module.named_parameters():
                # Small branches, so that queries differ: some are void, others of several classes.
                if module is self.decoder and re.search(r"(out_proj|fc2)\.(weight|bias)$", name):
                    parameter.data.mul_(0.2)
            for norm in (m for m in module.modules() if isinstance(m, torch.nn.GroupNorm)):
                norm.weight.data.uniform_(0.5, 1.5, generator=generator)
                norm.bias.data.normal_(0, 0.3, generator=generator)
        with torch.no_grad():  # mask features of mean zero, so that masks differ and end inside of the image
            image = torch.randn(1, 3, *SIZE, generator=generator)
            maps = self.clip.visual.trunk.forward_intermediates(image)[1]
            means = self.pixels(maps, return_dict=True).mask_features.mean((0, 2, 3))
            self.pixels.mask_projection.bias.sub_(means)
        shapes = {
            "_mask_pooling_proj.0.weight": (WIDTH,),
            "_mask_pooling_proj.0.bias": (WIDTH,),
            "_mask_pooling_proj.1.weight": (WIDTH, WIDTH),
            "_mask_pooling_proj.1.bias": (WIDTH,),
            **{f"class_embed.layers.{i}.weight": (EMBED if i == 2 else WIDTH, WIDTH) for i in range(3)},
            **{f"class_embed.layers.{i}.bias": (EMBED if i == 2 else WIDTH,) for i in range(3)},
        }
        self.head = {name: torch.randn(*shape, generator=generator) * 0.2 for name, shape in shapes.items()}
        self.head["_mask_pooling_proj.0.weight"] += 1
        self.head["logit_scale"] = torch.tensor(np.log(10.0), dtype=torch.float32)
        self.void = torch.randn(1, EMBED, generator=generator)

    def state(self):
        """The arrays by the names of `fcclip_cocopan.pth`."""
        of = lambda module: {name: x.detach().numpy() for name, x in module.state_dict().items()}
        out = {f"backbone.clip_model.{name}": x for name, x in of(self.clip).items()}
        pixel = [
            (r"input_projections\.", "input_proj."),
            (r"^level_embed$", "transformer.level_embed"),
            (r"^encoder\.layers\.", "transformer.encoder.layers."),
            ("self_attn_layer_norm", "norm1"),
            ("final_layer_norm", "norm2"),
            ("fc([12])", r"linear\1"),
            ("^mask_projection", "mask_features"),
            (r"^(adapter_1|layer_1)\.0", r"\1"),
            (r"^(adapter_1|layer_1)\.1", r"\1.norm"),
        ]
        decoder = [
            ("^queries_embedder", "query_embed"),
            ("^queries_features", "query_feat"),
            (r"^decoder\.layernorm", "decoder_norm"),
            (r"^decoder\.mask_predictor\.mask_embedder\.(\d)\.0", r"mask_embed.layers.\1"),
            (
                r"^decoder\.layers\.(\d)\.self_attn\.",
                r"transformer_self_attention_layers.\1.self_attn.",
            ),
            (r"^decoder\.layers\.(\d)\.self_attn_layer_norm", r"transformer_self_attention_layers.\1.norm"),
            (
                r"^decoder\.layers\.(\d)\.cross_attn\.",
                r"transformer_cross_attention_layers.\1.multihead_attn.",
            ),
            (r"^decoder\.layers\.(\d)\.cross_attn_layer_norm", r"transformer_cross_attention_layers.\1.norm"),
            (r"^decoder\.layers\.(\d)\.fc([12])", r"transformer_ffn_layers.\1.linear\2"),
            (r"^decoder\.layers\.(\d)\.final_layer_norm", r"transformer_ffn_layers.\1.norm"),
        ]
        parts = ((self.pixels, pixel, "pixel_decoder"), (self.decoder, decoder, "predictor"))
        for module, rules, prefix in parts:
            for name, x in of(module).items():
                for pattern, new in rules:
                    name = re.sub(pattern, new, name)
                out[f"sem_seg_head.{prefix}.{name}"] = x
        # Their self-attention has queries, keys and values in one matrix.
        for name in [name for name in out if ".self_attn.q_proj." in name and "predictor" in name]:
            part = name.rpartition(".")[2]
            joint = [out.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            out[name.replace(f"q_proj.{part}", f"in_proj_{part}")] = np.concatenate(joint)
        out |= {f"sem_seg_head.predictor.{name}": x.numpy() for name, x in self.head.items()}
        return out | {
            "void_embedding.weight": self.void.numpy(),
            "criterion.empty_weight": np.ones(4, np.float32),
        }

    def dense(self, name, x):
        return self.torch.nn.functional.linear(x, self.head[f"{name}.weight"], self.head[f"{name}.bias"])

    def pool(self, features, masks):
        inside = (masks > 0).to(features)
        return self.torch.einsum(
            "bchw,bqhw->bqc", features, inside / (inside.sum((2, 3), keepdim=True) + 1e-8)
        )

    def forward(self, image, texts, owner, seen, trust=0.0):
        """Returns mask logits [Q h w] and probabilities [Q K+1] of the classes and "no object"."""
        torch, f = self.torch, self.torch.nn.functional
        trunk = self.clip.visual.trunk
        last, maps = trunk.forward_intermediates(image)
        decoded = self.pixels(maps, return_dict=True)
        out = self.decoder(decoded.multi_scale_features, decoded.mask_features)
        query = out.intermediate_hidden_states[-1].transpose(0, 1)
        masks = out.masks_queries_logits[-1]
        pooled = self.pool(decoded.mask_features, masks)
        names = "_mask_pooling_proj.0.weight", "_mask_pooling_proj.0.bias"
        pooled = f.layer_norm(pooled, (WIDTH,), *(self.head[name] for name in names))
        x = self.dense("_mask_pooling_proj.1", pooled) + query
        x = f.relu(self.dense("class_embed.layers.0", x))
        x = self.dense("class_embed.layers.2", f.relu(self.dense("class_embed.layers.1", x)))
        rows = torch.cat([texts, f.normalize(self.void, dim=-1)])

        def logits(x, scale):
            y = torch.clamp(scale.exp(), max=100) * f.normalize(x, dim=-1) @ rows.T
            best = [y[..., :-1][..., torch.tensor(owner == k)].amax(-1) for k in range(owner.max() + 1)]
            return torch.stack([*best, y[..., -1]], -1)[0]

        small = f.interpolate(masks, size=last.shape[2:], mode="bilinear", align_corners=False)
        of_clip = self.pool(last, small)[0, :, :, None, None]
        of_clip = self.clip.visual.head(trunk.head(of_clip))[None]
        own, clip = logits(x, self.head["logit_scale"]), logits(of_clip, self.clip.logit_scale)
        p, q = own[:, :-1].softmax(-1), clip[:, :-1].softmax(-1)
        void = own.softmax(-1)[:, -1:] * (1 - trust * q.amax(-1, keepdim=True))
        share = torch.where(torch.tensor(seen), p**0.6 * q**0.4, p**0.2 * q**0.8).log().softmax(-1)
        scores = (torch.cat([share * (1 - void), void], -1) + 1e-8).log().softmax(-1)
        return masks[0], scores


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch, timm = require("torch"), require("timm")
    create, folder = timm.create_model, tmp_path_factory.mktemp("published")
    timm.create_model = lambda *args, **kwargs: create(
        *args, depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), **kwargs
    )
    try:
        model = Published()
    finally:
        timm.create_model = create
    pieces(folder)
    state = {name: torch.tensor(x) for name, x in model.state().items()}
    torch.save({"model": state, "iteration": 3}, folder / "fcclip_cocopan.pth")
    return model, folder


@pytest.fixture(scope="module")
def ours(published):
    _, folder = published
    found = config(**{"towers.tokenizer": str(folder), "model.init": str(folder / "fcclip_cocopan.pth")})
    method = FCClip(found, WordList([]), TRAINED)
    return method, method.pretrained()


def test_the_published_file_fits_the_variables_strictly(published, ours, tmp_path):
    torch = require("torch")
    method, variables = ours
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    same = jax.tree.map(lambda a, b: a.shape == b.shape, shapes, jax.tree.map(np.asarray, variables))
    assert all(jax.tree.leaves(same))
    state = {name: torch.tensor(x) for name, x in published[0].state().items()}
    for name, match in (
        ("sem_seg_head.predictor.class_embed.layers.3.weight", "mlp_3"),
        ("backbone.clip_model.visual.trunk.extra", "extra"),
    ):
        torch.save({"model": {**state, name: torch.zeros(2)}}, tmp_path / "more.pth")
        with pytest.raises(UserError, match=match):
            method.published(str(tmp_path / "more.pth"))
    for name in ("void_embedding.weight", "backbone.clip_model.visual.trunk.stem.1.bias"):
        left = {n: x for n, x in state.items() if n != name}
        torch.save({"model": left}, tmp_path / "less.pth")
        with pytest.raises(UserError, match="lacks 1 names"):
            method.published(str(tmp_path / "less.pth"))
    torch.save({"model": {"a": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no checkpoint of FC-CLIP"):
        method.published(str(tmp_path / "other.pth"))


def expected_panoptic(masks, scores, classes, overlap):
    """FC-CLIP's rule (threshold 0 of scores) with loops: segments' numbers by pixel, and their classes."""
    score, label = scores.max(-1), scores.argmax(-1)
    keep = [q for q in range(len(score)) if label[q] < len(classes) and score[q] > 0]
    weighted = score[keep, None, None] * masks[keep]
    winner, number, found, stuff = weighted.argmax(0), np.zeros(masks.shape[1:], int), [], {}
    for i, q in enumerate(keep):
        own, half = winner == i, masks[q] >= 0.5
        if not (own & half).any() or own.sum() / half.sum() < overlap:
            continue
        if not classes.isthing[label[q]]:
            if label[q] in stuff:
                number[own & half] = stuff[label[q]]
                continue
            stuff[label[q]] = len(found) + 1
        found.append(int(label[q]))
        number[own & half] = len(found)
    return number, found


@pytest.mark.parametrize(("trust", "overlap"), [(0.0, 0.2), (0.5, 0.3)])
def test_scores_and_label_maps_are_those_of_the_published_rules(published, ours, trust, overlap):
    (model, _), (method, variables) = published, ours
    torch = model.torch
    method.config.fcclip.trust = trust
    names, owner = ASKED.flat()
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    image[:, 16:48, 20:60] //= 3
    pixels = (image / np.float32(255) - np.float32(CLIP.mean)) / np.float32(CLIP.std)
    with torch.no_grad():
        normal = torch.nn.functional.normalize
        texts = [[template.format(name) for name in names] for template in VILD]
        ids = [torch.tensor(np.asarray(method.tokenizer(filled)[0])) for filled in texts]
        texts = torch.stack([normal(model.clip.encode_text(x), dim=-1) for x in ids])
        texts = normal(texts.mean(0), dim=-1)
        seen = [True, False, True, True]
        masks, scores = model.forward(reference.torch_images(pixels), texts, np.asarray(owner), seen, trust)
        whole = torch.nn.functional.interpolate(masks[None], SIZE, mode="bilinear", align_corners=False)[0]
    text = method.embed_text(variables, names)
    vocabulary = vocabulary_of(ASKED, method.seen_names())
    prediction = jax.jit(method.predict)(variables, image, jnp.array([SIZE]))
    found = method.score_regions(jax.tree.map(lambda x: x[0], prediction), text, vocabulary)
    error = reference.relative_error(prediction.mask_logits[0], masks)
    of_class = np.stack([np.asarray(found.names)[np.asarray(owner) == k][0] for k in range(4)], -1)
    worst = np.abs(np.concatenate([of_class, np.asarray(found.void)[:, None]], -1) - scores.numpy()).max()
    print(f"FC-CLIP trust={trust}: masks max relative error {error:.1e}, scores max error {worst:.1e}")
    assert error < 1e-4 and worst < 1e-4
    probability, scores = whole.sigmoid().numpy(), scores.numpy()
    number, classes = expected_panoptic(probability, scores, ASKED, overlap)
    assert len(classes) > 1 and 0.1 < (number > 0).mean() < 1
    sizes = jnp.array([SIZE], jnp.int32)
    run = lambda decision: decide(
        method,
        prediction,
        text,
        vocabulary,
        sizes,
        sizes,
        jnp.ones((1, 1, len(names)), bool),
        canvas=SIZE,
        shape=SIZE,
        decision=decision,
    )
    panoptic = run(Panoptic(overlap_threshold=overlap))
    np.testing.assert_array_equal(panoptic.segments.number[0, 0], number)
    assert [int(k) for k in panoptic.segments.category[0, 0] if k >= 0] == classes
    semantic = np.einsum("qc,qhw->chw", scores[:, :-1], probability).argmax(0)
    assert len(np.unique(semantic)) > 1
    np.testing.assert_array_equal(run(Argmax()).category[0, 0], semantic)
    # The best 100 of all pairs, things alone: with so few, all things.
    inside = whole.numpy() > 0
    mean = (probability * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    best = (scores[:, [0, 3]] * mean[:, None])[inside.any((1, 2))]
    instances = run(Instances(100)).segments
    np.testing.assert_allclose(instances.score[0, 0][: best.size], np.sort(best.ravel())[::-1], atol=1e-4)


def test_classes_are_learned_by_their_names_on_a_frozen_trunk(published, ours, monkeypatch):
    """The logits of the loss are those of the prediction; a held-out class has none; gradients reach the head alone."""
    classes = ClassList(TRAINED.names, TRAINED.ids, TRAINED.isthing, {"held_out": (2,)})
    found = config(steps=1, **{"towers.tokenizer": str(published[1]), "fcclip.prompt": "a photo of a {}."})
    found.loss = dict(mask=5.0, dice=5.0, label=2.0, no_object=0.1, points=64)
    method = FCClip(found, WordList([]), classes)
    assert method.seen_names() == {"dog", "puppy", "sky"}
    variables = jax.tree.map(jnp.asarray, dict(ours[1]))
    variables["towers"] = method._with_names(variables["towers"])
    rng = np.random.default_rng(1)
    batch = dict(
        image=rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        image_size=np.array([[64, 64], [40, 64]]),
        masks=(rng.random((2, 3, 16, 16)) < 0.5).astype(np.uint8) * 255,
        mask_valid=np.array([[True, True, True], [True, False, False]]),
        mask_classes=np.array([[0, 1, 2], [1, -1, -1]]),
        example_mask=np.ones(2, bool),
    )
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    seen, original = {}, fcclip.point_losses
    keep = lambda *args, **options: seen.update(options, mask_valid=args[3]) or original(*args, **options)
    monkeypatch.setattr(fcclip, "point_losses", keep)

    def taken(variables):
        method._forward(variables, batch, jax.random.key(0))
        return seen["mask_valid"], seen["class_logits"]

    valid, logits = jax.jit(taken)(variables)
    assert valid.tolist() == [[True, True, False], [True, False, False]]
    assert logits.shape == (2, LAYERS + 1, QUERIES, 4) and (logits[..., 2] < -1e8).all()
    prediction = jax.jit(method.predict)(variables, batch["image"], batch["image_size"])
    text = method.embed_text(variables, classes.flat()[0])
    own = np.einsum("td,bnd->bnt", text["clip"], prediction.regions["head"])
    expected = np.stack([own[..., :2].max(-1), own[..., 2], prediction.void], -1)
    np.testing.assert_allclose(logits[:, -1][..., [0, 1, 3]], expected, atol=2e-3)
    monkeypatch.undo()
    loss = lambda params: method.loss({**variables, "params": params}, batch, jax.random.key(0))[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(variables["params"])
    largest = jax.tree.map(lambda x: float(np.abs(x).max()), grads)
    assert np.isfinite(value) and all(0 < x < np.inf for x in jax.tree.leaves(largest["classifier"]))
    assert all(np.isfinite(x) for x in jax.tree.leaves(largest))


def test_segmenter_of_a_published_file(published, ours, monkeypatch, tmp_path):
    """Each image on a canvas of its own, as the published evaluation resizes it; features of names are kept."""
    folder, (method, variables) = published[1], ours
    monkeypatch.setattr(
        fcclip,
        "published_config",
        lambda name, weights, tokenizer, trust: config(
            **{"model.init": weights, "towers.tokenizer": tokenizer, "fcclip.trust": trust}
        ),
    )
    monkeypatch.setattr(FCClip, "whole", Whole(64, 96, 32))
    load = lambda **options: Segmenter.from_pretrained(
        "fcclip_convnext_l", str(folder / "fcclip_cocopan.pth"), TRAINED, tokenizer=str(folder), **options
    )
    segmenter = load()
    rng = np.random.default_rng(2)
    exact, other = (rng.integers(0, 256, (*size, 3), np.uint8) for size in (SIZE, (70, 50)))
    first, second = segmenter.segment([exact, other], decision="panoptic")
    assert second.label_map.shape == (70, 50) and segmenter.method.whole.fit(other)[0].shape == (96, 64, 3)
    prediction = jax.jit(method.predict)(variables, exact[None], jnp.array([SIZE]))
    names, sizes = TRAINED.flat()[0], jnp.array([SIZE], jnp.int32)
    vocabulary = vocabulary_of(TRAINED, method.seen_names())
    method.config.fcclip.trust = 0.0
    expected = decide(
        method,
        prediction,
        method.embed_text(variables, names),
        vocabulary,
        sizes,
        sizes,
        jnp.ones((1, 1, len(names)), bool),
        canvas=SIZE,
        shape=SIZE,
        decision=Panoptic(),
    )
    np.testing.assert_array_equal(first.label_map, expected.category[0, 0])
    maps = list(segmenter.stream_maps([exact], decision="panoptic"))
    np.testing.assert_array_equal(maps[0].category, first.label_map)
    text = segmenter.embed(TRAINED)
    for kept in (load(texts=tmp_path), load(texts=tmp_path)):
        jax.tree.map(np.testing.assert_array_equal, kept.embed(TRAINED), text)
        monkeypatch.setattr(FCClip, "embed_text", None)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="this model resizes whole images: leave out tile"):
        segmenter.segment(exact, tile=(32, 8))
    with pytest.raises(UserError, match="the file of fcclip_convnext_l's weights is missing"):
        Segmenter.from_pretrained("fcclip_convnext_l", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"towers.image": {"name": "small", "embed_dim": EMBED}},
            "a trunk of fcclip is a ConvNeXt, ViT or EVA",
        ),
        ({"fcclip.trust": 1.5}, "fcclip.trust=1.5 is not between 0 and 1"),
        ({"model.init": "a", "towers.init": "b"}, "model.init and towers.init are both set"),
    ],
)
def test_errors(change, message):
    found = config()
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        found[section][name] = value
    with pytest.raises(UserError, match=message):
        FCClip(found, WordList([]), TRAINED)
    with pytest.raises(UserError, match="the model 'fcclip_b' is not one of fcclip_convnext_l"):
        fcclip.published_config("fcclip_b")


def test_the_published_size_builds():
    method = FCClip(fcclip.published_config("fcclip_convnext_l", "file", "tokenizer"), WordList([]), TRAINED)
    head = jax.eval_shape(method._init_head, jax.random.key(0))
    assert method.whole == Whole(800, 1333, 32) and head["classifier"]["void"].shape == (768,)
    assert head["masks"]["decoder"]["query_features"].shape == (250, 256)


def centre_masks(method, variables, images, sizes):
    """Changes a bias so that masks end inside of the images."""

    def run(variables):
        pixels, size = prepared(method.clip, method.trunk.cell, images, sizes)
        maps = method.trunk.apply(variables, pixels).maps
        return method.head.apply({"params": variables["params"]}, maps, size)[0].pixels

    features = variables["params"]["masks"]["pixel_decoder"]["mask_features"]
    features["bias"] -= jax.jit(run)(variables).mean((0, 1, 2))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Segmenter with weights that all matter, masks that end inside of the image, and different classes."""
    folder = tmp_path_factory.mktemp("small")
    pieces(folder)
    found = config(**{"towers.tokenizer": str(folder), "fcclip.trust": 0.5})
    method = FCClip(found, WordList([]), TRAINED)
    rng = np.random.default_rng(0)
    branch = re.compile("masks/decoder/layer_.*(mlp_out|attention/out)/")

    def drawn(path, x):  # with small branches, so that queries differ
        noisy = jnp.asarray(x + rng.normal(0, 0.1, x.shape), jnp.float32)
        return noisy * (0.2 if branch.search(path_name(path)) else 1)

    variables = jax.tree.map_with_path(drawn, jax.jit(method.init)(jax.random.key(0)))
    variables["params"]["masks"]["pixel_decoder"]["mask_features"]["kernel"] *= 10
    centre_masks(method, variables, *map(jnp.asarray, inputs()))
    return Segmenter(method, variables, method.config, TRAINED)


def inputs(count=2):
    """Images of two sizes on square canvases."""
    images = np.random.default_rng(1).integers(0, 256, (count, 96, 96, 3), np.uint8)
    sizes = np.array([[96, 96], [50, 70], [96, 33]], np.int32)[:count]
    return images, sizes


def test_stablehlo_gives_the_logits_of_both_spaces(small, tmp_path):
    require("flatbuffers")
    export.export_model(lambda: small, "stablehlo", str(tmp_path))
    exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    images, sizes = inputs(3)
    text = np.asarray(small.embed("puppy,dog; sea")["clip"])
    masks, own, clip, void, pixels = exported.call(read_arrays(tmp_path), images, sizes, text)
    expected = jax.jit(small.method.predict)(small.variables, images, sizes)
    np.testing.assert_allclose(masks, expected.mask_logits, rtol=1e-3, atol=1e-3)
    for space, logits in (("head", own), ("clip", clip)):
        np.testing.assert_allclose(logits, np.einsum("td,bnd->btn", text, expected.regions[space]), atol=1e-3)
    np.testing.assert_allclose(void, expected.void, atol=1e-3)
    np.testing.assert_allclose(pixels, expected.pixels["clip"], atol=1e-3)


@pytest.mark.usefixtures("quick_onnx")
def test_onnx_of_fcclip_takes_any_number_of_images(small, tmp_path):
    torch, runtime = require("torch"), require("onnxruntime")
    require("onnxscript")
    import ovseg_jax.torch

    export.to_onnx(small, tmp_path, np.dtype("float32"))
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    images, sizes = inputs(3)
    images = images.transpose(0, 3, 1, 2)
    names = [x.name for x in session.get_outputs()]
    assert names == ["mask_logits", "head", "clip", "void", "pixel_embed"]
    found = session.run(None, {"image": images, "image_size": sizes})
    with torch.no_grad():
        expected = ovseg_jax.torch.load(tmp_path).net(torch.from_numpy(images), torch.from_numpy(sizes))
    errors = [reference.relative_error(*pair) for pair in zip(found, expected, strict=True)]
    print(f"FC-CLIP through onnxruntime: max relative error {max(errors):.1e}")
    assert max(errors) < 1e-4


def test_fcclip_in_pytorch_gives_the_same_outputs_and_labels(small, tmp_path, monkeypatch):
    torch = require("torch")
    import ovseg_jax.torch

    monkeypatch.setattr(FCClip, "whole", Whole(64, 96, 32))
    # As drawn, "no object" is the best class of every mask; with the opposite vector it is that of some.
    variables = jax.tree.map(lambda x: x, small.variables)
    variables["params"]["classifier"]["void"] = -variables["params"]["classifier"]["void"]
    segmenter = Segmenter(small.method, variables, small.config, TRAINED)
    export.export_model(lambda: segmenter, "torch", str(tmp_path))
    loaded = ovseg_jax.torch.load(tmp_path)
    canvas, sizes = (64, 128), np.array([(64, 128), (33, 90), (64, 9)], np.int32)
    pixels = np.random.default_rng(4).integers(0, 256, (len(sizes), *canvas, 3), np.uint8)
    expected = jax.jit(small.method.predict)(variables, pixels, sizes)
    with torch.no_grad():
        found = loaded.net(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(sizes))
    pairs = dict(
        masks=(found.mask_logits, expected.mask_logits),
        head=(found.head, expected.regions["head"]),
        clip=(found.clip, expected.regions["clip"]),
        void=(found.void, expected.void),
        pixels=(found.pixel_embed.permute(0, 2, 3, 1), expected.pixels["clip"]),
    )
    assert 0.05 < (found.mask_logits > 0).float().mean() < 0.95
    errors = {name: reference.relative_error(*pair) for name, pair in pairs.items()}
    print(f"FC-CLIP in PyTorch: max relative errors {errors}")
    assert max(errors.values()) < 1e-4
    image = np.random.default_rng(5).integers(0, 256, (70, 50, 3), np.uint8)  # its canvas has another shape
    image[:, 20:] //= 3
    for labels in (ASKED, None):
        ours, theirs = segmenter.segment(image, labels), loaded.segment(image, labels)
        assert len(np.unique(ours.label_map)) > 1 and ours.classes.names == theirs.classes.names
        assert (ours.label_map == theirs.label_map).mean() > 0.999
        np.testing.assert_allclose(theirs.confidence, ours.confidence, atol=1e-4)
        for decision in ("panoptic", "instances"):
            assert_same_segments(*(x.segment(image, labels, decision=decision) for x in (segmenter, loaded)))
    file = tmp_path / "config.json"
    text = file.read_text()
    for change, message in (
        (
            ('"kind": "ConvNeXt"', '"kind": "Swin"'),
            "'Swin' of FC-CLIP's trunk is not one of ConvNeXt, ViT, Eva",
        ),
        (('"seen": [', '"seen": [3, '), "seen is not a list of texts"),
        (('"short": 64', '"short": -64'), "short is -64, not a whole number"),
    ):
        file.write_text(text.replace(*change))
        with pytest.raises(UserError, match=message):
            ovseg_jax.torch.load(tmp_path)


def test_its_config_runs_on_scenes(tmp_path, monkeypatch):
    """Shrunk: the small CLIP, then the head on its trunk; the run then segments by other words of its captions.

    Their features are kept, until a file of the run changes.
    """
    found = configs.get_config("images=8")
    check_config(found)
    stage = found.stages[0]["config"]
    stage.update(dict(steps=1, batch_size=8))
    stage.data.train[0].update(dict(cache=False, shots=2, size="tiny"))
    found.update(dict(steps=2, batch_size=8))
    found.model.update(dict(width=32, mask_dim=32, layers=1, num_queries=4))
    found.data.train[0].update(dict(cache=False, size="tiny"))
    found.evals = {}
    for evaluation in found.final_evals.values():
        evaluation.update(dict(batch_size=8))
        evaluation.source.update(dict(num_examples=8, size="tiny"))
    summary = train(found, tmp_path)
    assert 0 <= summary["test/miou"] <= 100 and 0 <= summary["panoptic/pq"] <= 100
    segmenter = Segmenter.from_checkpoint(tmp_path)
    towers = segmenter.variables["towers"]
    assert {"image", "text", "scale", "names"} == set(towers)
    result = segmenter.segment(np.zeros((50, 40, 3), np.uint8), "red ball; grass", decision="panoptic")
    assert result.label_map.shape == (50, 40)
    kept = lambda words: Segmenter.from_checkpoint(tmp_path, texts=tmp_path / "texts").embed(words)["clip"]
    want = segmenter.embed("red ball; grass")["clip"]
    np.testing.assert_array_equal(kept("red ball; grass"), want)

    def never(self, variables, names):
        raise RuntimeError(f"{names} were embedded")

    monkeypatch.setattr(FCClip, "embed_text", never)
    np.testing.assert_array_equal(kept("grass; red ball"), want[::-1])
    with pytest.raises(RuntimeError, match="sea"):
        kept("grass; sea")
    (tmp_path / "checkpoints" / "2" / "checksums.json").touch()
    with pytest.raises(RuntimeError, match="red ball"):
        kept("grass; red ball")
