"""Transcribing a shard: real audio, real models (the demo's, and tiny random ones made here), on the CPU in int8."""

import gc
import hashlib
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import av
import jiwer
import numpy as np
import pytest

from benchmarks.asr import make_audio, write_opus
from benchmarks.random_whisper import SIZES, write_model
from cuepoint import failures
from cuepoint.asr import engine as engines
from cuepoint.asr import pipeline, shard
from cuepoint.asr.model import find_model
from cuepoint.asr.pipeline import Pipeline
from cuepoint.asr.shard import transcribe_shard
from cuepoint.asr.speech import Clip, Speech
from cuepoint.errors import ConfigError, DataError, EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status
from cuepoint.tables import read_metadata, read_table
from cuepoint.telemetry import Telemetry, read_telemetry
from demo.train import evaluate
from demo.train.evaluate import held_out_recordings, normalise

ROOT = Path(__file__).parents[1]
MANIFEST = {clip["video_id"]: clip for clip in json.loads((ROOT / "demo" / "manifest.json").read_text())}
SPOKEN = [name for name, clip in MANIFEST.items() if clip["kind"] == "speech"]
MANY = SPOKEN[:12]
SOME = SPOKEN[:8]
FEW = ["backup-school", "bread-day", "kitchen-basics", "night-sky"]
DEMO = TranscribeSettings(model=str(ROOT / "demo" / "asr-model"), device="cpu")
WORDS = DEMO.model_copy(update={"word_timestamps": True})


@pytest.fixture(scope="session")
def multilingual(tmp_path_factory):
    """A random model with 99 languages. It writes random words that nobody should believe; by default nobody asks."""
    folder = tmp_path_factory.mktemp("models") / "multilingual"
    write_model(folder, SIZES["micro"], tokens=12)
    return TranscribeSettings(model=str(folder), device="cpu", log_prob_threshold=-100)


@pytest.fixture(scope="session")
def doubtful(multilingual):
    """The same with Whisper's own threshold: all that it writes is doubtful."""
    return multilingual.model_copy(update={"log_prob_threshold": -1.0})


class Shard:
    """Downloaded audio in a results directory of its own, and its tables once it is transcribed."""

    def __init__(self, results, clips):
        self.layout = Layout(results)
        self.receipts = [self.add(name, ROOT / "demo" / "clips" / MANIFEST[name]["file"]) for name in clips]

    def add(self, video_id, source):
        audio = self.layout.audio(video_id)
        audio.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, audio)
        content = audio.read_bytes()
        return Receipt(
            video_id=video_id,
            url=f"https://example.org/{video_id}",
            status=Status.OK,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            audio_hash=hashlib.blake2b(content).hexdigest(),
            attempt=3,
        )

    def transcribe(self, settings=DEMO, *, threads=2, **others):
        paths = {"transcripts": self.layout.transcripts("00001"), "videos": self.layout.videos("00001")}
        transcribe_shard(self.receipts, self.layout, settings, threads=threads, **paths, **others)
        return self

    @property
    def files(self):
        return self.layout.transcripts("00001").read_bytes(), self.layout.videos("00001").read_bytes()

    @property
    def segments(self):
        return read_table(self.layout.transcripts("00001")).to_pylist()

    @property
    def videos(self):
        return {row["video_id"]: row for row in read_table(self.layout.videos("00001")).to_pylist()}

    @property
    def cached(self):
        return sorted((self.layout.state / "cache").rglob("*.parquet"))


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """Spoken clips of the demo, transcribed once; looked at and never changed."""
    return Shard(tmp_path_factory.mktemp("spoken"), MANY).transcribe()


@pytest.fixture(scope="session")
def spoken_words(tmp_path_factory):
    """Some of them with word times."""
    return Shard(tmp_path_factory.mktemp("words"), SOME).transcribe(WORDS)


def words_of(texts):
    return [" ".join(text.lower().replace(".", " ").replace(":", " ").split()) for text in texts]


def test_it_hears_no_worse_than_faster_whisper_file_by_file(tmp_path):
    """On recordings that the model was not trained on, with as many sentences as fill clips."""
    recordings = {f"held-out-{number}": each for number, each in enumerate(held_out_recordings(8, sentences=12))}
    heard = Shard(tmp_path / "results", [])
    for name, recording in recordings.items():
        path = tmp_path / f"{name}.mka"
        write_opus(path, (recording.audio.clip(-1, 1) * 32767).astype(np.int16))
        heard.receipts.append(heard.add(name, path))
    heard.transcribe()
    said = [normalise(recording.text) for recording in recordings.values()]
    ours = [" ".join(row["text"] for row in heard.segments if row["video_id"] == name) for name in recordings]
    model = evaluate.load()
    options = {"temperature": 0.0, "condition_on_previous_text": False, "vad_filter": True}
    theirs = [
        " ".join(segment.text for segment in model.transcribe(str(heard.layout.audio(name)), **options)[0])
        for name in recordings
    ]
    assert jiwer.wer(said, list(map(normalise, ours))) <= jiwer.wer(said, list(map(normalise, theirs))) + 0.005


@pytest.mark.parametrize("mode", ["spoken", "spoken_words"])
def test_segments_have_the_times_of_sentences(mode, request):
    off = []
    for row in request.getfixturevalue(mode).segments:
        same = [
            each
            for each in MANIFEST[row["video_id"]]["sentences"]
            if words_of([each["text"]]) == words_of([row["text"]])
        ]
        off += [max(abs(same[0]["start"] - row["start"]), abs(same[0]["end"] - row["end"]))] if len(same) == 1 else []
        assert row["start"] < row["end"] <= MANIFEST[row["video_id"]]["duration"] + 0.05
    assert len(off) >= 10, "hardly any sentence was heard word for word"
    assert sorted(off)[len(off) // 2] < 0.1  # seconds


def test_words_lie_inside_their_segment_in_order(spoken_words):
    for row in spoken_words.segments:
        assert "".join(word["word"] for word in row["words"]).split() == row["text"].split()
        starts = [word["start"] for word in row["words"]]
        assert starts == sorted(starts)
        assert row["start"] <= starts[0] + 0.01
        assert row["words"][-1]["end"] <= row["end"] + 0.01


def test_an_interrupted_shard_resumes_and_ends_the_same_to_the_byte(tmp_path, monkeypatch, spoken_words):
    interrupted = Shard(tmp_path, SOME)
    write, written = shard._write_cache, []

    def write_two(cache, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(cache, *rest)
        written.append(cache)

    monkeypatch.setattr(shard, "_write_cache", write_two)
    with pytest.raises(KeyboardInterrupt):
        interrupted.transcribe(WORDS)
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in interrupted.cached}
    assert len(before) == 2
    # Neither the order nor the number of threads may matter.
    interrupted.receipts.reverse()
    interrupted.transcribe(WORDS, threads=1)
    assert interrupted.files == spoken_words.files
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_cached_needs_neither_audio_nor_model_and_a_damaged_entry_is_computed_again(tmp_path, caplog):
    done = Shard(tmp_path, FEW).transcribe(keep_audio=False)
    files = done.files
    assert not any(done.layout.audio(name).exists() for name in FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "load", None)
        assert done.transcribe().files == files
    done.receipts[0] = done.add(FEW[0], ROOT / "demo" / "clips" / MANIFEST[FEW[0]]["file"])
    entry = next(path for path in done.cached if path.name.startswith(FEW[0]))
    entry.write_bytes(entry.read_bytes()[:-100])
    assert done.transcribe().files == files
    assert "it is computed again" in caplog.text


def test_a_setting_that_changes_results_is_computed_anew_and_one_that_does_not_is_not(tmp_path):
    done = Shard(tmp_path, ["bread-day"]).transcribe()
    done.transcribe(DEMO.model_copy(update={"batch_size": 1}))
    assert len(done.cached) == 1
    done.transcribe(DEMO.model_copy(update={"beam_size": 1}))
    assert len(done.cached) == 2


def test_lost_audio_is_asked_for_again_after_the_rest_of_the_shard_is_safe(tmp_path):
    broken = Shard(tmp_path, FEW)
    broken.layout.audio("backup-school").unlink()
    broken.layout.audio("bread-day").write_bytes(b"x" * broken.receipts[1].bytes)
    with pytest.raises(DataError, match=r"2 videos is .*\(backup-school, bread-day\).*downloaded again"):
        broken.transcribe()
    assert len(broken.cached) == 2
    assert not broken.layout.transcripts("00001").exists()
    for name in ("backup-school", "bread-day"):
        attempts = failures.read(broken.layout.failures(name))
        assert [(line.number, line.status) for line in attempts] == [(3, Status.PENDING)]
        assert failures.attempt_due(attempts) == 4


def test_every_receipt_gets_a_row_and_what_has_no_speech_ends_as_empty(tmp_path):
    mixed = Shard(tmp_path, ["bread-day", "silence", "corrupt"])
    private = Receipt(
        video_id="private", url="u", status=Status.UNAVAILABLE, error="Private video", upload_date="20240229"
    )
    picture = tmp_path / "picture.mkv"
    with av.open(picture, "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode(None))
    mixed.receipts += [private, mixed.add("picture", picture)]
    mixed.transcribe()
    ends = {name: (row["status"], row["error"]) for name, row in mixed.videos.items()}
    assert ends["private"] == ("unavailable", "Private video")
    assert ends["silence"] == ("empty", None)
    assert ends["picture"] == ("empty", "no audio track")
    assert ends["corrupt"][0] == "empty"
    assert "cannot be decoded" in ends["corrupt"][1]
    assert ends["bread-day"] == ("ok", None)
    assert mixed.videos["private"]["upload_date"].isoformat() == "2024-02-29"
    assert list(mixed.videos) == sorted(mixed.videos)


def test_the_language_is_that_of_a_videos_first_clips_whatever_else_is_in_the_batch(
    tmp_path, multilingual, monkeypatch
):
    monkeypatch.setattr(shard, "_transcribe", _with_batches_of(64))
    together = Shard(tmp_path / "together", FEW).transcribe(multilingual)
    alone = [Shard(tmp_path / name, [name]).transcribe(multilingual).videos[name] for name in FEW]
    assert list(together.videos.values()) == alone
    assert all(0 < row["language_probability"] < 1 for row in alone)
    assert {row["language"] for row in together.segments} <= {row["language"] for row in alone}


def test_each_clip_of_a_mixed_video_has_its_own_language_whatever_else_is_in_the_batch(
    tmp_path, multilingual, monkeypatch
):
    (talk,) = make_audio(tmp_path, [3])
    settings = multilingual.model_copy(update={"language": "each", "word_timestamps": True})
    detect, clips = engines.Engine._languages, iter(range(100))

    def varied(self, groups, encoded):
        """The random model hears one language only."""
        return [(("de", "en", "fr")[next(clips) % 3], probability) for _, probability in detect(self, groups, encoded)]

    monkeypatch.setattr(engines.Engine, "_languages", varied)

    def transcribed(name):
        mixed = Shard(tmp_path / name, [])
        mixed.receipts = [mixed.add("talk", talk)]
        return mixed.transcribe(settings, threads=1)

    together = transcribed("together")
    clips = iter(range(100))
    monkeypatch.setattr(shard, "_transcribe", _with_batches_of(1))
    monkeypatch.setattr(pipeline, "GROUP", 1)
    assert transcribed("alone").files == together.files
    assert {row["language"] for row in together.segments} == {"de", "en", "fr"}
    assert all(row["words"] for row in together.segments)
    assert together.videos["talk"]["language_probability"] > 0


def _with_batches_of(size):
    """Batches that mix videos, as on a GPU, on this machine's CPU."""

    def mixed(videos, caches, settings, *, files, **_):
        engine = engines.load(files, settings, None, workers=1)

        def finish(video, parts):
            shard._write_cache(caches[video.video_id], video, parts, settings, engine)

        Pipeline(engine, settings, finish).run(videos, lanes=1, preparers=1, batch=size)

    return mixed


def test_batches_that_mix_videos_change_no_bit_in_int8(tmp_path, spoken_words, monkeypatch):
    monkeypatch.setattr(shard, "_transcribe", _with_batches_of(16))
    assert Shard(tmp_path, SOME).transcribe(WORDS).files == spoken_words.files


def test_in_float32_neither_order_nor_threads_change_a_bit_either(tmp_path):
    exact = WORDS.model_copy(update={"compute_type": "float32"})
    first, second = Shard(tmp_path / "a", FEW), Shard(tmp_path / "b", FEW)
    second.receipts.reverse()
    assert first.transcribe(exact).files == second.transcribe(exact, threads=1).files


def test_a_full_gpu_halves_the_batch_and_loses_nothing(tmp_path, multilingual, monkeypatch, caplog):
    # There is no GPU here: CTranslate2's message comes from a stand-in for its memory, the rest is real.
    settings = multilingual.model_copy(update={"language": "de"})
    (talk,) = make_audio(tmp_path, [1.5])

    def transcribed(name):
        long = Shard(tmp_path / name, [])
        long.receipts = [long.add("talk", talk)]
        return long.transcribe(settings)

    whole = transcribed("whole")
    transcribe = engines.Engine.transcribe

    def with_room_for(clips):
        def limited(self, groups):
            if sum(len(group.features) for group in groups) > clips:
                raise RuntimeError("CUDA failed with error out of memory")
            return transcribe(self, groups)

        return limited

    monkeypatch.setattr(shard, "_transcribe", _with_batches_of(16))
    monkeypatch.setattr(engines.Engine, "transcribe", with_room_for(1))
    assert transcribed("halved").files == whole.files
    assert "going on with at most 1 at a time" in caplog.text
    monkeypatch.setattr(engines.Engine, "transcribe", with_room_for(0))
    with pytest.raises(EnvironmentFault, match="smaller model"):
        transcribed("none")


def test_what_is_held_in_memory_does_not_grow_with_a_videos_length(tmp_path, multilingual, monkeypatch):
    (talk,) = make_audio(tmp_path, [12])
    long = Shard(tmp_path / "results", [])
    long.receipts = [long.add("talk", talk)]
    transcribe, held = engines.Engine.transcribe, []

    def counted(self, groups):
        held.append(sum(type(each) is Clip for each in gc.get_objects()))
        return transcribe(self, groups)

    monkeypatch.setattr(shard, "_transcribe", _with_batches_of(1))
    monkeypatch.setattr(pipeline, "READY", 1)
    monkeypatch.setattr(engines.Engine, "transcribe", counted)
    long.transcribe(multilingual.model_copy(update={"language": "de"}))
    assert len(held) >= 5, "too short to tell"
    assert max(held) <= 3 * pipeline.GROUP  # in the model, ready, and being made ready


def test_what_the_model_leaves_out_at_the_end_of_a_window_is_decoded_too(tmp_path, monkeypatch, spoken):
    name = "backup-school"
    whole = [row for row in spoken.segments if row["video_id"] == name]
    transcribe, calls = engines.Engine.transcribe, []

    def stop_after_a_sentence(self, groups):
        """As models do whose window ends within a sentence: the last stamps are those of the sentence before."""
        calls.append(groups)
        results = transcribe(self, groups)
        if len(calls) > 1:
            return results
        ((clip,),) = results
        return [[replace(clip, segments=clip.segments[:1], rest_from=clip.segments[0].end)]]

    monkeypatch.setattr(engines.Engine, "transcribe", stop_after_a_sentence)
    found = Shard(tmp_path, [name]).transcribe().segments
    assert len(calls) == 2
    assert len(found) > 1
    assert found[0]["text"] == whole[0]["text"]
    assert found[1]["start"] >= found[0]["end"]
    assert found[-1]["end"] == pytest.approx(whole[-1]["end"], abs=1)


def test_what_was_decoded_again_to_its_end_has_no_rest(tmp_path, monkeypatch, spoken):
    name = "backup-school"
    transcribe = engines.Engine.transcribe

    def loop_and_stop(self, groups):
        """A loop in the first sentence of a window that then ends early."""
        ((clip,),) = transcribe(self, groups)
        return [[replace(clip, compression_ratio=9.9, rest_from=clip.segments[0].end)]]

    monkeypatch.setattr(engines.Engine, "transcribe", loop_and_stop)
    found = Shard(tmp_path, [name]).transcribe().segments
    whole = [row for row in spoken.segments if row["video_id"] == name]
    assert words_of([row["text"] for row in found]) == words_of([row["text"] for row in whole])
    assert not any(row["flags"] for row in found)


def test_towards_the_end_the_lanes_take_smaller_batches_so_that_they_end_together(tmp_path, multilingual, monkeypatch):
    (talk,) = make_audio(tmp_path, [9])
    long = Shard(tmp_path / "results", [])
    long.receipts = [long.add("talk", talk).model_copy(update={"duration": 540.0})]
    transcribe, sizes = engines.Engine.transcribe, []

    def counted(self, groups):
        sizes.append(sum(len(group.features) for group in groups))
        return transcribe(self, groups)

    monkeypatch.setattr(engines.Engine, "transcribe", counted)
    long.transcribe(multilingual.model_copy(update={"language": "de"}))
    assert sum(sizes) % pipeline.GROUP in {0, 3}, "groups as they are would end small by chance"
    assert max(sizes) == pipeline.GROUP
    assert max(sizes[-2:]) <= pipeline.GROUP // 2


def test_text_that_looks_wrong_is_decoded_again_alone_and_kept_with_its_flags(tmp_path, doubtful):
    first = Shard(tmp_path / "a", FEW[:2]).transcribe(doubtful)
    assert first.segments
    assert all({"low_confidence", "redecoded"} <= set(row["flags"]) for row in first.segments)
    assert sum(row["flagged"] for row in first.videos.values()) == len(first.segments)
    # The fallback draws at random, from the same seed for each clip: never from the order.
    again = Shard(tmp_path / "b", FEW[:2])
    again.receipts.reverse()
    assert again.transcribe(doubtful, threads=1).files == first.files


def test_what_sampling_gives_depends_on_the_clip_alone(doubtful, spoken):
    engine = engines.load(find_model(doubtful), doubtful, None, workers=1)
    clips = [next(iter(Speech(spoken.layout.audio(name)))).samples for name in FEW[:2]]
    first, second = (engine.redecode(clip, "de") for clip in clips)
    assert [engine.redecode(clip, "de") for clip in reversed(clips)] == [second, first]


def test_a_fixed_language_is_not_detected_and_one_that_the_model_lacks_is_refused(tmp_path, multilingual):
    german = Shard(tmp_path, FEW[:1]).transcribe(multilingual.model_copy(update={"language": "de"}))
    assert german.videos["backup-school"]["language"] == "de"
    assert german.videos["backup-school"]["language_probability"] is None
    with pytest.raises(ConfigError, match="English only"):
        Shard(tmp_path / "english", FEW[:1]).transcribe(DEMO.model_copy(update={"language": "de"}))
    with pytest.raises(ConfigError, match="none of the model's languages"):
        Shard(tmp_path / "unknown", FEW[:1]).transcribe(multilingual.model_copy(update={"language": "xx"}))


def test_the_table_says_what_made_it_and_telemetry_how(tmp_path):
    path = tmp_path / "telemetry" / "00001.parquet"
    with Telemetry(path, stage="transcribe", name="00001") as telemetry:
        done = Shard(tmp_path / "results", FEW).transcribe(telemetry=telemetry)
    metadata = read_metadata(done.layout.transcripts("00001"))
    assert metadata["model"]["revision"].startswith("sha256:")
    assert metadata["model"]["computed"] == ["int8_float32 on cpu"]
    assert metadata["vad"]["min_silence_duration_ms"] == 160
    assert metadata["settings"]["beam_size"] == 5
    last = read_telemetry(path)[1].to_pylist()[-1]
    assert last["audio_seconds"] == pytest.approx(sum(MANIFEST[name]["duration"] for name in FEW), abs=0.5)
    assert last["phase_model"] > 0
    assert (last["videos"], last["queue_clips"], last["queue_videos"]) == (4, 0, 0)


@pytest.mark.parametrize(
    ("missing", "message"), [("tokenizer.json", r"tokenizer\.json is missing"), ("", "neither a directory here")]
)
def test_a_model_that_cannot_be_used_is_named_before_any_work(tmp_path, missing, message, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "model"
    if missing:
        shutil.copytree(DEMO.model, folder)
        (folder / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        Shard(tmp_path / "results", FEW[:1]).transcribe(DEMO.model_copy(update={"model": str(folder)}))
