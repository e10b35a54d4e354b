"""The parts of transcription: speech in audio of any length, times of clips, stamps, and what looks wrong."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from faster_whisper.audio import decode_audio
from faster_whisper.vad import VadOptions, get_speech_timestamps

from cuepoint.asr import speech
from cuepoint.asr.engine import Decoded, Segment, choose_compute_type, split_at_stamps
from cuepoint.asr.model import PINNED, find_model
from cuepoint.asr.safety import Flag, suspicions
from cuepoint.asr.speech import PAUSE, RATE, VAD, Clip, Speech, Stretch, Timeline, find_speech, pack
from cuepoint.errors import ConfigError, EnvironmentFault
from cuepoint.settings import TranscribeSettings

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "demo" / "clips"
MANIFEST = json.loads((ROOT / "demo" / "manifest.json").read_text())
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STAMP = 1000  # the first stamp's token in these tests


def samples_of(name):
    return (decode_audio(str(CLIPS / f"{name}.opus")) * 32768).astype(np.int16)


@pytest.fixture(scope="module")
def talk():
    """Two and a half minutes of the demo's voices, (n,) int16."""
    names = [clip["video_id"] for clip in MANIFEST if clip["kind"] == "speech"][:10]
    return np.concatenate([samples_of(name) for name in names])


def test_speech_found_block_by_block_is_the_speech_of_the_whole_file(talk):
    whole = get_speech_timestamps(talk.astype(np.float32) / 32768, VadOptions(**VAD))
    spoken = np.zeros(len(talk), bool)
    for stretch in whole:
        spoken[stretch["start"] : stretch["end"]] = True
    found = np.zeros(len(talk), bool)
    ended = 0
    for stretch in find_speech(talk[at : at + 40 * RATE] for at in range(0, len(talk), 40 * RATE)):
        start, samples = stretch.start, stretch.samples
        assert len(stretch.pause) == (start - ended if start - ended <= PAUSE else 0)
        assert (stretch.pause == talk[start - len(stretch.pause) : start]).all()
        ended = start + len(samples)
        assert not found[start : start + len(samples)].any(), "the same speech twice"
        assert (samples == talk[start : start + len(samples)]).all()
        found[start : start + len(samples)] = True
    assert (found != spoken).mean() < 0.01


def test_no_sentence_is_lost_between_blocks(monkeypatch):
    monkeypatch.setattr(speech, "BLOCK", 35 * RATE)
    heard = Speech(CLIPS / "query-clinic.opus")
    sections = [section for clip in heard for section in clip.timeline.sections]
    (clip,) = [clip for clip in MANIFEST if clip["video_id"] == "query-clinic"]
    for sentence in clip["sentences"]:
        middle = (sentence["start"] + sentence["end"]) / 2 * RATE
        assert any(start <= middle < end for start, end in sections), sentence["text"]
    assert heard.duration == pytest.approx(clip["duration"], abs=0.05)
    pauses = sum(end - start for start, end in sections) / RATE - heard.speech_duration
    assert 0 <= pauses < 2 * len(clip["sentences"])


def test_memory_does_not_grow_with_the_length_of_a_video(monkeypatch, talk):
    monkeypatch.setattr(speech, "BLOCK", 60 * RATE)

    def peak(times):
        blocks = (talk[at : at + 60 * RATE] for _ in range(times) for at in range(0, len(talk), 60 * RATE))
        tracemalloc.start()
        count = sum(1 for _ in pack(find_speech(blocks)))
        return count, tracemalloc.get_traced_memory()[1], tracemalloc.stop()

    few, small, _ = peak(1)
    many, large, _ = peak(6)
    assert many > 5 * few
    assert large < 1.2 * small


def test_a_time_in_a_clip_is_found_in_its_file():
    timeline = Timeline(((10 * RATE, 12 * RATE), (60 * RATE, 63 * RATE)))
    assert timeline.seconds == 5
    assert [timeline.time(at) for at in (0, 1.5, 2, 4.25)] == [10, 11.5, 60, 62.25]
    assert [timeline.time(at, end=True) for at in (2, 5, 9)] == [12, 63, 63]
    rest = Clip(np.zeros(5 * RATE, np.int16), timeline).after(1.5)
    assert rest.seconds == rest.timeline.seconds == 3.5
    assert rest.timeline.sections == ((int(11.5 * RATE), 12 * RATE), (60 * RATE, 63 * RATE))
    assert timeline.after(3 * RATE).sections == ((61 * RATE, 63 * RATE),)


def stretch(start, seconds, pause=0.0):
    return Stretch(start * RATE, np.ones(seconds * RATE, np.int16), np.zeros(int(pause * RATE), np.int16))


def test_clips_are_filled_and_never_longer_than_a_window():
    stretches = [stretch(at * 20, length) for at, length in enumerate([12, 12, 12, 28, 1])]
    assert [clip.seconds for clip in pack(stretches)] == [24, 12, 29]


def test_short_pauses_stay_in_a_clip_and_long_ones_are_cut_out():
    first, second = pack([stretch(0, 10), stretch(11, 9, pause=1), stretch(30, 8), stretch(39, 5, pause=1)])
    assert first.timeline.sections == ((0, 20 * RATE), (30 * RATE, 38 * RATE))
    assert first.seconds == first.timeline.seconds == 28
    assert not first.samples[10 * RATE : 11 * RATE].any()
    assert second.timeline.sections == ((39 * RATE, 44 * RATE),)


@pytest.mark.parametrize(
    ("tokens", "pieces", "rest"),
    [
        ([STAMP, 1, 2, STAMP + 100], [(0.0, 2.0, [1, 2])], None),
        ([STAMP, 1, STAMP + 100, STAMP + 150, 2, STAMP + 400], [(0.0, 2.0, [1]), (3.0, 8.0, [2])], None),
        # A sentence that has no end stamp is kept to the end of the clip: stock batched decoding drops it.
        ([STAMP, 1, STAMP + 100, STAMP + 100, 2], [(0.0, 2.0, [1]), (2.0, 20.0, [2])], None),
        # A start stamp alone: the model stopped there, and the rest is decoded again.
        ([STAMP, 1, STAMP + 100, STAMP + 100], [(0.0, 2.0, [1])], 2.0),
        ([STAMP, 1, STAMP + 980, STAMP + 980], [(0.0, 19.6, [1])], None),
        ([1, 2], [(0.0, 20.0, [1, 2])], None),
        ([STAMP], [], None),
        ([], [], None),
        ([STAMP + 50, 1, STAMP + 1500], [(1.0, 20.0, [1])], None),
    ],
)
def test_tokens_become_pieces_with_times_and_no_text_is_dropped(tokens, pieces, rest):
    found, found_rest = split_at_stamps(tokens, STAMP, 20.0)
    assert [(piece["start"], piece["end"], piece["tokens"]) for piece in found] == pieces
    assert found_rest == rest


def decoded(*texts, seconds=1, language="en", avg_logprob=-0.3, no_speech_prob=0.1, compression_ratio=1.2):
    return Decoded(
        language=language,
        language_probability=None,
        segments=tuple(Segment(at, at + seconds, text) for at, text in enumerate(texts)),
        avg_logprob=avg_logprob,
        no_speech_prob=no_speech_prob,
        compression_ratio=compression_ratio,
    )


@pytest.mark.parametrize(
    ("clip", "flags"),
    [
        (decoded("A good sentence.", "And one more."), [set(), set()]),
        (decoded("Thanks for watching!", "It was fun."), [{Flag.HALLUCINATION_PHRASE}, set()]),
        (decoded("He said thanks for watching the children."), [set()]),
        (decoded("Vielen Dank fürs Zuschauen!", language="de"), [{Flag.HALLUCINATION_PHRASE}]),
        (decoded("ご視聴ありがとうございました。", language="ja"), [{Flag.HALLUCINATION_PHRASE}]),
        (decoded("I am. " * 20), [{Flag.REPETITION}]),
        (decoded("No, no, no, no."), [set()]),
        (decoded("ありがとうございました、" * 4, language="ja"), [{Flag.REPETITION}]),
        (decoded("はい、はい、はい、はい。", language="ja"), [set()]),
        (decoded("Okay.", "Okay.", "Okay.", "Right."), [{Flag.REPETITION}] * 3 + [set()]),
        (decoded("x", compression_ratio=2.5), [{Flag.REPETITION}]),
        (decoded("x", avg_logprob=-1.1), [{Flag.LOW_CONFIDENCE}]),
        (decoded("x", avg_logprob=-1.1, no_speech_prob=0.7), [{Flag.LOW_CONFIDENCE, Flag.NO_SPEECH}]),
        (decoded("x", no_speech_prob=0.9), [set()]),
        (decoded("Thank you.", seconds=20), [{Flag.NO_SPEECH}]),
        (decoded("Thank you.", seconds=9), [set()]),
        (decoded("He spoke slowly, but he spoke.", seconds=20), [set()]),
    ],
)
def test_what_looks_wrong_is_flagged_and_why(clip, flags):
    assert suspicions(clip, TranscribeSettings()) == flags


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A Hugging Face cache of our own, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "models--Systran--faster-whisper-tiny"


def test_a_cached_model_is_used_as_it_is_and_known_by_its_commit(hub_cache):
    (hub_cache / "refs").mkdir(parents=True)
    (hub_cache / "refs" / "main").write_text(COMMIT)
    snapshots = {commit: hub_cache / "snapshots" / commit for commit in (COMMIT, PINNED["tiny"])}
    for snapshot in snapshots.values():
        snapshot.mkdir(parents=True)
        for name in ("model.bin", "config.json", "tokenizer.json"):
            (snapshot / name).write_text("")
    for model, revision, commit in [
        ("Systran/faster-whisper-tiny", None, COMMIT),
        ("tiny", COMMIT, COMMIT),
        ("tiny", None, PINNED["tiny"]),
    ]:
        found = find_model(TranscribeSettings(model=model, revision=revision))
        assert (found.revision, found.folder) == (commit, snapshots[commit])


def test_a_model_that_cannot_be_fetched_is_the_machines_fault_and_one_that_does_not_exist_the_settings(hub_cache):
    with pytest.raises(EnvironmentFault, match="connect this machine once"):
        find_model(TranscribeSettings(model="tiny"))
    with pytest.raises(ConfigError, match="neither a directory here"):
        find_model(TranscribeSettings(model="no-such-model"))


def test_a_local_model_is_known_by_its_files_wherever_it_is(tmp_path):
    def model(folder, weights):
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_text("{}")
        (folder / "model.bin").write_text(weights)
        return find_model(TranscribeSettings(model=str(folder))).revision

    assert model(tmp_path / "a", "1") == model(tmp_path / "b", "1") != model(tmp_path / "c", "2")


def test_the_arithmetic_is_the_fastest_that_the_device_has():
    auto, fixed = TranscribeSettings(), TranscribeSettings(compute_type="bfloat16")
    assert choose_compute_type(auto, {"float32", "int8"}, "cpu") == "int8"
    modern = {"float32", "int8", "float16", "int8_float16"}
    assert choose_compute_type(auto, modern, "cuda") == "float16"
    assert choose_compute_type(auto, modern, "cuda", roomy=False) == "int8_float16"
    assert choose_compute_type(auto, {"float32", "int8"}, "cuda") == "int8"  # before compute capability 7
    with pytest.raises(ConfigError, match=r"bfloat16.*float32, int8"):
        choose_compute_type(fixed, {"float32", "int8"}, "cpu")
