"""Captions to words: what a caption may be grounded by, and what an augmentation makes untrue.

OpenSeg grounds the nouns and adjectives of a caption (section 3.2); Table 5 compares three filters, which are
`FILTERS` here. A part-of-speech tagger reads the caption; the default one is TextBlob's PatternTagger, which
needs no download.
"""

import functools
import importlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from etils import epath
from jaxtyping import Int

from ovseg_jax.errors import UserError
from ovseg_jax.files import write_whole
from ovseg_jax.reading import array, read_json, reading, texts
from ovseg_jax.vocab.lexicon import LEXICON

Tagged = tuple[str, str]
"""A word in lower case and its part of speech: "noun", "adj", "verb" or "other"."""

FILTERS: dict[str, tuple[str, ...]] = {
    "all": ("noun", "adj", "verb", "other"),
    "noun+adj+verb": ("noun", "adj", "verb"),
    "noun+adj": ("noun", "adj"),
}
"""Caption filters of Table 5, and the parts of speech that each keeps."""

PAD = "<pad>"
TAGGERS = ("pattern", "nltk", "spacy")

_WORD = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*")
_COARSE = {"NN": "noun", "JJ": "adj", "VB": "verb"}


def keep_of(caption_filter: str) -> tuple[str, ...]:
    """The parts of speech that a caption filter of Table 5 keeps.

    Raises:
      UserError: no filter has that name.
    """
    if caption_filter not in FILTERS:
        raise UserError(f"caption_filter={caption_filter!r} is not one of {', '.join(map(repr, FILTERS))}")
    return FILTERS[caption_filter]


@functools.lru_cache(maxsize=1 << 15)
def _tag(caption: str, tagger: str) -> tuple[Tagged, ...]:
    """The cache behind `tag_words`: a caption is met again in every epoch."""
    # Captions shout and title-case at will, which a tagger takes for names: "A RED BALL" would hold no
    # adjective.
    tags = _mend(_penn_tagger(tagger)(" ".join(caption.lower().split())))
    words = []
    for token, tag in tags:
        # A clitic ("n", "t", "s" of "isn't", "dog's") is no word of its own.
        if _WORD.fullmatch(token) and (len(token) > 1 or token in ("a", "i")):
            words.append((token, _COARSE.get(tag[:2], "other")))
    return tuple(words)


def tag_words(caption: str, tagger: str = "pattern") -> list[Tagged]:
    """Splits a caption into words with their parts of speech, in order, without punctuation and numbers.

    Args:
      caption: English text.
      tagger: "pattern" (TextBlob's, no download), "nltk" (averaged perceptron) or "spacy" (en_core_web_sm).

    Raises:
      UserError: the tagger is unknown, not installed, or its model was not downloaded.
    """
    return list(_tag(caption, tagger))


def extract_words(
    caption: str, keep: Sequence[str] = ("noun", "adj"), tagger: str = "pattern"
) -> list[Tagged]:
    """The words of a caption whose part of speech is in `keep`, each once, in order of appearance."""
    words: dict[str, str] = {}
    for word, pos in tag_words(caption, tagger):
        if pos in keep:
            words.setdefault(word, pos)
    return list(words.items())


def spoiled(word: str, pos: str, rule: str) -> bool:
    """Whether a rule takes this word away.

    A rule is "pos:noun" (every word of that part of speech), "lexicon:colour" (every word of that entry of
    `LEXICON`), "words:grass,sand" (just these), or "all". A hyphenated word counts as its parts.

    Raises:
      UserError: the rule is not of these forms or names no lexicon.
    """
    kind, _, value = rule.partition(":")
    if rule == "all":
        return True
    if kind == "pos" and value in FILTERS["all"]:
        return pos == value
    if kind == "words" and value:
        return word in (w.strip() for w in value.split(","))
    if kind == "lexicon" and value in LEXICON:
        lexicon = LEXICON[value]
        return word in lexicon or ("-" in word and not lexicon.isdisjoint(word.split("-")))
    raise UserError(
        f"the word rule {rule!r} is not understood: use pos:{'|'.join(FILTERS['all'])}, "
        f"lexicon:{'|'.join(sorted(LEXICON))}, words:a,b,... or all"
    )


def without_spoiled(words: Sequence[Tagged], drop: Sequence[str], spare: Sequence[str] = ()) -> list[Tagged]:
    """The words that no rule of `drop` takes, or that a rule of `spare` protects.

    Blurring, say, makes the names of small things unreadable but not those of stuff:
    `drop=("pos:noun",), spare=("lexicon:stuff",)`. All words may go: a caption of which nothing is true any
    more grounds nothing.
    """
    return [
        (word, pos)
        for word, pos in words
        if not any(spoiled(word, pos, rule) for rule in drop) or any(spoiled(word, pos, r) for r in spare)
    ]


def split_words(text: str) -> list[str]:
    """The words of a name or phrase in lower case, without punctuation; numbers stay."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


class WordList:
    """The words that captions are grounded by; a word's id is its position, and id 0 is padding.

    Attributes:
      words: all words; `words[0]` is "<pad>".
      index: the id of each word.
    """

    def __init__(self, words: Iterable[str]):
        """Makes a list of `words` in this order, with the padding word put first; doubles are removed."""
        self.words: tuple[str, ...] = (PAD, *(w for w in dict.fromkeys(words) if w != PAD))
        self.index: dict[str, int] = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordList) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def id(self, word: str) -> int:
        """The word's id, and 0 (padding) for a word that is not in the list."""
        return self.index.get(word, 0)

    def ids(self, words: Sequence[str]) -> Int[np.ndarray, "k"]:
        """The ids of several words; 0 for those not in the list."""
        return np.array([self.id(word) for word in words], np.int32)

    def to_json(self) -> str:
        """Returns the words as a JSON list, which `load` reads from a file."""
        return json.dumps(list(self.words), ensure_ascii=False, indent=0)

    def save(self, path: epath.PathLike) -> None:
        """Writes the words as a JSON list."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: epath.PathLike) -> "WordList":
        """Reads what `save` wrote.

        Raises:
          UserError: the file is missing or is not a JSON list of words.
        """
        with reading(path, "the word list"):
            words = texts(array(read_json(path, "the word list"), "the list"), "the list")
            if not set(words) - {PAD}:
                raise ValueError("it holds no word")
            if blank := [word for word in words if not word.strip()]:
                raise ValueError(f"it holds {blank[0]!r}, which is no word")
            if len(set(words)) < len(words):
                raise ValueError(f"it holds {next(w for w, n in Counter(words).items() if n > 1)!r} twice")
        return cls(words)


def build_words(
    captions: Iterable[str],
    keep: Sequence[str] = ("noun", "adj"),
    min_count: int = 1,
    extra: Iterable[str] = (),
    *,
    tagger: str = "pattern",
    limit: int | None = None,
) -> WordList:
    """Counts the words of captions and lists them, the most frequent first (equal counts by alphabet).

    The captions are read one by one and not kept; PatternTagger takes half a minute or so for COCO's 600,000.

    Args:
      captions: texts, possibly very many.
      keep: parts of speech to keep, as of `keep_of`.
      min_count: words in fewer captions than this are left out.
      extra: words to list whether or not a caption holds them, after the others.
      tagger: as in `tag_words`.
      limit: read at most this many captions.
    """
    counts: Counter[str] = Counter()
    for caption in islice(captions, limit):
        counts.update(word for word, _ in extract_words(caption, tuple(keep), tagger))
    frequent = sorted((-n, word) for word, n in counts.items() if n >= min_count)
    return WordList([*(word for _, word in frequent), *extra])


def _mend(tags: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Mends Penn tags where a tagger made for newspapers misreads a caption's noun phrases.

    Captions are strings of noun phrases. Inside one that a determiner opens, a participle or verb before a
    noun describes it ("a dotted ball", "a lit candle"), and the phrase's last word is its noun, whatever else
    it could be ("a large bear", "a green net", "an orange").
    """
    tags = list(tags)
    for first, last in _phrases(tags):
        end = last - 1
        # The head: the rightmost noun already found, else the phrase's last word.
        head = next((i for i in range(end, first, -1) if tags[i][1].startswith("NN")), None)
        if head is None:
            head = end
            tags[head] = (tags[head][0], "NN")
        for i in range(first + 1, head):
            if tags[i][1].startswith("VB"):
                tags[i] = (tags[i][0], "JJ")
        if head < end and tags[end][1] == "VB":  # a bare infinitive has no place here: "a dotted drum"
            tags[end] = (tags[end][0], "NN")
    return tags


def _phrases(tags: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Spans [first, last) of noun phrases: a determiner, then adjectives, nouns and what could be either."""
    i = 0
    while i < len(tags):
        if tags[i][1] not in ("DT", "PRP$", "CD"):
            i += 1
            continue
        first = i
        i += 1
        seen_noun = False
        while i < len(tags):
            tag = tags[i][1]
            # A verb continues a phrase only before its noun: "a woman taking a photo" ends at "woman".
            inside = tag.startswith(("JJ", "NN")) or (not seen_noun and tag in ("VB", "VBN", "VBG", "VBD"))
            inside |= tag == "VBZ" and i == first + 1 and tags[first][1] == "CD"  # "two bears"
            joins = tag == "CC" and not seen_noun and i + 1 < len(tags) and tags[i + 1][1].startswith("JJ")
            if not inside and not (joins and i > first + 1):
                break
            seen_noun |= tag.startswith("NN")
            i += 1
        if i > first + 1:
            yield first, i


_LOADING = threading.Lock()


def _penn_tagger(name: str):
    """A function from a text to (token, Penn tag) pairs; loaded when first used, which takes a second."""
    with _LOADING:
        return _load_tagger(name)


@functools.cache
def _load_tagger(name: str):
    if name == "pattern":
        tag = _require(name, "textblob.en", "pip install textblob").tag
        # TextBlob fills its lexicon at the first call, and a second thread would read it half full: a run that was
        # taken up again, whose first captions are read by several threads, then learned from other words.
        tag("a red ball")
        return tag
    if name == "nltk":
        nltk = _require(name, "nltk", "pip install nltk")
        split = nltk.tokenize.TreebankWordTokenizer().tokenize
        try:
            nltk.pos_tag(["word"])
        except LookupError as e:
            raise UserError(
                'tagger="nltk" has no model: run python -m nltk.downloader averaged_perceptron_tagger_eng'
            ) from e
        return lambda text: nltk.pos_tag(split(text))
    if name == "spacy":
        spacy = _require(name, "spacy", "pip install spacy")
        try:
            model = spacy.load("en_core_web_sm", disable=("parser", "ner", "lemmatizer"))
        except OSError as e:
            raise UserError('tagger="spacy" has no model: run python -m spacy download en_core_web_sm') from e
        return lambda text: [(token.text, token.tag_) for token in model(text)]
    raise UserError(f"tagger={name!r} is not one of {', '.join(map(repr, TAGGERS))}")


def _require(tagger: str, module: str, install: str):
    """Imports a tagger's module, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f'tagger="{tagger}" needs the package {module.split(".")[0]}: run {install}') from e
