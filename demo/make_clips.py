"""Makes the demo's clips and the truth about them. Run as ``python -m demo.make_clips`` from the repository root.

Speech is espeak-ng's, of sentences that training never saw. The first 12 clips are the demo's list. ``silence.opus``
holds only faint noise; ``corrupt.opus`` begins like an Ogg Opus file and cannot be decoded.
"""

import json
import random
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path

from demo.train.recordings import record, silence, with_noise
from demo.train.speech import SAMPLE_RATE, VOICE_NAMES, write_opus

HERE = Path(__file__).parent
CLIPS = HERE / "clips"
MANIFEST = HERE / "manifest.json"
SEED = 2024
NOISE = 0.002  # standard deviation, -54 dB of full scale
CHANNELS = {
    "cooking": "Pan and Ladle",
    "astronomy": "Night Sky Notes",
    "gardening": "The Back Garden",
    "databases": "Rows and Columns",
    "music": "Rehearsal Room",
}


@dataclass(frozen=True)
class Plan:
    """What a clip is about and how much is said in it; seeds were picked for sentences that suit the title."""

    topic: str
    title: str
    sentences: int
    seed: int
    noisy: bool = False


PLANS = {
    "kitchen-basics": Plan("cooking", "Kitchen basics: onions, garlic and a good soup", 4, seed=136),
    "night-sky": Plan("astronomy", "What is up in the night sky", 4, seed=456),
    "spring-garden": Plan("gardening", "Spring jobs in the garden", 4, seed=102),
    "backup-school": Plan("databases", "Backup school: copies, replicas and the log", 4, seed=95),
    "concert-evening": Plan("music", "An evening at the concert hall", 8, seed=17),
    "supper-in-an-hour": Plan("cooking", "Supper in an hour", 3, seed=5, noisy=True),
    "comet-watch": Plan("astronomy", "Comet watch from the old observatory", 5, seed=20, noisy=True),
    "greenhouse-tour": Plan("gardening", "A tour of the greenhouse", 2, seed=234),
    "query-clinic": Plan("databases", "Query clinic: slow tables", 6, seed=92),
    "string-quartet": Plan("music", "The string players rehearse", 4, seed=167, noisy=True),
    "bread-day": Plan("cooking", "Bread day with the baker", 3, seed=115),
    "moon-and-stars": Plan("astronomy", "Moon and stars for beginners", 3, seed=1),
    "sauce-lesson": Plan("cooking", "A lesson in sauces", 3, seed=443, noisy=True),
    "eclipse-diary": Plan("astronomy", "Diary of an eclipse", 2, seed=665),
    "hedge-and-lawn": Plan("gardening", "Hedge and lawn before winter", 3, seed=237),
    "schema-change": Plan("databases", "Changing a schema without tears", 2, seed=2),
    "drum-and-guitar": Plan("music", "Drum and guitar session", 4, seed=188, noisy=True),
    "weeknight-plates": Plan("cooking", "Weeknight plates", 3, seed=659),
    "asteroid-hour": Plan("astronomy", "The asteroid hour", 3, seed=152, noisy=True),
    "apple-tree": Plan("gardening", "Under the apple tree", 3, seed=168),
    "cluster-night": Plan("databases", "One night in the cluster", 4, seed=176, noisy=True),
    "choir-practice": Plan("music", "Choir practice", 2, seed=42),
    "seed-swap": Plan("gardening", "Seed swap with the neighbors", 2, seed=1),
    "transaction-talk": Plan("databases", "A short talk on transactions", 3, seed=168),
}


def speech_clip(number: int, video_id: str, plan: Plan) -> dict:
    """Writes one clip of speech; its entry in the manifest."""
    voice = VOICE_NAMES[number % len(VOICE_NAMES)]
    recording = record(plan.seed, plan.sentences, topic=plan.topic, voice=voice, noise=NOISE if plan.noisy else 0.0)
    file = CLIPS / f"{video_id}.opus"
    write_opus(str(file), recording.audio)
    uploaded = date(2023, 1, 1) + timedelta(days=random.Random(SEED + number).randrange(1000))
    return {
        "file": file.name,
        "video_id": video_id,
        "kind": "speech",
        "title": plan.title,
        "channel": CHANNELS[plan.topic],
        "topic": plan.topic,
        "voice": voice,
        "noise": plan.noisy,
        "upload_date": f"{uploaded:%Y%m%d}",
        "duration": round(len(recording.audio) / SAMPLE_RATE, 3),
        "language": "en",
        "sentences": [asdict(said) for said in recording.sentences],
    }


def special_clip(kind: str, title: str, duration: float | None) -> dict:
    """The manifest's entry for a clip without speech."""
    return {
        "file": f"{kind}.opus",
        "video_id": kind,
        "kind": kind,
        "title": title,
        "channel": "Test Tones",
        "topic": None,
        "voice": None,
        "noise": False,
        "upload_date": "20230101",
        "duration": duration,
        "language": None,
        "sentences": [],
    }


def main() -> None:
    """Writes every clip and the manifest."""
    CLIPS.mkdir(exist_ok=True)
    clips = [speech_clip(number, video_id, plan) for number, (video_id, plan) in enumerate(PLANS.items())]

    quiet = CLIPS / "silence.opus"
    write_opus(str(quiet), with_noise(silence(5.0), 0.0005, SEED))
    clips.append(special_clip("silence", "Five seconds of almost nothing", 5.0))

    # The first Ogg page, with Opus's header, is 47 bytes; everything after it is noise.
    (CLIPS / "corrupt.opus").write_bytes(quiet.read_bytes()[:47] + random.Random(SEED).randbytes(4000))
    clips.append(special_clip("corrupt", "A file that broke on its way", None))

    # One clip a line: readable in a diff, without a line for every number.
    MANIFEST.write_text("[\n" + ",\n".join(json.dumps(clip) for clip in clips) + "\n]\n")


if __name__ == "__main__":
    main()
