"""What a text transformer reads of a caption: all of it, its nouns and verbs, or these in templates."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest

from ovseg_jax.configs import pseg
from ovseg_jax.data.pipeline import train_iterator, train_rows
from ovseg_jax.data.rows import Rows
from ovseg_jax.data.sources.build import make_source
from ovseg_jax.data.sources.webdataset import WebDataset
from ovseg_jax.errors import UserError
from ovseg_jax.experiment.keys import known_keys
from ovseg_jax.methods.pseg import PSeg
from ovseg_jax.vocab.templates import IMAGENET
from tests.datasets.packing import jpeg, tarred

CAPTION = "A woman is quickly riding a brown horse, a horse"
WORDS = ["woman", "is", "riding", "horse"]
SAID: list[str] = []


def tokenize(texts):
    """Ids that number the texts in `SAID`."""
    SAID.extend(texts)
    ids = np.arange(len(SAID) - len(texts), len(SAID), dtype=np.int32)
    return ids[:, None], np.ones((len(texts), 1), bool)


def make_rows(*fields, **data):
    data = dict(image_size=8, **data)
    return Rows.from_config(dict(seed=3, steps=10, batch_size=4, data=data), fields, None, tokenize)


def said(row, field="tokens", valid="token_valid"):
    texts = [SAID[i] for i in np.ravel(row[field])]
    assert [bool(text) for text in texts] == np.ravel(row[valid]).tolist()
    return texts


def example(*captions):
    return dict(image=np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8), captions=captions)


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("caption", [CAPTION, "so very quickly", ""]),
        ("nouns_verbs", ["woman is riding horse", "so very quickly", ""]),
    ],
)
def test_a_caption_or_its_nouns_and_verbs(kind, expected):
    rows = make_rows("tokens", caption_text=kind)
    for caption, text in zip((CAPTION, "so very quickly", ""), expected, strict=True):
        assert said(rows(0, example(caption))) == [text]
    assert said(rows(0, example())) == [""]


@pytest.mark.parametrize("kind", ["caption", "nouns_verbs", "prompt"])
def test_a_blank_caption_is_none(kind):
    """Otherwise all images with one would be pairs of the same text."""
    row = make_rows("tokens", "prompts", caption_text=kind)(0, example(" \n"))
    assert not row["token_valid"].any() and not row["prompt_valid"].any()


def test_prompts_are_words_in_clips_templates():
    rows = make_rows("prompts", max_prompts=3)
    filled = {template.replace("{}", word): (word, template) for word in WORDS for template in IMAGENET}
    drawn = [
        [filled[text] for text in said(rows(k, example(CAPTION)), "prompts", "prompt_valid")]
        for k in range(1000)
    ]
    assert all(len({word for word, _ in three}) == 3 for three in drawn)
    words = Counter(word for three in drawn for word, _ in three)
    assert all(abs(words[word] / 750 - 1) < 0.1 for word in WORDS)
    assert len({template for three in drawn for _, template in three}) == len(set(IMAGENET)) == 80


def test_slots_without_a_word_hold_the_caption():
    rows = make_rows("prompts", max_prompts=5)
    texts = said(rows(0, example(CAPTION)), "prompts", "prompt_valid")
    assert texts[4] == CAPTION and CAPTION not in texts[:4]
    assert said(rows(0, example()), "prompts", "prompt_valid") == [""] * 5
    assert rows(0, example())["prompts"].shape == (5, 1)


def test_one_prompt_may_stand_for_the_caption():
    rows = make_rows("tokens", caption_text="prompt")
    texts = {said(rows(k, example(CAPTION)))[0] for k in range(50)}
    assert len(texts) > 20 and all(any(word in text for word in WORDS) for text in texts)
    assert said(rows(0, example("so very quickly"))) == ["so very quickly"]


def test_draws_depend_on_seed_and_row_alone():
    both = make_rows("image", "tokens", "prompts", caption_text="prompt")
    first = [said(both(k, example(CAPTION))) for k in range(8)]
    again = [said(both(k, example(CAPTION))) for k in reversed(range(8))][::-1]
    assert first == again and len({text for texts in first for text in texts}) > 4
    plain = make_rows("image", "tokens")
    for k in range(8):
        np.testing.assert_array_equal(plain(k, example(CAPTION))["image"], both(k, example(CAPTION))["image"])


def test_wrong_values_are_refused_and_keys_known_where_they_have_an_effect():
    with pytest.raises(UserError, match="caption_text='nouns' is not one of caption, nouns_verbs, prompt"):
        make_rows("tokens", caption_text="nouns")
    with pytest.raises(UserError, match="max_prompts=0 is less than 1"):
        make_rows("prompts", max_prompts=0)
    with pytest.raises(UserError, match="'prompts' and 'box_tokens' need a tokeniser"):
        Rows.from_config(
            dict(seed=0, steps=1, batch_size=1, data=dict(image_size=8)), ("prompts",), None, None
        )
    config = pseg.get_config("data=tars,data_dir=x")
    effects = lambda: [known_keys(config)["data"][key] for key in ("caption_text", "tagger", "max_prompts")]
    config.data.caption_text = "caption"
    assert effects() == [True, False, False]
    config.data.caption_text = "nouns_verbs"
    assert effects() == [True, True, False]
    config.data.fields = ["prompts"]
    assert effects() == [True, True, True]


def write_tars(folder, count):
    """Examples of 20 kB of caption each, ten to a tar."""
    folder.mkdir()
    for shard in range(count // 10):
        files = {}
        for k in range(10):
            files[f"{k}.jpg"] = jpeg(8, 8, k)
            files[f"{k}.txt"] = f"{shard} {k} a dog runs {'and so on ' * 2000}".encode()
        (folder / f"{shard:05d}.tar").write_bytes(tarred(files))
    return str(folder)


def test_captions_of_tars_are_not_collected(tmp_path, monkeypatch):
    """Neither a pass over the captions at the start, nor memory that grows with their number."""
    read = []
    plain = WebDataset._captions
    monkeypatch.setattr(WebDataset, "_captions", lambda self, *args: read.append(1) or plain(self, *args))
    monkeypatch.setattr(WebDataset, "texts", lambda *_: pytest.fail("captions were collected"))

    def peak(count):
        config = pseg.get_config(f"data=tars,data_dir={write_tars(tmp_path / str(count), count)}")
        # The tagger's cache, which is bounded, would hold more than a few captions of this length.
        config.data.update(dict(image_size=16, workers=0, threads=0, caption_text="caption"))
        config.batch_size = 4
        WebDataset(config.data.train[0]["data_dir"])  # which lists the members of the tars
        tracemalloc.start()
        source = WebDataset(config.data.train[0]["data_dir"])
        assert PSeg.vocabulary(config, source) == () and not read
        rows = Rows.from_config(config, PSeg.fields(config), None, tokenize)
        batches = train_iterator(config, rows, source=source)
        for _ in range(2):
            next(batches)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0 < len(read) <= 12
        read.clear()
        return size

    peak(10)  # imports and caches
    assert peak(200) - peak(20) < 180 * 20_000 / 4


def test_an_epoch_of_several_folders_shows_every_pair_once(tmp_path):
    """C.1: 3, 12 and 11 million pairs, for 30 epochs of all of them."""
    folders = [write_tars(tmp_path / str(count), count) for count in (10, 30)]
    config = pseg.get_config(f"data=tars,data_dir={';'.join(folders)}")
    config.data.update(dict(image_size=16, caption_text="caption"))
    rows = train_rows(
        config, Rows.from_config(config, ("tokens",), None, tokenize), make_source(config.data.train)
    )
    seen = Counter(said(rows[k])[0][:3] for k in range(40))
    # Both folders have captions that begin with 0.
    assert seen == {f"{shard} {k}": 2 if shard == 0 else 1 for shard in range(3) for k in range(10)}
