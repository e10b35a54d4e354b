"""Which stage holds a run back, in one sentence: a pure function of what the stages measured.

The rule, in the order in which it decides:

1. Stages form lanes that work at the same time: download; the device (transcribe and embed take turns on the GPU, or on
   the CPU's cores); load. A lane's cost is the wall time it needs for a video: for each of its stages the seconds in
   which at least one job ran, divided by the videos that came out. Costs stay comparable when the stages have got
   differently far, as in a run that is still going on.
2. The dearest lane limits the run: however fast the others become, no more videos an hour come out. When the next one
   costs nearly as much (`BALANCE`), speeding up the first gains nearly nothing: the run is balanced.
3. In the device lane the stage with the greater cost is named. Transcription that leaves its GPU idle because its
   model waits for decoded audio is short of CPU cores, not of GPU (`IDLE_GPU`, `STARVED`).
4. In the download lane cool-downs that the remote host asked for (`THROTTLED`) and the pace of our own limiter
   (`PACED`) are told apart from connections that are busy, since more parallel downloads mend only the last.

Queues are evidence, not the rule: work piles up before the stage that is named, and none stands after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

BALANCE = 1.25  # the dearest lane costs less than this many times the next: nothing to gain from mending it alone
IDLE_GPU = 0.5  # a GPU that is busy for a smaller share of the time is not what a stage waits for
STARVED = 0.25  # share of the jobs' time for which the model was loaded and had nothing to do
LOADING = 0.5  # share of the jobs' time that went into loading the model: the shards are too small for it
THROTTLED = 0.2  # share of the downloads' time that went into cool-downs
PACED = 0.5  # share of the downloads' time that went into waiting for the limiter

FAST_MODEL = "all-MiniLM-L6-v2"

SIZES = {"all-MiniLM-L6-v2": (10.6e6, 6), "bge-small-en-v1.5": (21.3e6, 12), "gte-Qwen2-1.5B-instruct": (1.31e9, 28)}
"""Weights in the layers of the ready-made models, and how many layers there are."""


class Kind(StrEnum):
    """What a run can be bound by."""

    EMBEDDING = "embedding"
    ASR = "asr"
    CPU_STARVED = "cpu-starved gpu"
    DOWNLOAD = "download"
    PACED = "paced"
    THROTTLED = "throttled"
    LOAD = "load"
    BALANCED = "balanced"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Share:
    """How busy something was: mean, and the range in which it stayed for 90 % of the time (0 to 1)."""

    low: float
    mean: float
    high: float

    def __str__(self) -> str:
        low, high = round(100 * self.low), round(100 * self.high)
        return _percent(self.mean) if low == high else f"{low}-{high} %"


@dataclass(frozen=True)
class StageMeasure:
    """What one stage did in a stretch of work. Fields that a stage does not have keep their defaults."""

    stage: str  # download, transcribe, embed or load
    active: float  # seconds in which at least one of its jobs ran
    videos: float  # that came out of it, parts of a running job included
    audio: float = 0.0  # seconds of audio in them
    queue: float = 0.0  # videos that stood before it, on average while it was active
    gpu: Share | None = None  # GPU use while it was active, None without a GPU
    loading: float = 0.0  # share of its jobs' time for which the model was opened and loaded
    starved: float = 0.0  # share of its jobs' time for which the model was loaded and did not compute
    paced: float = 0.0  # download: share of the downloads' time spent waiting for the limiter
    throttled: float = 0.0  # download: share of it spent in cool-downs
    model: str | None = None  # embed: the model that took the most time
    texts: float = 0.0  # embed: texts that this model embedded
    encoding: float = 0.0  # embed: seconds that they took, without loading the model

    @property
    def cost(self) -> float:
        """Seconds of wall time a video; a stage from which nothing came out yet counts as at its first one."""
        return self.active / max(self.videos, 1.0)


@dataclass(frozen=True)
class Verdict:
    """What limits the run, in a sentence with its evidence and the setting to change."""

    kind: Kind
    stage: str | None
    sentence: str
    gain: float | None = None  # how many times as fast the run could be if this stage cost nothing


def name_bottleneck(measures: Sequence[StageMeasure]) -> Verdict:
    """Name what limits the run, by the rule of this module's docstring."""
    stages = {measure.stage: measure for measure in measures if measure.active > 0}
    if not stages:
        return Verdict(Kind.UNKNOWN, None, "Nothing has been measured yet.")
    lanes = [
        [stages[stage] for stage in lane if stage in stages]
        for lane in (("download",), ("transcribe", "embed"), ("load",))
    ]
    costs = sorted(((sum(stage.cost for stage in lane), lane) for lane in lanes if lane), key=lambda pair: -pair[0])
    (cost, lane), rest = costs[0], costs[1:]
    limiting = max(lane, key=lambda measure: measure.cost)
    if rest and cost < BALANCE * rest[0][0]:
        return Verdict(Kind.BALANCED, None, _balanced(limiting, rest[0][1]))
    others = max([cost - limiting.cost, *(other for other, _ in rest)])
    gain = cost / others if others > 0 else None
    # What stands before one of two stages that share a device waits for the other as well.
    kind, sentence = _SENTENCES[limiting.stage](replace(limiting, queue=sum(measure.queue for measure in lane)))
    return Verdict(kind, limiting.stage, f"{sentence}{_outlook(gain)}", gain)


def _balanced(first: StageMeasure, lane: list[StageMeasure]) -> str:
    second = max(lane, key=lambda measure: measure.cost)
    return (
        f"The run is balanced: {first.stage} takes {_seconds(first.cost)} a video and {second.stage} "
        f"{_seconds(second.cost)} beside it. More of everything (--cores, --resources gpu=N) makes it faster."
    )


def _embedding(embed: StageMeasure) -> tuple[Kind, str]:
    batch = 32 * embed.encoding / embed.texts if embed.texts else None
    evidence = [f"{_seconds(batch)} a batch of 32 ({embed.texts / embed.encoding:.2g} texts/s)"] if batch else []
    evidence += _gpu(embed) + _queue(embed)
    if embed.loading >= LOADING:
        mend = _larger_shards(embed)
    elif batch and embed.model in SIZES and embed.model != FAST_MODEL:
        mend = _faster_model(embed.model, batch)
    elif embed.gpu is None:
        mend = "a GPU, more --cores or dtype int8 for the model (cuepoint estimate measures it) make it faster"
    else:
        mend = "raise embedding.models.….batch_tokens while the GPU has memory, or give the run --resources gpu=2"
    return Kind.EMBEDDING, f"embed is the bottleneck{_with(embed.model)}: {_join(evidence)}; {mend}"


def _faster_model(model: str, batch: float) -> str:
    """What `FAST_MODEL` would take for a batch that takes `model` so many seconds.

    At best the time shrinks as the arithmetic does; at worst, on a device that waits more than it computes, as the
    number of layers, which run one after the other.
    """
    (weights, layers), (fast_weights, fast_layers) = SIZES[model], SIZES[FAST_MODEL]
    best, worst = _seconds(batch * fast_weights / weights), _seconds(batch * fast_layers / layers)
    time = f"about {best}" if best == worst else f"{best} to {worst}"
    return (
        f"embedding.use: [{FAST_MODEL}] would take {time} a batch here (1/{weights / fast_weights:.0f} of the "
        f"arithmetic, {fast_layers} layers in place of {layers})"
    )


def _transcription(transcribe: StageMeasure) -> tuple[Kind, str]:
    speed = f"{transcribe.audio / transcribe.active:.3g} h of audio an hour"
    evidence = [speed, *_gpu(transcribe), *_queue(transcribe)]
    if transcribe.gpu and transcribe.gpu.mean < IDLE_GPU and transcribe.starved >= STARVED:
        waited = f"its model waited for decoded audio {_percent(transcribe.starved)} of the time"
        return Kind.CPU_STARVED, (
            f"transcribe is the bottleneck, for want of CPU: {_join([*evidence, waited])}; give the run more --cores "
            "(the GPU could do more)"
        )
    if transcribe.loading >= LOADING:
        mend = _larger_shards(transcribe)
    elif transcribe.gpu is None:
        mend = "a GPU is tens of times as fast; without one, a smaller transcribe.model or transcribe.beam_size: 1"
    elif transcribe.gpu.mean < IDLE_GPU:
        mend = "raise transcribe.batch_size: the GPU could do more"
    else:
        mend = "--resources gpu=N with another GPU, or a smaller transcribe.model"
    return Kind.ASR, f"transcribe is the bottleneck: {_join(evidence)}; {mend}"


def _larger_shards(measure: StageMeasure) -> str:
    return f"{_percent(measure.loading)} of its time went into loading the model; raise shard_size"


def _downloading(download: StageMeasure) -> tuple[Kind, str]:
    rate = f"{3600 / download.cost:.3g} videos an hour"
    if download.throttled >= THROTTLED:
        return Kind.THROTTLED, (
            f"the remote host is the bottleneck: {rate}, {_percent(download.throttled)} of the downloads' time went "
            "into cool-downs that it asked for; raise download.video_interval so that it asks for none (more downloads "
            "at a time make it worse), or go on later: nothing is lost"
        )
    if download.paced >= PACED:
        return Kind.PACED, (
            f"download is the bottleneck, at the pace that is set: {rate}, {_percent(download.paced)} of the "
            "downloads' time went into waiting for their turn; lower download.video_interval as far as the remote host "
            "allows"
        )
    return Kind.DOWNLOAD, (
        f"download is the bottleneck: {rate}, the other stages waited for it; raise download.parallel (or "
        "--resources downloads=N)"
    )


def _loading(load: StageMeasure) -> tuple[Kind, str]:
    mend = "raise qdrant.batch_size, or give the database more (memory, CPU, a nearer network)"
    return Kind.LOAD, f"load is the bottleneck: {_join([f'{_seconds(load.cost)} a video', *_queue(load)])}; {mend}"


_SENTENCES = {"download": _downloading, "transcribe": _transcription, "embed": _embedding, "load": _loading}


def _gpu(measure: StageMeasure) -> list[str]:
    return [f"GPU {measure.gpu} busy"] if measure.gpu else []


def _queue(measure: StageMeasure) -> list[str]:
    return [f"{measure.queue:.0f} videos waited for it"] if measure.queue >= 1 else []


def _with(model: str | None) -> str:
    return f" with {model}" if model else ""


def _outlook(gain: float | None) -> str:
    return "." if gain is None else f". Without it the run would be up to {gain:.1f} times as fast."


def _join(evidence: list[str]) -> str:
    return ", ".join(evidence) or "it takes the most time"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
