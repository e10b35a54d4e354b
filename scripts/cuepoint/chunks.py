"""Chunks: consecutive segments of one video, packed into passages that the embedding model reads whole.

Pure functions of one video's segments and of the model's own tokenizer. A chunk is cut at the ends of sentences where
there are any, else at the longest pause; it repeats the last sentences of the one before where that is cheap; it never
spans a long pause, and it never holds more tokens than the model reads. Every word of every unflagged segment is in at
least one chunk, in order.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cuepoint.errors import ConfigError
from cuepoint.settings import ChunkSettings

VERSION = 1
"""Of the rules below: raise it when they cut a transcript differently."""

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text as the model reads it as a passage: prompt and special tokens counted, nothing cut off."""

POINTS = uuid.UUID("6f89858f-2e9e-51e0-b851-d50e2cb735ed")  # namespace of the point IDs: never changes
OVERLAP_SHARE = 4  # repeated sentences take at most 1/4 of a chunk's tokens: more would multiply the work
_SENTENCE_END = re.compile(r"""[.?!…。！？]["'”’»)\]」』]*$""")  # noqa: RUF001  (marks of other scripts are meant)


@dataclass(frozen=True)
class Segment:
    """One segment of a transcript; `words` as in the transcript tables, when there are any."""

    start: float  # seconds
    end: float
    text: str
    words: Sequence[Mapping[str, Any]] | None = None
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class Chunk:
    """One passage: what is embedded as one vector."""

    chunk: int  # from 0, in order of time
    start: float  # seconds, of its first word
    end: float  # seconds, of its last word
    text: str
    tokens: int  # as the model reads it


@dataclass(frozen=True)
class _Word:
    """A word (or a part of one that alone is too long), with the space before it."""

    text: str
    start: float
    end: float


_Sentence = list[_Word]  # never empty


def point_id(video_id: str, chunk: int) -> str:
    """ID of a chunk's point: the same chunk of the same video always has the same."""
    return str(uuid.uuid5(POINTS, f"{video_id}/{VERSION}/{chunk}"))


def chunk_video(
    segments: Iterable[Segment], settings: ChunkSettings, count_tokens: CountTokens, max_tokens: int
) -> list[Chunk]:
    """Cut one video's segments (in order of time) into chunks of at most `max_tokens` and about the target.

    Segments with flags are left out. Raises ConfigError when not even one character fits the limit.
    """
    limit = min(settings.target_tokens, max_tokens)
    words = _in_order(word for segment in segments if not segment.flags for word in _words(segment))
    chunks: list[Chunk] = []
    for run in _runs(words, settings.max_gap):
        for sentence_group, tokens in _pack(_sentences(run), settings, count_tokens, limit):
            group = [word for sentence in sentence_group for word in sentence]
            chunks.append(Chunk(len(chunks), group[0].start, group[-1].end, _text(group), tokens))
    return chunks


def _words(segment: Segment) -> list[_Word]:
    """The segment's words: with their own times where the transcript has them, else shared out by characters."""
    timed = [word for word in segment.words or () if word["word"].strip()]
    if "".join("".join(word["word"] for word in timed).split()) == "".join(segment.text.split()):
        words = [_Word(word["word"].rstrip(), word["start"], word["end"]) for word in timed]
    else:
        words = _interpolated(segment)
    # Segments are apart even if the recognizer put no space before the first word of one.
    return [replace(words[0], text=f" {words[0].text.strip()}"), *words[1:]] if words else []


def _interpolated(segment: Segment) -> list[_Word]:
    texts = segment.text.split()
    duration = max(0.0, segment.end - segment.start)
    length = max(1, sum(map(len, texts)))
    words, position = [], 0
    for text in texts:
        start = segment.start + duration * position / length
        position += len(text)
        words.append(_Word(f" {text}", start, segment.start + duration * position / length))
    return words


def _in_order(words: Iterable[_Word]) -> list[_Word]:
    """The same words with times that never run back: recognizers now and then let two segments overlap."""
    ordered: list[_Word] = []
    start = end = float("-inf")
    for word in words:
        start = max(start, word.start)
        end = max(end, start, word.end)
        ordered.append(replace(word, start=start, end=end))
    return ordered


def _runs(words: list[_Word], max_gap: float) -> Iterator[list[_Word]]:
    """Stretches of speech without a pause longer than `max_gap` seconds."""
    begin = 0
    for i in range(1, len(words) + 1):
        if i == len(words) or words[i].start - words[i - 1].end > max_gap:
            if words[begin:i]:
                yield words[begin:i]
            begin = i


def _sentences(run: list[_Word]) -> list[_Sentence]:
    sentences: list[_Sentence] = [[]]
    for word in run:
        sentences[-1].append(word)
        if _SENTENCE_END.search(word.text):
            sentences.append([])
    return sentences if sentences[-1] else sentences[:-1]


def _pack(
    sentences: list[_Sentence], settings: ChunkSettings, count_tokens: CountTokens, limit: int
) -> Iterator[tuple[list[_Sentence], int]]:
    """Groups of sentences with their tokens, each within `limit` and repeating the end of the one before."""
    whole = list(_within(sentences, count_tokens, limit))
    sentences = [sentence for sentence, _ in whole]
    # What a sentence adds to a chunk; exact for most tokenizers, an estimate for those that merge across spaces.
    empty = count_tokens([""])[0]
    sizes = [max(0, tokens - empty) for _, tokens in whole]
    first, fresh = 0, 0  # first sentence of the chunk, first one that no chunk has yet
    while fresh < len(sentences):
        last = fresh + 1
        while last < len(sentences) and empty + sum(sizes[first : last + 1]) <= limit:
            last += 1
        tokens = count_tokens([_joined(sentences[first:last])])[0]
        while tokens > limit and (last > fresh + 1 or first < fresh):
            last, first = (last - 1, first) if last > fresh + 1 else (last, first + 1)
            tokens = count_tokens([_joined(sentences[first:last])])[0]
        yield sentences[first:last], tokens
        repeated = _repeated(sizes[first + 1 : last], settings.overlap_sentences, limit // OVERLAP_SHARE)
        while repeated and last < len(sizes) and empty + sum(sizes[last - repeated : last + 1]) > limit:
            repeated -= 1
        first, fresh = last - repeated, last


def _repeated(sizes: Sequence[int], sentences: int, tokens: int) -> int:
    """How many of the last sentences, given by size, the next chunk repeats: within both limits."""
    repeated = 0
    for size in list(reversed(sizes))[:sentences]:
        tokens -= size
        if tokens < 0:
            break
        repeated += 1
    return repeated


def _within(sentences: Iterable[_Sentence], count_tokens: CountTokens, limit: int) -> Iterator[tuple[_Sentence, int]]:
    """The sentences with their tokens; one that is longer than `limit` comes in parts."""
    sentences = list(sentences)
    counts = count_tokens([_text(sentence) for sentence in sentences])
    for sentence, tokens in zip(sentences, counts, strict=True):
        if tokens <= limit:
            yield sentence, tokens
        else:
            yield from _parts(sentence, count_tokens, limit)


def _parts(sentence: _Sentence, count_tokens: CountTokens, limit: int) -> Iterator[tuple[_Sentence, int]]:
    """An overlong sentence in parts that fit, cut at the longest pause in the second half of what fits."""
    rest = sentence
    while rest:
        fits, tokens = _longest_prefix(rest, count_tokens, limit)
        if fits == 0:
            rest = [*_halves(rest[0], limit), *rest[1:]]
            continue
        cut = _longest_pause(rest, fits) if fits < len(rest) else fits
        if cut < fits:
            shorter = count_tokens([_text(rest[:cut])])[0]
            cut, tokens = (cut, shorter) if shorter <= limit else (fits, tokens)  # fewer words can be more tokens
        yield rest[:cut], tokens
        rest = rest[cut:]


def _longest_pause(words: _Sentence, fits: int) -> int:
    """How many words stand before the longest pause in the second half of those that fit (the last one of equals)."""
    candidates = range(max(1, fits // 2), fits + 1)
    return max(candidates, key=lambda i: (words[i].start - words[i - 1].end, i))


def _longest_prefix(words: _Sentence, count_tokens: CountTokens, limit: int) -> tuple[int, int]:
    """How many of the words fit together, by bisection, and their tokens; 0 when not even the first does."""
    low, high, tokens = 0, len(words), 0
    while low < high:
        middle = (low + high + 1) // 2
        count = count_tokens([_text(words[:middle])])[0]
        if count <= limit:
            low, tokens = middle, count
        else:
            high = middle - 1
    return low, tokens


def _halves(word: _Word, limit: int) -> list[_Word]:
    """A word that alone is too long (no spaces in its script, or noise), in two."""
    text = word.text.strip()
    if len(text) < 2:
        raise ConfigError(
            f"chunking.target_tokens and the model's max_tokens leave room for {limit} tokens, and {text!r} alone has "
            "more (the passage prompt and special tokens count too): raise them or shorten the prompt"
        )
    half = len(text) // 2
    middle = word.start + (word.end - word.start) * half / len(text)
    space = word.text[: len(word.text) - len(word.text.lstrip())]
    return [_Word(space + text[:half], word.start, middle), _Word(text[half:], middle, word.end)]


def _text(words: Iterable[_Word]) -> str:
    return "".join(word.text for word in words).strip()


def _joined(sentences: Iterable[_Sentence]) -> str:
    return _text(word for sentence in sentences for word in sentence)
