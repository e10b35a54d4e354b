"""Measures the demo model through faster-whisper. Run as ``python -m demo.train.evaluate`` from the repository root.

Prints the table of the model card: word error rates and time errors on held-out recordings and on the demo's clips,
sequential and batched. Tests use the same functions.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import jiwer
import numpy as np
from faster_whisper import BatchedInferencePipeline, WhisperModel
from faster_whisper.audio import decode_audio
from faster_whisper.transcribe import Segment
from faster_whisper.vad import VadOptions, get_speech_timestamps

from demo.train.recordings import Recording, Sentence, Word, record
from demo.train.speech import SAMPLE_RATE

DEMO = Path(__file__).parents[1]
MODEL = DEMO / "asr-model"
SEED = 1_000_000
MAX_REGION = 28.0  # seconds

Transcriber = Callable[[list[Recording]], list[list[Segment]]]


def normalise(text: str) -> str:
    """Lower-case words without punctuation."""
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def word_error_rate(reference: str, hypothesis: str) -> float:
    """Wrong, missing and extra words as a share of the reference's words, without case and punctuation."""
    return jiwer.wer(normalise(reference), normalise(hypothesis))


def held_out_recordings(count: int, sentences: int = 5, noise: float = 0.0) -> list[Recording]:
    """Trained voices at other rates and pitches, sentences never trained on; the same in every new process."""
    return [record(SEED + i, sentences, noise=noise) for i in range(count)]


def clip_recordings() -> list[Recording]:
    """The demo's speech clips with their manifest's truth."""
    recordings = []
    for clip in json.loads((DEMO / "manifest.json").read_text()):
        if clip["kind"] == "speech":
            said = [
                Sentence(**{**entry, "words": [Word(**word) for word in entry["words"]]}) for entry in clip["sentences"]
            ]
            recordings.append(Recording(decode_audio(str(DEMO / "clips" / clip["file"])), said))
    return recordings


def load(folder: Path = MODEL) -> WhisperModel:
    """The model on one CPU thread."""
    return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1, local_files_only=True)


def sequential(model: WhisperModel, **options) -> Transcriber:
    """One recording after another, greedily and without earlier text."""

    def transcribe(recordings: list[Recording]) -> list[list[Segment]]:
        settings = {
            "language": "en",
            "beam_size": 1,
            "temperature": 0.0,
            "condition_on_previous_text": False,
            **options,
        }
        return [list(model.transcribe(recording.audio, **settings)[0]) for recording in recordings]

    return transcribe


def batched(model: WhisperModel, longest: float = MAX_REGION, **options) -> Transcriber:
    """The speech of all recordings, as clips of one long audio, in batches.

    Neighbouring speech regions make one clip while it stays within ``longest`` seconds; with 0 each is a clip.
    """

    def transcribe(recordings: list[Recording]) -> list[list[Segment]]:
        vad = VadOptions(max_speech_duration_s=MAX_REGION, min_silence_duration_ms=500)
        clips, starts, offset = [], [], 0
        for recording in recordings:
            starts.append(offset / SAMPLE_RATE)
            for region in merge(get_speech_timestamps(recording.audio, vad), longest):
                clips.append({key: (region[key] + offset) / SAMPLE_RATE for key in ("start", "end")})
            offset += len(recording.audio)
        segments, _ = BatchedInferencePipeline(model).transcribe(
            np.concatenate([recording.audio for recording in recordings]),
            language="en",
            clip_timestamps=clips,
            batch_size=8,
            **{"beam_size": 1, "temperature": 0.0, "without_timestamps": False, **options},
        )
        found: list[list[Segment]] = [[] for _ in recordings]
        for segment in segments:
            middle = (segment.start + segment.end) / 2  # word times may move a start back into the recording before
            number = int(np.searchsorted(starts, middle, side="right")) - 1
            segment.start -= starts[number]
            segment.end -= starts[number]
            for word in segment.words or []:
                word.start -= starts[number]
                word.end -= starts[number]
            found[number].append(segment)
        return found

    return transcribe


def merge(regions: list[dict], longest: float) -> list[dict]:
    """Neighbouring speech regions (in samples) joined while they stay within ``longest`` seconds."""
    joined: list[dict] = []
    for region in regions:
        if joined and region["end"] - joined[-1]["start"] <= longest * SAMPLE_RATE:
            joined[-1]["end"] = region["end"]
        else:
            joined.append(dict(region))
    return joined


@dataclass(frozen=True)
class Score:
    """Word error rate, that of the worst recording, and median errors of segment and word times in seconds."""

    words: float
    worst: float
    start: float | None
    end: float | None
    word_start: float | None

    def row(self) -> str:
        """Cells of the model card's table."""
        times = (f"{seconds:.2f}" if seconds is not None else "" for seconds in (self.start, self.end, self.word_start))
        return " | ".join([f"{100 * self.words:.1f}", f"{100 * self.worst:.1f}", *times])


def score(recordings: list[Recording], transcriber: Transcriber) -> Score:
    """Transcribes the recordings; time errors are of sentences (and their words) that were found word for word."""
    found = transcriber(recordings)
    hypotheses = [" ".join(segment.text.strip() for segment in segments) for segments in found]
    rates = [word_error_rate(truth.text, heard) for truth, heard in zip(recordings, hypotheses, strict=True)]
    starts, ends, words = [], [], []
    for truth, segments in zip(recordings, found, strict=True):
        for said in truth.sentences:
            for segment in (segment for segment in segments if segment.text.strip() == said.text):
                starts.append(abs(segment.start - said.start))
                ends.append(abs(segment.end - said.end))
                pairs = zip(segment.words or [], said.words, strict=False)
                words += [abs(heard.start - word.start) for heard, word in pairs]
    total = jiwer.wer([normalise(truth.text) for truth in recordings], [normalise(heard) for heard in hypotheses])
    medians = (median(errors) if errors else None for errors in (starts, ends, words))
    return Score(total, max(rates), *medians)


def main() -> None:
    """Prints the table."""
    model = load()
    sets = {
        "held out, 5 sentences": held_out_recordings(20),
        "held out, light noise": held_out_recordings(10, noise=0.002),
        "held out, 1 sentence": held_out_recordings(20, sentences=1),
        "held out, 15 sentences": held_out_recordings(4, sentences=15),
        "demo clips": clip_recordings(),
    }
    ways = {
        "sequential": sequential(model),
        "sequential, word times": sequential(model, word_timestamps=True),
        "batched": batched(model),
        "batched, word times": batched(model, word_timestamps=True),
        "batched, short clips": batched(model, longest=0.0),
        "batched, no stamps": batched(model, without_timestamps=True),
    }
    print("| recordings | decoding | WER % | worst % | start s | end s | word start s |")
    print("|---|---|---|---|---|---|---|")
    for recordings_name, recordings in sets.items():
        for way, transcriber in ways.items():
            print(f"| {recordings_name} | {way} | {score(recordings, transcriber).row()} |", flush=True)


if __name__ == "__main__":
    main()
