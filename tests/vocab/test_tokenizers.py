import gzip
import json
import pickle
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax.errors import UserError
from ovseg_jax.vocab.lexicon import LEXICON
from ovseg_jax.vocab.tokenizers import (
    BPE_FILE,
    LENGTHS,
    clean_clip,
    clean_siglip,
    load_tokenizer,
)
from tests.extras import require

# Of the lists alone. With the module's own attributes, which its path is among, each checkout trained another
# vocabulary, and in some of them two ways to cut a word scored the same to the last bit: libraries then differ.
WORDS = sorted(set().union(*LEXICON.values()))
ODD = [
    "",
    "  \t\n ",
    "a",
    "!!!",
    "it's the dog's, they're here; we'll see — I'd've",
    "IT'S LOUD'S, the dog'\u017f",
    "AT&amp;T &lt;b&gt; &quot;x&quot; &amp;amp; &eacute;&nbsp;caf\u00e9 cafe\u0301",
    "\u201ccurly\u201d \u2018quotes\u2019 don\u2019t \u02bcn",
    "\ufb01re \ufb02ag o\ufb03ce \u0132ssel",
    "\uff26\uff35\uff2c\uff2c\u3000width\uff01",
    "\u4e00\u4e8c\u4e09 \u65e5\u672c\u8a9e \ud55c\uae00 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f469\u200d\U0001f680 flag \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "zero\u200bwidth soft\u00adhyphen nb\u00a0space\u2028line",
    "bell\x07 back\x08space \ufeffbom",
    "3.14 1,000 2nd \u0661\u0662 \u00bd \u2168",
    "\u0130stanbul STRASSE \u03a3\u03a3 \u1e9e",
    "under_score-dash/slash\\back @home #tag $5 100% (a) [b] {c} <d>",
    "x" * 500,
    "word " * 200,
    "\U0001f600" * 90,
    "</w>",
]


def captions(count, seed=0):
    rng = random.Random(seed)
    template = ["a photo of a {}.", "{} and {}", "the {}, {}!", "A {}'s {}?", "{}-{} {}", "{} {}s (no {})"]
    return [
        rng.choice(template).format(*(rng.choice(WORDS) for _ in range(3))).replace("o", rng.choice("oO"))
        for _ in range(count)
    ]


def strange(count, seed=0):
    """Random strings of assigned characters that are no sign of a wrong encoding, words among them."""
    rng = random.Random(seed)
    letters = [c for c in map(chr, range(0x100, 0x1FAFF)) if unicodedata.category(c)[0] in "LNPSZM"]
    # Combining iota: case folding makes a letter of it, by one regex library and not by the other.
    letters.remove("\u0345")
    plain = "abcdefgstmvrl  '''.,-!?0123ABCDEFSTMVRL"
    return [
        "".join(rng.choice(letters if rng.random() < 0.3 else plain) for _ in range(rng.randint(1, 30)))
        for _ in range(count)
    ]


def bpe_path():
    return Path(str(require("open_clip").__file__)).with_name(BPE_FILE)


def differing(texts, ours, theirs):
    return [text for text, a, b in zip(texts, ours, theirs, strict=True) if list(a) != list(b)]


def test_clip_equals_open_clip():
    """With the vocabulary of the real CLIP, cleaning and truncation included."""
    reference = require("open_clip").tokenizer.SimpleTokenizer()
    ours = load_tokenizer(bpe_path())
    assert ours.vocab_size == reference.vocab_size == 49408 and ours.length == 77
    texts = WORDS + captions(2000) + strange(2000) + ODD
    expected = reference(texts).numpy()
    ids, valid = ours(texts)
    assert ids.dtype == np.int32 and valid.dtype == bool
    assert differing(texts, ids, expected) == []
    # Padding is 0, and so is "!": the end tells them apart.
    np.testing.assert_array_equal(valid.sum(1), expected.argmax(1) + 1)
    assert (ids[texts.index("word " * 200)] == 49407).argmax() == 76


def test_wrong_encodings_stay_as_they_are():
    """The one part of ftfy that is left out, as `clean_clip` says."""
    ftfy = require("ftfy")
    assert ftfy.fix_text("donâ€™t") == "don't"
    assert clean_clip("donâ€™t") == "donâ€™t"


def test_clip_takes_special_tokens_for_text_and_halves_of_surrogates_for_unknown():
    ours = load_tokenizer(bpe_path())
    ids, valid = ours(["a <|endoftext|> b"])
    assert (ids == 49407).sum() == 1 and valid.sum() > 8
    np.testing.assert_array_equal(ours(["a \ud83d b"])[0], ours(["a \ufffd b"])[0])
    np.testing.assert_array_equal(ours(["a \ud83d\ude00 b"])[0], ours(["a \U0001f600 b"])[0])


def test_clip_from_other_files(tmp_path):
    """vocab.json with merges.txt, and tokenizer.json in its two spellings of merges, are the same vocabulary."""
    lines = gzip.decompress(bpe_path().read_bytes()).decode("utf-8").split("\n")[1:48895]
    ours = load_tokenizer(bpe_path())
    letters = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [c + "</w>" for c in letters] + [line.replace(" ", "") for line in lines]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "a/merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    for name, merges in (("b", lines), ("c", [line.split(" ") for line in lines])):
        model = dict(type="BPE", vocab=vocab, merges=merges, end_of_word_suffix="</w>")
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(dict(model=model)))
    texts = captions(100) + ODD
    expected = ours(texts)[0]
    for name in "abc":
        for kind in (None, "clip"):
            ids = load_tokenizer(tmp_path / name, kind)(texts)[0]
            np.testing.assert_array_equal(ids, expected)


def test_length():
    ours = load_tokenizer(bpe_path(), length=5)
    ids, valid = ours(["a b c d e f", "a"])
    assert ids.shape == (2, 5) and ours.length == 5
    assert ids[0, 0] == 49406 and ids[0, -1] == ids[1, 2] == 49407
    np.testing.assert_array_equal(valid, [[True] * 5, [True] * 3 + [False] * 2])
    assert ours([])[0].shape == (0, 5)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    tokenizers = require("tokenizers")
    folder = tmp_path_factory.mktemp("wordpiece")
    model = tokenizers.BertWordPieceTokenizer(lowercase=True)
    model.train_from_iterator(
        [*captions(1000), "caf\u00e9 \u4e00\u4e8c"], vocab_size=600, show_progress=False
    )
    model.save_model(str(folder))
    (folder / "json").mkdir()
    model.save(str(folder / "json/tokenizer.json"))
    return folder


@pytest.mark.parametrize("where", ["", "vocab.txt", "json", "json/tokenizer.json"])
def test_wordpiece_equals_hugging_face(wordpiece, where):
    transformers = require("transformers")
    reference = transformers.BertTokenizer.from_pretrained(str(wordpiece), do_lower_case=True)
    ours = load_tokenizer(wordpiece / where)
    texts = captions(1000) + strange(500) + ODD
    expected = reference(texts, padding="max_length", truncation=True, max_length=LENGTHS["wordpiece"])
    ids, valid = ours(texts)
    assert differing(texts, ids, expected["input_ids"]) == []
    np.testing.assert_array_equal(valid, expected["attention_mask"])
    assert ours.vocab_size == len(reference) and (ids < ours.vocab_size).all()
    assert len(np.unique(ids)) > 300


def train_sentencepiece(folder, **options):
    sentencepiece = require("sentencepiece")
    folder.mkdir()
    prefix = str(folder / "spiece")
    texts = iter([clean_siglip(text) for text in captions(2000)])
    options = dict(vocab_size=500, pad_id=0, eos_id=1, minloglevel=2) | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=prefix, **options)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """Ids as T5's: padding, end, unknown."""
    return train_sentencepiece(tmp_path_factory.mktemp("siglip") / "model", unk_id=2, bos_id=-1)


@pytest.fixture(scope="module")
def siglip2(tmp_path_factory):
    """Ids and options as Gemma's."""
    return train_sentencepiece(
        tmp_path_factory.mktemp("siglip2") / "model",
        model_type="bpe",
        bos_id=2,
        unk_id=3,
        eos_piece="<eos>",
        bos_piece="<bos>",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mask>"],
        vocab_size=800,
    )


def test_siglip_equals_hugging_face(siglip):
    transformers = require("transformers")
    reference = transformers.SiglipTokenizer(str(siglip / "spiece.model"))
    ours = load_tokenizer(siglip)
    # Hugging Face's takes `_` away with other punctuation; big_vision, which trained it, makes it a space first.
    texts = [t for t in captions(1000) + strange(500) + ODD if "_" not in t and clean_siglip(t)]
    expected = reference(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    ids, valid = ours(texts)
    assert differing(texts, ids, expected) == []
    assert ours.vocab_size == 500 and ours.length == 64
    long = texts.index("word " * 200)
    assert ids[long, -1] == 1 and valid[long].all()
    # The end and padding are one id.
    assert all(
        row[: n - 1].all() and (row[n - 1 :] == 1).all() for row, n in zip(ids, valid.sum(1), strict=True)
    )


def test_siglip_cleaning():
    assert clean_siglip(" A_b, (C)!  don't\tX ") == "a b c dont x"
    open_clip = require("open_clip")
    for text in captions(200) + strange(500) + ODD:
        assert clean_siglip(text) == open_clip.tokenizer.canonicalize_text(text)


def test_siglip2(siglip2):
    """Lower case and punctuation kept; padding is 0, and no start."""
    sentencepiece = require("sentencepiece")
    ours = load_tokenizer(siglip2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(siglip2 / "spiece.model"))
    texts = captions(200) + ODD
    ids, valid = ours(texts)
    assert ours.length == 64 and ours.vocab_size == 800
    for text, row, n in zip(texts, ids, valid.sum(1), strict=True):
        assert row[n - 1] == 1 and (row[n:] == 0).all()
        expected = model.encode(text.lower().encode("utf-16", "surrogatepass").decode("utf-16"))[:63]
        assert list(row[: n - 1]) == expected
    both = ours(["a Dog's <eos>", "a dog s"])[0]
    assert (both[0] == 1).sum() == 1 and not np.array_equal(both[0], both[1])


def test_siglip2_from_tokenizer_json(siglip2, tmp_path):
    transformers = require("transformers")
    sentencepiece = require("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(siglip2 / "spiece.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    # Gemma's converter: every split of a piece into two pieces is a merge, by the rank of the whole.
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab
        if not piece.startswith("<")
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    transformers.Siglip2Tokenizer(vocab=vocab, merges=merges).save_pretrained(tmp_path)
    ours, expected = load_tokenizer(tmp_path), load_tokenizer(siglip2)
    assert (tmp_path / "tokenizer.json").exists() and ours.vocab_size == expected.vocab_size
    texts = [text for text in captions(500) + ODD if text.strip()]
    assert differing(texts, ours(texts)[0], expected(texts)[0]) == []


@pytest.fixture(scope="module")
def tips(tmp_path_factory):
    """Ids and options as those of transformers' Tipsv2Tokenizer: padding, unknown, no end."""
    folder = tmp_path_factory.mktemp("tips") / "model"
    return train_sentencepiece(
        folder, model_type="bpe", unk_id=1, bos_id=-1, eos_id=-1, byte_fallback=True, vocab_size=800
    )


def test_tips(tips):
    """As google-deepmind/tips: lower case, no start and no end, cut at 64; padding is 0."""
    sentencepiece = require("sentencepiece")
    ours = load_tokenizer(tips)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tips / "spiece.model"))
    texts = [*captions(200), "A Dog, BIG.", "word " * 200]
    ids, valid = ours(texts)
    assert ours.length == 64 and ours.vocab_size == 800 and ours.end is None
    for text, row, n in zip(texts, ids, valid.sum(1), strict=True):
        assert list(row[:n]) == model.encode(text.lower())[:64] and (row[n:] == 0).all()
    assert valid[-1].all()
    # A vocabulary with an end has the same rows, if it is said to be TIPS's.
    same = load_tokenizer(tips, "tips")
    np.testing.assert_array_equal(same(texts)[0], ids)


def test_tips_from_tokenizer_json(tips, tmp_path):
    transformers, sentencepiece = require("transformers"), require("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tips / "spiece.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    merges = [
        (piece[:i], piece[i:])
        for piece in vocab
        if not piece.startswith("<")
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    published = transformers.Tipsv2Tokenizer(vocab=vocab, merges=merges)
    published.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, "tips")
    texts = [*captions(300), "A Dog, BIG.", "word " * 200]
    expected = published(texts, padding="max_length", truncation=True, max_length=64)
    ids, valid = ours(texts)
    assert differing(texts, ids, expected["input_ids"]) == []
    np.testing.assert_array_equal(valid, np.asarray(expected["attention_mask"], bool))


def test_siglip_from_tokenizer_json(siglip, tmp_path):
    transformers = require("transformers")
    fast = transformers.T5Tokenizer.from_pretrained(str(siglip), extra_ids=0)
    fast.save_pretrained(tmp_path)
    ours, expected = load_tokenizer(tmp_path / "tokenizer.json"), load_tokenizer(siglip)
    texts = [*captions(500), "", "a photo"]
    assert differing(texts, ours(texts)[0], expected(texts)[0]) == []


def test_pickled_for_loaders(siglip, wordpiece):
    for source in (siglip, wordpiece, bpe_path()):
        ours = load_tokenizer(source)
        again = pickle.loads(pickle.dumps(ours))
        np.testing.assert_array_equal(again(ODD)[0], ours(ODD)[0])


def test_kind_decides_where_a_folder_holds_several(siglip, wordpiece, tmp_path):
    for file in (siglip / "spiece.model", wordpiece / "vocab.txt"):
        shutil.copy(file, tmp_path)
    one, other = load_tokenizer(tmp_path, "wordpiece"), load_tokenizer(tmp_path, "siglip")
    assert one.vocab_size == load_tokenizer(wordpiece).vocab_size != other.vocab_size == 500
    # With SigLIP 2's cleaning punctuation stays.
    assert not np.array_equal(
        load_tokenizer(tmp_path, "siglip2")(["a, b"])[0][0, :3], other(["a, b"])[0][0, :3]
    )


@pytest.mark.parametrize("source", ["wordpiece", "siglip", "clip"])
def test_a_saved_one_is_the_same(source, request, tmp_path):
    folder = request.getfixturevalue(source) if source != "clip" else bpe_path().parent
    (tmp_path / "notes.txt").write_text("stays")
    load_tokenizer(folder).save(tmp_path)
    ours, again = load_tokenizer(folder), load_tokenizer(tmp_path)
    np.testing.assert_array_equal(again(captions(20))[0], ours(captions(20))[0])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes.txt", "checksums.json", *(file.name for file in ours.files)}
    (file, *_) = again.files
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file.name} does not match its checksum"):
        load_tokenizer(tmp_path)


def test_mistakes(siglip, wordpiece, tmp_path):
    with pytest.raises(UserError, match="list of texts"):
        load_tokenizer(siglip)("dog")
    with pytest.raises(UserError, match="length=2"):
        load_tokenizer(siglip, length=2)
    with pytest.raises(UserError, match=r"kind=bpe.*clip, wordpiece"):
        load_tokenizer(siglip, kind="bpe")
    with pytest.raises(UserError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds none of"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="of kind siglip, not clip"):
        load_tokenizer(siglip / "spiece.model", kind="clip")
    with pytest.raises(UserError, match="of kind wordpiece, not siglip"):
        load_tokenizer(wordpiece / "vocab.txt", kind="siglip")
    broken = {
        "vocab.txt": ("dog\ncat", "lacks .CLS"),
        "vocab.json": ('{"a": 0}', "merges.txt"),
        "tokenizer.json": ("{", "cannot be read"),
        "x.model": ("nonsense", "cannot be read"),
        BPE_FILE: ("nonsense", "cannot be read"),
        "notes.md": ("", "not a tokenizer"),
    }
    for name, (text, message) in broken.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)
    (tmp_path / "merges.txt").write_text("a b")
    with pytest.raises(UserError, match="not CLIP's vocabulary"):
        load_tokenizer(tmp_path / "vocab.json")
    cased = dict(normalizer=dict(lowercase=False), model=dict(max_input_chars_per_word=100, vocab={}))
    (tmp_path / "tokenizer.json").write_text(json.dumps(cased))
    with pytest.raises(UserError, match="cased"):
        load_tokenizer(tmp_path / "tokenizer.json")
    # Such a piece overflows the stack of `tokenizers`.
    long = dict(model=dict(type="Unigram", unk_id=0, vocab=[["a" * 10**6, 0.0], ["</s>", 0.0]]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(long))
    with pytest.raises(UserError, match="has 1000000 letters, more than 1000"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("package,source", [("tokenizers", "wordpiece"), ("sentencepiece", "siglip")])
def test_missing_package(package, source, request, monkeypatch):
    folder = request.getfixturevalue(source)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        load_tokenizer(folder)
