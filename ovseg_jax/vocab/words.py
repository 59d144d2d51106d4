"""Words of captions: parts of speech, filters, and the vocabulary of a training set.

OpenSeg grounds the nouns and adjectives of a caption (section 3.2); Table 5 compares three filters, which are
`FILTERS` here. A part-of-speech tagger reads the caption; the default one is TextBlob's PatternTagger, which
needs no download.
"""

import functools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from etils import epath
from jaxtyping import Int

from ovseg_jax.errors import UserError, optional
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
    """Returns the parts of speech that a caption filter of Table 5 keeps.

    Raises:
      UserError: no filter has that name.
    """
    if caption_filter not in FILTERS:
        raise UserError(f"caption_filter={caption_filter!r} is not one of {', '.join(map(repr, FILTERS))}")
    return FILTERS[caption_filter]


@functools.lru_cache(maxsize=1 << 15)
def _tag(caption: str, tagger: str) -> tuple[Tagged, ...]:
    """Tags a caption; caches the result for `tag_words`, since each epoch reads a caption again."""
    # Lower case first: a tagger takes words in capitals for names, and "A RED BALL" would hold no adjective.
    tags = _mend(_penn_tagger(tagger)(" ".join(caption.lower().split())))
    words = []
    for token, tag in tags:
        # Clitics ("n", "t", "s" of "isn't", "dog's") are not words.
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
    """Returns the words of a caption whose part of speech is in `keep`, each once, in order of appearance."""
    words: dict[str, str] = {}
    for word, pos in tag_words(caption, tagger):
        if pos in keep:
            words.setdefault(word, pos)
    return list(words.items())


def spoiled(word: str, pos: str, rule: str) -> bool:
    """Tells whether a rule removes a word.

    A rule is "pos:noun" (every word of that part of speech), "lexicon:colour" (every word of that entry of `LEXICON`,
    also as a part of a hyphenated word), "words:grass,sand" (only these), or "all".

    Raises:
      UserError: the rule is not of these forms, or its lexicon does not exist.
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
        f"the word rule {rule!r} is unknown: use pos:{'|'.join(FILTERS['all'])}, "
        f"lexicon:{'|'.join(sorted(LEXICON))}, words:a,b,... or all"
    )


def without_spoiled(words: Sequence[Tagged], drop: Sequence[str], spare: Sequence[str] = ()) -> list[Tagged]:
    """Removes the words that a rule of `drop` matches, unless a rule of `spare` does too.

    After a blur, for example, small objects are unrecognisable but stuff is not: `drop=("pos:noun",),
    spare=("lexicon:stuff",)`. The result may be empty; such a caption grounds nothing.
    """
    return [
        (word, pos)
        for word, pos in words
        if not any(spoiled(word, pos, rule) for rule in drop) or any(spoiled(word, pos, r) for r in spare)
    ]


def split_words(text: str) -> list[str]:
    """Splits a name or phrase into lower-case words without punctuation; numbers stay."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


class WordList:
    """The vocabulary of captions; a word's id is its position, and id 0 is padding.

    Attributes:
      words: all words; `words[0]` is "<pad>".
      index: the id of each word.
    """

    def __init__(self, words: Iterable[str]):
        """Creates a list of `words` in this order after the padding word; duplicates are removed."""
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
        """Returns the id of a word, 0 (padding) if it is not in the list."""
        return self.index.get(word, 0)

    def ids(self, words: Sequence[str]) -> Int[np.ndarray, "k"]:
        """Returns the ids i32 [k] of several words, 0 for those not in the list."""
        return np.array([self.id(word) for word in words], np.int32)

    def to_json(self) -> str:
        """Returns the words as a JSON list, in the format of `load`."""
        return json.dumps(list(self.words), ensure_ascii=False, indent=0)

    def save(self, path: epath.PathLike) -> None:
        """Writes the words as a JSON list."""
        write_whole(path, self.to_json())

    @classmethod
    def load(cls, path: epath.PathLike) -> "WordList":
        """Reads a list that `save` wrote.

        Raises:
          UserError: the file is missing or is not a JSON list of words.
        """
        with reading(path, "the word list"):
            words = texts(array(read_json(path, "the word list"), "the list"), "the list")
            if not words:  # A tokeniser of word pieces needs no word but the padding.
                raise ValueError("it lists no word")
            if blank := [word for word in words if not word.strip()]:
                raise ValueError(f"it lists {blank[0]!r}, which is not a word")
            if len(set(words)) < len(words):
                raise ValueError(f"it lists {next(w for w, n in Counter(words).items() if n > 1)!r} twice")
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
    """Counts the words of captions and lists them, the most frequent first (ties alphabetically).

    The captions are read one by one and not kept; PatternTagger takes about half a minute for COCO's 600,000.

    Args:
      captions: texts; they may be too many for memory.
      keep: parts of speech to keep, see `keep_of`.
      min_count: words in fewer captions than this are left out.
      extra: words to list whether or not a caption holds them, after the others.
      tagger: as in `tag_words`.
      limit: the maximum number of captions to read.
    """
    counts: Counter[str] = Counter()
    for caption in islice(captions, limit):
        counts.update(word for word, _ in extract_words(caption, tuple(keep), tagger))
    frequent = sorted((-n, word) for word, n in counts.items() if n >= min_count)
    return WordList([*(word for _, word in frequent), *extra])


def _mend(tags: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Corrects Penn tags where a tagger trained on newspapers misreads a caption's noun phrases.

    In a noun phrase that starts with a determiner, a participle or verb before a noun is an adjective ("a dotted
    ball", "a lit candle"), and the last word is the noun, whatever its tag ("a large bear", "a green net", "an
    orange").
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
        if head < end and tags[end][1] == "VB":  # a bare infinitive cannot follow a noun: "a dotted drum"
            tags[end] = (tags[end][0], "NN")
    return tags


def _phrases(tags: Sequence[tuple[str, str]]) -> Iterator[tuple[int, int]]:
    """Yields spans [first, last) of noun phrases: a determiner, then adjectives, nouns and words that may be either."""
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
    """Returns a function from a text to (token, Penn tag) pairs, loaded at first use (about a second)."""
    with _LOADING:
        return _load_tagger(name)


@functools.cache
def _load_tagger(name: str):
    if name == "pattern":
        tag = _require(name, "textblob.en", "pip install textblob").tag
        # TextBlob fills its lexicon during the first call, and another thread would read it half full: a resumed run,
        # whose first captions are read by several threads, would then learn from other words.
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
    """Imports a tagger's module, or raises a UserError that says how to install it."""
    return optional(module, f'tagger="{tagger}" needs the package {module.split(".")[0]}: run {install}')
