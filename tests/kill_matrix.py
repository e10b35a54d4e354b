"""The kill matrix: the demo is killed at many points, run again each time, and must end as if nothing had happened.

    python tests/kill_matrix.py --kills 500      (`make torture`)

A *chain* is one project over 24 listed videos in shards of four. Its run is killed at a point chosen by the seed, the
same command is given again and killed again, until no kill is left for it; then the last run must end well and all
that it left must equal what an uninterrupted run left. After that the list loses two videos and gets them back, each
time with kills, so that a load also changes a collection that is there and moves its alias.

`tests/injected/sitecustomize.py` kills from inside, so nothing is left to timing, and notes what was done. From these
notes and from the files is asserted, after each kill:

- the next run needs no flag and no unlock (it is the same command), and no table, receipt or cache entry is half there;
- where only Snakemake was killed, its script lives on: the next run waits for it and never works beside it;

and at the end of a chain:

- no result of a video was computed twice, and no job ran again that Snakemake had noted as finished;
- Parquet files are equal byte for byte, points in Qdrant, rows of the ledger, receipts and plan;
- no temporary file is left, and another run finds nothing to be done.
"""

import argparse
import base64
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from conftest import CLIPS, MANIFEST, Project, Site

from cuepoint.layout import Layout
from cuepoint.qdrant import open_store, published_name
from cuepoint.receipts import read_receipt
from cuepoint.settings import load_settings
from cuepoint.tables import read_table

INJECTED = Path(__file__).parent / "injected"
MODEL = "all-MiniLM-L6-v2"
SHARD_SIZE = 4
LIMIT = 240  # seconds for one run: a run that hangs has failed

SPOKEN = [clip["video_id"] for clip in MANIFEST if clip["kind"] == "speech"]
SERVED = [*SPOKEN[:9], "silence", "corrupt", "removed"]
LISTED = [*SERVED, *(f"clips/{name}.opus" for name in SPOKEN[9:21])]
LEFT_OUT = {"kitchen-basics", f"clips/{SPOKEN[10]}.opus"}  # of the shorter list
LISTS = {"24 videos": LISTED, "22 videos": [video for video in LISTED if video not in LEFT_OUT]}

STAGES = ("plan", "snakemake", "download", "transcribe", "embed", "load", "report", "end")
WHOM = ("tree", "snakemake", "script")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
MAIN_STAGES = {"plan", "snakemake", "end"}  # whose points are in Snakemake's own process: there is no script to kill
CACHED = re.compile(r"\.state/cache/(receipt|transcribe|embed)/../([^.]+)")  # the result of a video in a stage


@dataclass(frozen=True)
class Kill:
    """When to kill, whom and how."""

    stage: str
    point: str
    nth: int
    whom: str
    signal: str

    def __str__(self):
        return f"{self.signal} to {self.whom} at {self.stage}, {self.point}, no. {self.nth}"


class Violation(AssertionError):
    """A promise that was not kept."""


@dataclass
class Watched:
    """A project whose runs are watched, and killed on demand."""

    project: Project
    watch: Path
    broken: str | None = None
    events: list[dict] = field(default_factory=list)  # of all runs so far, each with the number of its `run`
    runs: int = 0

    def run(self, *kills: Kill):
        """Run the command to its end, however it comes; returns its exit status, what it said, and what killed."""
        self.watch.mkdir(exist_ok=True)
        for name in ("kill.json", "reached"):
            (self.watch / name).unlink(missing_ok=True)
        (self.watch / "kill.json").write_text(json.dumps([vars(kill) for kill in kills]))
        path = os.pathsep.join(filter(None, [str(INJECTED), os.environ.get("PYTHONPATH")]))
        environment = self.project.environment | {"CUEPOINT_WATCH": str(self.watch), "PYTHONPATH": path}
        if self.broken:
            environment["CUEPOINT_WATCH_BREAK"] = self.broken
        self.runs += 1
        log = self.watch / f"run-{self.runs}.log"
        with log.open("w") as output:  # no pipe: an orphan would hold it open
            process = subprocess.Popen(
                self.project.command(), env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                _end_all(process.pid)
                raise Violation(f"the run did not end in {LIMIT} s, see {log}") from None
        new = self._new_events()
        killed = [event for event in new if event.get("killed")]
        if not any(event["orphan"] for event in killed):
            self._wait_for_rest(new)
        new += self._new_events()
        return status, log.read_text(), killed

    def _new_events(self):
        path = self.watch / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        new = [json.loads(line) | {"run": self.runs} for line in lines[len(self.events) :]]
        self.events += new
        return new

    def _wait_for_rest(self, events):
        """Wait until all processes of the run have ended, so that the next one starts alone."""
        alive = []
        for pid in {event["pid"] for event in events}:
            try:
                alive.append(psutil.Process(pid))
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(alive, LIMIT)
        if alive:
            raise Violation(f"{alive} did not end")


def _end_all(pid):
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in tree:
        process.kill()


# --- What must hold --------------------------------------------------------------------------------------------------


def results_of(project):
    """All that must be equal to an uninterrupted run, by name: bytes, or values without times."""
    layout = Layout(project.results)
    found = {}
    for pattern in ("transcripts/*", "videos/*", "embeddings/*/*", "report/ledger.*", "audio/*/*.mka"):
        found |= project.files(pattern)
    found["ledger rows"] = pq.read_table(layout.report / "ledger.parquet").to_pylist()
    found["plan"] = layout.plan.read_text()
    found["run"] = json.loads(layout.run.read_text())
    for path in sorted(project.results.glob("audio/*/*.json")):
        times = {"seconds", "waited", "cooled"}
        found[f"receipt {path.stem}"] = read_receipt(path).model_dump(exclude=times)
    for path in sorted(project.results.glob(".state/failures/*/*")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[f"failures {path.stem}"] = [{**line, "time": None} for line in lines]
    receipt = json.loads(layout.load_receipt(f"cuepoint-{MODEL}").read_text())
    history = {"videos_written", "videos_removed", "previous_dropped", "verified"}  # differ by where the load began
    found["load receipt"] = {name: value for name, value in receipt.items() if name not in history}
    return found | points_of(project)


def points_of(project):
    """Each point of the published collection, with its vector and its payload."""
    settings = load_settings({"videos": "none", "qdrant": {}, "results": str(project.results)})
    layout = Layout(project.results)
    store = open_store(settings, layout)
    names = [published_name(settings, MODEL), settings.qdrant.collection]
    collections = {store.published(name) for name in names}
    if len(collections) != 1 or None in collections:
        raise Violation(f"the names {names} stand for {collections}")
    (collection,) = collections
    tables = [pq.read_table(path, columns=["point_id"]) for path in project.results.glob("embeddings/*/*.parquet")]
    ids = sorted({row["point_id"] for table in tables for row in table.to_pylist()})
    with store.read(collection) as opened:
        points = {f"point {hit.id}": (hit.vector, hit.payload) for hit in opened.retrieve(ids)}
        points["number of points"] = opened.count()
    if points["number of points"] != len(points) - 1:
        raise Violation(f"{points['number of points']} points, of which {len(points) - 1} are of the tables")
    return points


def check_equal(found, wanted, what):
    """Raise Violation when results differ."""
    if found == wanted:
        return
    differing = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    first = differing[0]
    raise Violation(
        f"{what}: {len(differing)} results differ from the uninterrupted run's ({', '.join(differing[:5])}); "
        f"{first}: {str(found.get(first))[:400]} and not {str(wanted.get(first))[:400]}"
    )


def check_whole(project):
    """Whatever is there under its name is whole, at any time."""
    for path in project.results.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".parquet":
                read_table(path)
            elif path.suffix == ".json" and ("audio" in path.parts or "receipt" in path.parts):
                read_receipt(path)
        except Exception as error:
            raise Violation(f"{path} is not whole: {error}") from error


TEMPORARY = re.compile(r"\.tmp$|\.building$|\.removed$|\.part$|\.ytdl$|^\.new-|\.jsonl$")


def check_tidy(project, *, idle=False):
    """No temporary file, no unfinished or unused collection, no mark of an unfinished job.

    A run that is killed while it writes its ledger a second time, at its very end, can leave a temporary file of it.
    The next run that writes the ledger removes it; an `idle` one, which found nothing to be done, does not.
    """
    left = [
        path
        for path in project.results.rglob("*")
        if TEMPORARY.search(path.name) and "failures" not in path.parts and not (idle and path.parent.name == "report")
    ]
    left += project.results.glob(".state/partial/*/*")
    pointers = project.results.glob("qdrant/edge/*.pointer.json")
    used = {json.loads(path.read_text())["directory"] for path in pointers}
    left += [path for path in project.results.glob("qdrant/edge/*.[0-9]*") if path.is_dir() and path.name not in used]
    marks = [path for path in project.directory.glob(".snakemake/incomplete/**/*") if path.is_file()]
    left += [base64.urlsafe_b64decode(path.name).decode(errors="replace") for path in marks]
    left += [path for path in project.directory.glob(".snakemake/locks/*")]
    if left:
        raise Violation(f"left for ever: {', '.join(map(str, left[:5]))}")


def check_work(events, phase):
    """Nothing was computed twice, nothing ran again that was noted as finished, nobody worked beside an orphan."""
    stored, worker, ended, finished = Counter(), {}, set(), set()
    for event in events:
        job = event["stage"], event["about"]
        if killed := event.get("killed"):  # a second line about a point that was noted already
            if killed == "script":
                ended.discard(worker.get(event["pid"]))
            elif killed == "tree":
                ended.clear()
            continue
        match event["point"]:
            case "second writer" | "never met":
                raise Violation(f"{phase}: {event}")
            case "after rename" if CACHED.search(event["about"]):
                stored[" of ".join(CACHED.search(event["about"]).groups())] += 1
            case "work":
                if job in finished:
                    raise Violation(f"{phase}: {event['stage']} of {event['about']} ran again after it was finished")
                worker[event["pid"]] = job
                ended.discard(job)
            case "end of work":
                ended.add(job)
            case "after the metadata":  # which Snakemake writes for jobs that failed, too
                finished |= {job for name in event["about"].split() if (job := job_of(name)) in ended}
    if again := [name for name, times in stored.items() if times > 1]:
        raise Violation(f"{phase}: computed more than once: {again}")


def job_of(output):
    """(stage, what is worked on) of a job, by one of its outputs."""
    path = Path(output)
    match path.parts[1:-1]:
        case ("audio", _):
            return "download", path.stem
        case ("videos",):
            return "transcribe", path.stem
        case ("embeddings", _):
            return "embed", path.stem
        case ("qdrant",):
            return "load", path.stem.removeprefix("cuepoint-")
    return None


# --- Chains ----------------------------------------------------------------------------------------------------------


@dataclass
class Phase:
    """One list to bring to its end: what an uninterrupted run leaves, and how often it passes each point."""

    name: str
    results: dict
    passed: Counter  # (stage, point) -> times


class Matrix:
    """Runs chains until there were enough kills, and counts them.

    What was counted is kept in `directory`, so that another process over the same directory goes on from there.
    """

    def __init__(self, directory: Path, seed: int):
        self.directory, self.seed = directory, seed
        self.hits: Counter[Kill] = Counter()
        self.orphans = self.chains = 0
        self.seconds = 0.0
        self.phases: list[Phase] = []
        self.deadline = float("inf")
        self.kept = directory / "matrix.pickle"
        if self.kept.exists():
            vars(self).update(pickle.loads(self.kept.read_bytes()))

    def keep(self):
        names = ("hits", "orphans", "chains", "seconds", "phases", "model")
        self.kept.write_bytes(pickle.dumps({name: getattr(self, name) for name in names}))

    @property
    def total(self):
        return self.hits.total()

    def reference(self, site):
        """Uninterrupted runs over the 24 videos, over two fewer, and over all again."""
        watched = self._new_project("reference", site)
        for name in (*LISTS, "24 videos"):
            watched.project.list(*LISTS[name])
            before = len(watched.events)
            status, log, _ = watched.run()
            if status:
                raise Violation(f"the uninterrupted run failed:\n{log[-3000:]}")
            passed = Counter((event["stage"], event["point"]) for event in watched.events[before:])
            cells = {cell: times for cell, times in passed.items() if cell[1] not in {"process", "waits"}}
            self.phases.append(Phase(name, results_of(watched.project), Counter(cells)))
        check_tidy(watched.project)
        self.model = Layout(watched.project.results).exported_model("x").parent

    def run(self, site, kills, minutes=float("inf")):
        """Run chains until there were `kills` kills, or for so long; raises Violation when a promise was not kept."""
        before, began = self.seconds, time.time()
        self.deadline = began + 60 * minutes
        if not self.phases:
            self.reference(site)
            self.keep()
        while self.total < kills and time.time() < self.deadline:
            self.chain(site, kills - self.total)
            self.seconds = before + time.time() - began
            self.keep()
            print(f"{self.total} kills, {self.orphans} orphans, {self.seconds:.0f} s", flush=True)
        missed = [stage for stage in STAGES if not any(kill.stage == stage for kill in self.hits)]
        if self.total >= 50 and missed:
            raise Violation(f"no kill hit {missed}")

    def once(self, site, kill, broken=None):
        """One kill while a shard of the reference is transcribed again; `broken` names a promise that is not kept."""
        directory = self.directory / f"once-{broken}"
        project = Project(self.directory / "reference" / "project", site.proxy_url).copy(directory / "project")
        made = ("transcripts/00001*", "videos/00001*", ".state/cache/transcribe/*/*", "qdrant/cuepoint-*.json")
        for path in [path for pattern in made for path in project.results.glob(pattern)]:
            path.unlink()
        watched = Watched(project, directory / "watch", broken)
        _, log, events = watched.run(kill)
        if not events:
            raise Violation(f"{kill} did not come:\n{log[-2000:]}")
        check_whole(project)
        status, log, _ = watched.run()
        check_work(watched.events, f"{kill} without {broken}")
        if status:
            raise Violation(f"the run after {kill} failed:\n{log[-2000:]}")
        check_equal(results_of(project), self.phases[-1].results, str(kill))

    def chain(self, site, kills, budgets=(16, 6, 6)):
        """One project through all phases, with at most `kills` kills."""
        self.chains += 1
        choose = random.Random(f"{self.seed}-{self.chains}")
        watched = self._new_project(f"chain-{self.chains}", site)
        if self.chains % 4 != 1:  # the export of the model takes as long as all the rest
            shutil.copytree(self.model, Layout(watched.project.results).exported_model("x").parent)
        for phase, room in zip(self.phases, budgets, strict=True):
            budget = min(room, kills)
            watched.project.list(*LISTS[phase.name])
            began, ended, log = len(watched.events), False, ""
            while budget > 0 and not ended and time.time() < self.deadline:
                done, ended, log = self._kill(watched, self._choose(choose, phase, watched))
                budget -= done
                kills -= done
            if not ended:
                status, log, _ = watched.run()
                if status:
                    raise Violation(f"the last run failed ({watched.watch}):\n{log[-3000:]}")
            where = f"{watched.project.directory.parent}, {phase.name}"
            check_work(watched.events[began:], where)
            check_equal(results_of(watched.project), phase.results, where)
            check_tidy(watched.project, idle="Nothing to be done" in log)
            if kills <= 0 or time.time() > self.deadline:
                break
        status, log, _ = watched.run()
        if status or "Nothing to be done" not in log:
            raise Violation(f"{watched.project.directory}: another run did something:\n{log[-2000:]}")
        shutil.rmtree(watched.project.directory.parent)

    def _new_project(self, name, site):
        shutil.rmtree(self.directory / name, ignore_errors=True)  # of a call that was broken off
        project = Project.create(
            self.directory / name / "project",
            site.proxy_url,
            LISTED,
            shard_size=SHARD_SIZE,
            qdrant={"max_delete_share": 0.5},
        )
        (project.directory / "clips").symlink_to(CLIPS)
        return Watched(project, self.directory / name / "watch")

    def _kill(self, watched, kills):
        """Run with kills: how many came, whether the run ended well all the same (or before them), and what it said."""
        status, log, events = watched.run(*kills)
        for kill, event in zip(kills, events, strict=False):
            self.hits[kill] += 1
            self.orphans += event["orphan"]
            print(f"{self.total:4} chain {self.chains}: {kill}{' (orphan)' * event['orphan']}", flush=True)
        if not events:
            print(f"     chain {self.chains}: the run ended before {kills[0]}", flush=True)
            if status:
                raise Violation(f"the run failed by itself ({watched.watch}):\n{log[-3000:]}")
        # Python may swallow a KeyboardInterrupt in the last moments of a script.
        if status == 0 and any(event["killed"] == "script" and event["signal"] != "SIGINT" for event in events):
            raise Violation(f"a script was killed and the run says that all is well: {kills}")
        check_whole(watched.project)
        return len(events), status == 0, log

    def _choose(self, choose, phase, watched):
        """Kills for one run. The run goes on when only a script was killed, so then another one follows."""
        kills = [self._choose_one(choose, phase, watched, [])]
        while kills[-1].whom == "script" and len(kills) < 4:
            kills.append(self._choose_one(choose, phase, watched, kills))
        return kills

    def _choose_one(self, choose, phase, watched, chosen):
        """A point that was hit least, of a stage that has work left; it comes soon, so that much is left for others."""
        project = watched.project
        left = work_left(project, phase)
        cells = [cell for cell in phase.passed if left.get(cell[0])]
        if (watched.watch / "pinned").exists():  # nobody is killed before the orphan is met, which is after the plan
            cells = [cell for cell in cells if cell[0] != "plan"]
        if any(Layout(project.results).exported_model("x").parent.glob("*/model.json")):
            cells = [cell for cell in cells if cell != ("embed", "inside the export")]
        if chosen:  # in the same run: what comes after what it has done already
            cells = [
                cell for cell in cells if cell[0] != "plan" and STAGES.index(cell[0]) >= STAGES.index(chosen[-1].stage)
            ]
        past = [*self.hits.elements(), *chosen]
        seen = Counter((kill.stage, kill.point) for kill in past)
        stage, point = min(cells, key=lambda cell: (seen[cell], choose.random()))
        whom = WHOM[:2] if stage in MAIN_STAGES else WHOM
        ways = [(who, signal) for who in whom for signal in SIGNALS]
        used = Counter((kill.whom, kill.signal) for kill in past)
        who, signal = min(ways, key=lambda way: (used[way], choose.random()))
        soon = phase.passed[stage, point] * left[stage]
        return Kill(stage, point, choose.randint(1, max(1, int(soon))), who, signal)

    def table(self):
        """The kills by stage and point, and by whom and signal, as Markdown."""
        ways = [(who, signal) for who in WHOM for signal in SIGNALS]
        head = ["stage", "point", *(f"{who} {signal.removeprefix('SIG')}" for who, signal in ways), "kills"]
        lines = ["| " + " | ".join(head) + " |", "|---" * 2 + "|--:" * (len(ways) + 1) + "|"]
        for stage, point in sorted(self._cells(), key=lambda cell: (STAGES.index(cell[0]), cell[1])):
            mine = {kill: times for kill, times in self.hits.items() if (kill.stage, kill.point) == (stage, point)}
            numbers = [sum(n for kill, n in mine.items() if (kill.whom, kill.signal) == way) for way in ways]
            shown = [str(number or "") for number in [*numbers, sum(mine.values())]]
            lines.append("| " + " | ".join([stage, point, *shown]) + " |")
        numbers = [sum(n for kill, n in self.hits.items() if (kill.whom, kill.signal) == way) for way in ways]
        lines.append("| all | | " + " | ".join(str(number or "") for number in [*numbers, self.total]) + " |")
        return "\n".join(lines)

    def _cells(self):
        return {cell for phase in self.phases for cell in phase.passed}


def work_left(project, phase):
    """Stage -> the share of its points among which the next kill is chosen; stages without work are left out."""
    videos = [path.stem for path in project.results.glob("audio/*/*.json")]
    shards = -(-len(LISTED) // SHARD_SIZE)
    done = {
        "download": len(videos) / len(LISTED),
        "transcribe": len(list(project.results.glob("videos/*.parquet"))) / shards,
        "embed": len(list(project.results.glob("embeddings/*/*.parquet"))) / shards,
    }
    # A third of what is left: the other two are left for the kills to come.
    left = {stage: (1 - share) / 3 for stage, share in done.items() if share < 1 and phase.passed[stage, "work"]}
    last = {"snakemake": max(left.values())} if left else {"load": 1, "report": 1, "end": 1, "snakemake": 1}
    return left | {"plan": 1} | last


def write_page(page, matrix):
    """Put the figures between the marks in a page of the documentation."""
    text = page.read_text(encoding="utf-8")
    figures = (
        f"{matrix.total} kills in {matrix.chains} chains, {matrix.orphans} of them with a script that outlived its "
        f"Snakemake; {matrix.seconds / 60:.0f} minutes. Everything held.\n\n{matrix.table()}\n"
    )
    start, end = "<!-- kills -->\n", "<!-- /kills -->"
    before, _, rest = text.partition(start)
    page.write_text(before + start + figures + end + rest.partition(end)[2], encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="or begin no other kill after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to work, and to go on from an earlier call")
    parser.add_argument("--page", type=Path, help="page of the documentation to write the figures into")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="kill-matrix-"))
    directory.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(directory, options.seed)
    with Site(CLIPS, MANIFEST) as site:
        matrix.run(site, options.kills, options.minutes)
    print(matrix.table())
    if options.page:
        write_page(options.page, matrix)


if __name__ == "__main__":
    sys.exit(main())
