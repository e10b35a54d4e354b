"""`cuepoint estimate`: what the whole list will take on this machine, before the run and not after an hour of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings
from cuepoint.durations import duration
from cuepoint.errors import ConfigError, CuepointError
from cuepoint.settings import Settings

if TYPE_CHECKING:
    from cuepoint.estimate import Corpus, EmbeddingEstimate

_Row = tuple[str, ...]
_HEAD = ("", "texts/s", "tokens/s", "of peak", "s per 32", "whole list", "disk")


def estimate(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="Embedding model to time (repeatable); those of embedding.use by default.")
    ] = None,
    hours: Annotated[float | None, typer.Option(min=0, help="Hours of audio of the whole list, if you know.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of timing, over all models.")] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; all by default.")] = None,
    asr: Annotated[bool, typer.Option(help="Time the transcription too.")] = True,
    configfile: ConfigFiles = None,
    directory: Directory = None,
) -> None:
    """Time the configured models for a minute on this device, and say what the whole list will take."""
    settings, layout = read_settings(configfile, directory)
    names = model or settings.embedding.use
    for name in names:
        if name not in settings.embedding.models:
            raise ConfigError(f"{name!r} is not in embedding.models: {', '.join(settings.embedding.models)}")
    from cuepoint import devices
    from cuepoint import estimate as estimating
    from cuepoint.embedding.speed import matrix_peak

    corpus = estimating.read_corpus(settings, layout, hours)
    threads = threads or estimating.cores()
    device = devices.choose(settings.embedding.device)
    peak = matrix_peak(device, threads)
    where = devices.gpus()[0].name if device == "cuda" else f"{threads} cores of the CPU"
    typer.echo(
        f"{corpus.videos} videos, {duration(corpus.seconds)} of audio ({corpus.seconds_from}); "
        f"passages {corpus.transcripts_from}\n"
        f"On {where}: matrix products at {_si(peak)}FLOP/s\n"
    )
    timing = _Timing(corpus, settings, threads, seconds / (len(names) + asr))
    rows, took, notes, transcribing = [], {}, [], None
    for name in names:
        row, found = timing.embedding(name, peak)
        rows.append(row)
        if found:
            took[name] = found.seconds
            notes += [f"\n{name}: {found.quality}"] if found.quality else []
    if asr:
        row, transcribing = timing.transcription()
        rows.append(row)
    _show(rows)
    for note in notes:
        typer.echo(note)
    _advise(took, transcribing, device, threads)


@dataclass(frozen=True)
class _Timing:
    """Rows of the table, each with what was measured; a model that cannot be timed says why."""

    corpus: "Corpus"
    settings: Settings
    threads: int
    seconds: float  # of timing a model

    def embedding(self, name: str, peak: float) -> "tuple[_Row, EmbeddingEstimate | None]":
        from cuepoint.estimate import estimate_embedding, least_seconds

        try:
            found = estimate_embedding(
                name, self.corpus, self.settings, threads=self.threads, seconds=self.seconds, peak=peak
            )
        except CuepointError as error:
            least = least_seconds(name, self.corpus, self.settings, peak)
            bound = f"at least {duration(least)} for the whole list, at the rate above; " if least else ""
            return (name, f"not timed: {bound}{error}"), None
        cells = (
            f"{found.texts_per_second:,.1f}",
            f"{found.tokens_per_second:,.0f}",
            f"{found.of_peak:.0%}",
            f"{32 / found.texts_per_second:.2g}",
            duration(found.seconds),
            f"{_si(found.bytes)}B",
        )
        return (name, *cells), found

    def transcription(self) -> tuple[_Row, float | None]:
        from cuepoint.estimate import transcription_rate

        settings = self.settings.transcribe
        name = f"transcribe ({settings.model})"
        if not self.corpus.audio:
            return (name, "not timed: no audio is here yet; `snakemake downloads` brings some, Ctrl-C ends it"), None
        try:
            rate = transcription_rate(settings, self.corpus.audio, threads=self.threads, seconds=self.seconds)
        except CuepointError as error:
            return (name, f"not timed: {error}"), None
        took = self.corpus.seconds / rate
        disk = f"{_si(self.corpus.audio_bytes * self.corpus.seconds)}B"
        return (name, f"{rate:,.1f} x real time", "", "", "", duration(took), disk), took


def _advise(took: dict[str, float], transcribing: float | None, device: str, threads: int) -> None:
    """The sum, and the mistake to look for: embedding that takes longer than hearing what was said."""
    total = sum(took.values()) + (transcribing or 0.0)
    if total:
        price = f"{total / 3600:,.1f} GPU-hours" if device == "cuda" else f"{threads * total / 3600:,.1f} core-hours"
        typer.echo(f"\nTogether {duration(total)}: {price}")
    slowest = max(took, key=took.__getitem__, default=None)
    if slowest and transcribing and took[slowest] > transcribing:
        typer.echo(
            f"{slowest} takes {took[slowest] / transcribing:.1f} times as long as the transcription: "
            "a smaller model in embedding.use makes the run faster"
        )


def _show(rows: list[_Row]) -> None:
    full = [_HEAD, *(row for row in rows if len(row) == len(_HEAD))]
    widths = [max(len(row[column]) for row in full) for column in range(len(_HEAD))]
    widths[0] = max(widths[0], *(len(row[0]) for row in rows))
    for row in [_HEAD, *rows]:
        name, *cells = row
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=False)]
        typer.echo("  ".join([f"{name:<{widths[0]}}", *(aligned if len(row) == len(_HEAD) else cells)]).rstrip())


def _si(value: float) -> str:
    """`1.2 G`: a number with three digits or fewer and its prefix."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
