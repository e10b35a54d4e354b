"""Chunking: nothing is lost, nothing is too long, for any transcript and any tokenizer."""

import hashlib
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuepoint.chunks import Chunk, Segment, chunk_video, point_id
from cuepoint.errors import ConfigError
from cuepoint.settings import ChunkSettings

SPECIAL = 2  # tokens that a tokenizer puts around every text


def words_as_tokens(texts):
    return [len(text.split()) + SPECIAL for text in texts]


def characters_as_tokens(texts):
    return [len(text) + SPECIAL for text in texts]


def pairs_as_tokens(texts):
    """Merges across spaces, as some byte-pair vocabularies do: counts do not add up."""
    return [len(re.findall(r"..|.", text)) + SPECIAL for text in texts]


def erratic_tokens(texts):
    """Longer texts can have fewer tokens."""
    return [len(text.split()) + hashlib.md5(text.encode()).digest()[0] % 13 + SPECIAL for text in texts]


TOKENIZERS = [words_as_tokens, characters_as_tokens, pairs_as_tokens, erratic_tokens]

word = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=12)
marked_word = st.builds(lambda text, mark: text + mark, word, st.sampled_from(["", "", "", "", ".", "?", '."', "。"]))
flags = st.sampled_from([[], [], [], ["repetition"]])


@st.composite
def transcripts(draw):
    """Segments with and without words' times; now and then one begins, or its words run on, past the next one."""
    segments, now = [], 0.0
    for _ in range(draw(st.integers(0, 12))):
        start = max(0.0, now + draw(st.floats(-2, 30)))
        texts = draw(st.lists(marked_word, max_size=25))
        pauses = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 1.0]), min_size=len(texts), max_size=len(texts)))
        timed, now = [], start
        for text, pause in zip(texts, pauses, strict=True):
            timed.append({"word": f" {text}", "start": now + pause, "end": now + pause + 0.25, "probability": 1.0})
            now += pause + 0.25
        words = timed if draw(st.booleans()) else None
        end = now + draw(st.sampled_from([0.0, 0.0, 3.0]))
        segments.append(Segment(start, end, " " + " ".join(texts), words, draw(flags)))
    return segments


def unflagged_words(segments):
    return [text for segment in segments if not segment.flags for text in segment.text.split()]


def is_covered(words, chunks):
    """Whether the chunks' texts, one after another with their overlaps, spell the words in order."""
    wanted = "".join(words)
    reached = 0  # characters of `wanted` that the chunks so far cover
    for chunk in chunks:
        text = "".join(chunk.text.split())
        begin = next((i for i in range(reached, -1, -1) if wanted[i : i + len(text)] == text), None)
        if begin is None:
            return False
        reached = max(reached, begin + len(text))
    return reached == len(wanted)


@pytest.mark.parametrize("count_tokens", TOKENIZERS)
@given(
    segments=transcripts(),
    target=st.integers(16, 60),
    reads=st.integers(16, 40),
    overlap=st.integers(0, 3),
    gap=st.floats(0.5, 40),
)
@settings(max_examples=60, deadline=None)
def test_every_unflagged_word_is_in_a_chunk_and_no_chunk_is_too_long(
    count_tokens, segments, target, reads, overlap, gap
):
    rules = ChunkSettings(target_tokens=target, overlap_sentences=overlap, max_gap=gap)
    chunks = chunk_video(segments, rules, count_tokens, reads)
    assert is_covered(unflagged_words(segments), chunks)
    assert [chunk.chunk for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.tokens == count_tokens([chunk.text])[0] <= min(target, reads) for chunk in chunks)
    assert all(chunk.start <= chunk.end for chunk in chunks)
    starts, ends = [chunk.start for chunk in chunks], [chunk.end for chunk in chunks]
    assert starts == sorted(starts)
    assert ends == sorted(ends)


@given(gaps=st.lists(st.floats(0, 30), min_size=1, max_size=12), longest=st.floats(0.5, 20))
@settings(max_examples=60, deadline=None)
def test_no_chunk_spans_a_long_pause(gaps, longest):
    segments, now = [], 0.0
    for gap in gaps:
        segments.append(Segment(now + gap, now + gap + 4, "What is said here"))
        now += gap + 4
    chunks = chunk_video(segments, ChunkSettings(target_tokens=1000, max_gap=longest), words_as_tokens, 1000)
    pauses = [(before.end, after.start) for before, after in pairwise(segments)]
    long = [(begin, end) for begin, end in pauses if end - begin > longest]
    assert len(chunks) == 1 + len(long)
    assert not any(chunk.start < end and begin < chunk.end for chunk in chunks for begin, end in long)


def sentences(count, words=8, pause=0.5):
    """Segments of one sentence each; sentence i says i in every word."""
    texts = [" ".join([f"w{i}"] * words) + "." for i in range(count)]
    return [Segment(i * (4 + pause), i * (4 + pause) + 4, f" {text}") for i, text in enumerate(texts)]


def test_chunks_end_with_sentences_and_repeat_the_last_one():
    chunks = chunk_video(sentences(9), ChunkSettings(target_tokens=40 + SPECIAL), words_as_tokens, 512)
    said = [sorted({int(text.strip("w.")) for text in chunk.text.split()}) for chunk in chunks]
    assert said == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert chunks[0] == Chunk(0, 0.0, 22.0, chunks[0].text, 42)
    assert chunks[1].start == 18.0


def test_an_overlap_that_would_double_the_work_is_left_out():
    chunks = chunk_video(sentences(6, words=20), ChunkSettings(target_tokens=40 + SPECIAL), words_as_tokens, 512)
    assert sum(chunk.tokens - SPECIAL for chunk in chunks) == 6 * 20


def test_speech_without_full_stops_is_cut_at_the_longest_pause():
    words, now = [], 0.0
    for i in range(50):
        now += 2.0 if i in (20, 33) else 0.3
        words.append({"word": f" w{i}", "start": now - 0.2, "end": now, "probability": 1.0})
    text = "".join(word["word"] for word in words)
    chunks = chunk_video(
        [Segment(0, now, text, words)], ChunkSettings(target_tokens=24 + SPECIAL), words_as_tokens, 512
    )
    assert [chunk.text.split()[0] for chunk in chunks] == ["w0", "w20", "w33"]


def test_the_target_never_exceeds_what_the_model_reads():
    chunks = chunk_video(sentences(30), ChunkSettings(target_tokens=200), words_as_tokens, 64)
    assert max(chunk.tokens for chunk in chunks) <= 64


def test_a_prompt_that_leaves_no_room_is_a_configuration_error():
    with pytest.raises(ConfigError, match="shorten the prompt"):
        chunk_video(sentences(1), ChunkSettings(), lambda texts: [100 + len(text) for text in texts], 64)


def test_a_point_keeps_its_id_for_ever():
    """Points of a collection are replaced by ID: another ID for the same chunk would leave the old one behind."""
    assert point_id("dQw4w9WgXcQ", 3) == "239a2257-efdc-59ca-9087-cc58b5f5dab9"
    assert point_id("dQw4w9WgXcQ", 3) != point_id("dQw4w9WgXcQ", 4)
