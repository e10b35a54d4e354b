"""The plan: which video belongs to which shard, append-only over runs and frozen for each of them.

`plan.tsv` is what the runs remember: one row (video_id, shard, source) per assignment, the last row of a video counts,
shard `-` means that it was taken off the list before its shard was closed. A shard that has its transcript is closed:
new videos and those that are tried again go to new shards, so finished GPU work is never queued again.

Only the main Snakemake process makes a run from the list and writes it down; nested processes (each SLURM job starts
one) read what it wrote, so that a list that is edited meanwhile changes nothing in a run that is under way.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints, TypeAdapter, ValidationError

from cuepoint import atomic, failures
from cuepoint.errors import ConfigError, DataError
from cuepoint.fingerprint import fingerprint
from cuepoint.layout import Layout
from cuepoint.receipts import read_receipt
from cuepoint.sources import Entry
from cuepoint.states import Status

log = logging.getLogger(__name__)

RELEASED = "-"

VideoId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
Shard = Annotated[str, StringConstraints(pattern=r"^[0-9]{5,9}$")]


@dataclass(frozen=True)
class Run:
    """What one run works on. Frozen: the same for the main process and every job."""

    members: dict[VideoId, Shard]  # video_id -> shard: every listed video that is planned, in the list's order
    sources: dict[VideoId, str]  # video_id -> URL or path, of the members
    attempts: dict[VideoId, int]  # video_id -> number of the attempt that is due; 0 is left out
    waiting: dict[VideoId, str] = field(default_factory=dict)  # listed, but left for a later run by `limit_unprocessed`
    settings: dict[str, Any] = field(default_factory=dict)  # of the transcribe stage: a change may need audio again
    reloads: dict[str, int] = field(default_factory=dict)  # model -> how often its collection was found missing

    def shards(self) -> dict[str, list[str]]:
        """Shard -> its listed videos, in order of the shards' names."""
        grouped: dict[str, list[str]] = {}
        for video_id, shard in self.members.items():
            grouped.setdefault(shard, []).append(video_id)
        return dict(sorted(grouped.items()))


@dataclass(frozen=True)
class Draft:
    """A run that is planned and not written yet, with the rows that it adds to the plan."""

    run: Run
    rows: list[tuple[str, str, str]]  # (video_id, shard or RELEASED, source)
    audio_wanted: list[str]  # videos whose audio was not kept and is needed again
    based_on: str  # text of plan.tsv that this was made from


_RUN = TypeAdapter(Run)
_ROW = re.compile(rf"[A-Za-z0-9_-]+\t([0-9]{{5,9}}|{RELEASED})")


def read_plan(text: str, name: str = "plan.tsv") -> dict[str, str]:
    """Latest shard of each video that was ever planned (RELEASED for one that is in none)."""
    plan: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        columns = line.split("\t")
        if len(columns) != 3 or not _ROW.fullmatch(f"{columns[0]}\t{columns[1]}"):
            raise DataError(
                f"{name}, line {number} is no row of the plan (video_id, shard, source): restore the file from a copy; "
                "without it finished work could be assigned to other shards"
            )
        plan[columns[0]] = columns[1]
    return plan


def _plan_text(layout: Layout) -> str:
    # A byte that is no text makes its line no row, which `read_plan` tells.
    return layout.plan.read_text(encoding="utf-8", errors="replace") if layout.plan.exists() else ""


def closed_shards(layout: Layout) -> set[str]:
    """Shards that have their transcript: one directory listing, no table is opened."""
    return {path.stem for path in layout.transcripts("0").parent.glob("*.parquet")}


def draft_run(
    entries: list[Entry],
    layout: Layout,
    *,
    shard_size: int,
    limit_unprocessed: int | None = None,
    transcribe_settings: Mapping[str, Any] | None = None,
    keep_audio: bool = True,
    missing_collections: Iterable[str] = (),
    **retry: Any,
) -> Draft:
    """Plan a run over the listed `entries` without writing anything.

    `retry` goes to `failures.attempt_due` (credentials, retry_final, max_failed_runs).
    """
    if not entries:
        raise ConfigError("the list of videos is empty: write one video ID, URL or media file per line into it")
    text = _plan_text(layout)
    plan = read_plan(text, str(layout.plan))
    closed = closed_shards(layout)
    settings = dict(transcribe_settings or {})
    previous = _previous_run(layout)
    audio_wanted = []
    if not keep_audio and previous and previous.settings != settings:
        audio_wanted = _audio_wanted(entries, plan, layout)
    reloads = dict(previous.reloads) if previous else {}
    for model in missing_collections:
        reloads[model] = reloads.get(model, 0) + 1
    attempts, moving = _due(entries, plan, closed, layout, audio_wanted=audio_wanted, retry=retry)

    listed = {entry.video_id: entry for entry in entries}
    fresh = [id_ for id_ in listed if plan.get(id_, RELEASED) == RELEASED or id_ in moving]
    members, waiting, fresh = _within_limit(listed, plan, closed, fresh, limit_unprocessed)

    rows = [
        (id_, RELEASED, "") for id_, shard in plan.items() if id_ not in listed and shard not in closed | {RELEASED}
    ]
    first = 1 + max((int(shard) for shard in plan.values() if shard != RELEASED), default=-1)
    rows += [(id_, f"{first + i // shard_size:05d}", listed[id_].source) for i, id_ in enumerate(fresh)]
    members |= {id_: shard for id_, shard, _ in rows if shard != RELEASED}
    members = {id_: members[id_] for id_ in listed if id_ in members}
    run = Run(
        members=members,
        sources={id_: listed[id_].source for id_ in members},
        attempts={id_: attempts[id_] for id_ in members if attempts.get(id_)},
        waiting=waiting,
        settings=settings,
        reloads=reloads,
    )
    return Draft(run, rows, [id_ for id_ in audio_wanted if id_ in members], based_on=text)


def members_hash(run: Run) -> str:
    """Hash of which videos are listed and where, so that a load runs again when the list has changed."""
    return fingerprint(members=run.members)


def write_run(draft: Draft, layout: Layout) -> None:
    """Write a drafted run down: the plan first, then the failure logs, then the frozen run.

    The caller holds the run's lock. Raises ConfigError when another run has changed the plan since the draft.
    """
    text = _plan_text(layout)
    if text != draft.based_on:
        raise ConfigError("another run has just changed the plan of these results: start this command again")
    if draft.rows:
        atomic.write_text(layout.plan, text + "".join("\t".join(row) + "\n" for row in draft.rows))
    for video_id in draft.audio_wanted:
        _record_wanted(layout, video_id)
    atomic.write_text(layout.run, json.dumps(asdict(draft.run), ensure_ascii=False) + "\n")


def read_run(layout: Layout) -> Run:
    """The frozen run, as jobs and the `cuepoint` command read it."""
    try:
        run = _RUN.validate_json(layout.run.read_bytes())
        if run.members.keys() != run.sources.keys():
            raise ValueError("members and sources differ")
        return run
    except FileNotFoundError:
        raise DataError(
            f"{layout.run} is missing: no run has started here yet (a workflow that includes Cuepoint as a module must "
            "call its onstart, see docs/guide.md)"
        ) from None
    except ValueError as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{layout.run} is damaged ({what}): run snakemake again, it is written anew") from error


def source_stamp(source: str) -> list[int] | None:
    """Size and modification time of a local source, so that a changed file is read again; None for a URL."""
    try:
        status = Path(source).stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]


def _due(
    entries: Iterable[Entry],
    plan: Mapping[str, str],
    closed: set[str],
    layout: Layout,
    *,
    audio_wanted: list[str],
    retry: Mapping[str, Any],
) -> tuple[dict[str, int], set[str]]:
    """Number of the attempt that each video is at, and which videos leave their closed shard for another attempt."""
    attempts: dict[str, int] = {}
    moving: set[str] = set()
    wanted = set(audio_wanted)
    logs = {path.stem: path for path in layout.failures("0").parent.parent.glob("*/*.jsonl")}
    for entry in entries:
        id_ = entry.video_id
        known = failures.read(logs[id_]) if id_ in logs else []
        number = failures.attempt_due(known, **retry)
        last = known[-1] if known else None
        if last and last.status is Status.UNAVAILABLE and entry.is_local and source_stamp(entry.source):
            number = last.number + 1  # the file has appeared
        if id_ in wanted and not (last and last.status is Status.PENDING):
            number = (last.number if last else 0) + 1
        elif last and number > last.number and last.status is not Status.PENDING and plan.get(id_) in closed:
            moving.add(id_)
        attempts[id_] = number
    return attempts, moving


def _within_limit(
    listed: Mapping[str, Entry],
    plan: Mapping[str, str],
    closed: set[str],
    fresh: list[str],
    limit: int | None,
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Split by `limit_unprocessed`: members that are planned already, those that wait, and the new ones of this run.

    Shards that are planned and not closed are taken whole, and at least one of them, since closing a shard early would
    leave videos behind.
    """
    leaving = set(fresh)
    planned = {id_: plan[id_] for id_ in listed if id_ not in leaving}
    if limit is None:
        return planned, {}, fresh
    open_shards: dict[str, list[str]] = {}
    for id_, shard in sorted(planned.items(), key=lambda item: item[1]):
        if shard not in closed:
            open_shards.setdefault(shard, []).append(id_)
    room = limit
    later: set[str] = set()
    for number, (shard, videos) in enumerate(open_shards.items()):
        if number and len(videos) > room:
            later.add(shard)
        else:
            room -= len(videos)
    taken = fresh[: max(room, 0)]
    members = {id_: shard for id_, shard in planned.items() if shard not in later}
    chosen = {*members, *taken}
    return members, {id_: listed[id_].source for id_ in listed if id_ not in chosen}, taken


def _previous_run(layout: Layout) -> Run | None:
    try:
        return read_run(layout)
    except DataError:
        return None  # none yet, or damaged: it is written anew


def _audio_wanted(entries: Iterable[Entry], plan: Mapping[str, str], layout: Layout) -> list[str]:
    """Planned videos whose audio was dropped and is needed again, because the way to transcribe has changed."""
    ids = [entry.video_id for entry in entries if plan.get(entry.video_id, RELEASED) != RELEASED]
    return [
        id_ for id_ in ids if layout.receipt(id_).exists() and not layout.audio(id_).exists() and _was_ok(layout, id_)
    ]


def _was_ok(layout: Layout, video_id: str) -> bool:
    return read_receipt(layout.receipt(video_id)).status is Status.OK


def _record_wanted(layout: Layout, video_id: str) -> None:
    known = failures.read(layout.failures(video_id))
    number = known[-1].number if known else 0
    failures.record(
        layout,
        video_id,
        failures.Attempt(number, Status.PENDING, time.time(), "the audio was not kept and is needed again"),
    )
