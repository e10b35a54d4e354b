"""Python imports this in every process of a run under test: it notes what the process does, and kills at one point.

Nothing in the code under test knows of it. `tests/kill_matrix.py` puts this directory on PYTHONPATH and names a
directory of its own in CUEPOINT_WATCH, which holds

- `events.jsonl`: what was done, one line each: who (`pid`), in which stage, which point was reached, about what;
- `main`: the process ID of the latest run's main process;
- `kill.json`: the kills to come, one after the other: at which point (`stage`, `point`, `nth` time since the last),
  whom (`tree`, `snakemake` or `script`), and the `signal`.

CUEPOINT_WATCH_BREAK names a guarantee to break, to see that the harness notices.
"""

import fcntl
import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

WATCH = Path(os.environ.get("CUEPOINT_WATCH", "/nonexistent"))
MAIN = "CUEPOINT_WATCH_MAIN"  # process ID of the run's main process: the first Snakemake that comes here
PATIENCE = 120.0  # seconds that an orphan waits to be met by the next run: then the harness fails

AT_THE_END = {"ledger.parquet", "ledger.csv", "report.html"}  # files that the main process writes in any case

SCRIPT = next((found[1] for text in sys.orig_argv if (found := re.search(r"/tmp\w+\.(\w+)\.py$", text))), None)

_held: set[str] = set()  # locks of this process
_begun: set[tuple[str, str]] = set()  # what this process works on: (stage, name)


# --- What is noted ---------------------------------------------------------------------------------------------------


def note(stage, point, about, **more):
    line = json.dumps({"pid": os.getpid(), "stage": stage, "point": point, "about": str(about), **more}) + "\n"
    fd = os.open(WATCH / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)


def noted():
    with (WATCH / "events.jsonl").open() as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def alone():
    """One process at a time."""
    fd = os.open(WATCH / "turn", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def reached(stage, point, about):
    """Note that a point was reached, and kill if it is the one."""
    note(stage, point, about)
    if _is_due(stage, point):
        kill(stage, point, about)


def _is_due(stage, point):
    if (WATCH / "pinned").exists() or _is_orphan():
        return False
    with alone():
        plan = next(iter(_kills()), {})
        if (plan.get("stage"), plan.get("point")) != (stage, point):
            return False
        counter = WATCH / "reached"
        number = 1 + (len(counter.read_bytes()) if counter.exists() else 0)
        counter.write_bytes(b"." * number)
        return number == plan["nth"]


def _is_orphan():
    """Whether this process outlived its run: the kills to come are for the next run, which it does not belong to."""
    return os.environ[MAIN] != (WATCH / "main").read_text()


def _kills():
    with suppress(OSError, ValueError):
        return json.loads((WATCH / "kill.json").read_text())
    return []


# --- Killing ---------------------------------------------------------------------------------------------------------


def kill(stage, point, about):
    import psutil

    with alone():
        plan, *later = _kills()
        (WATCH / "kill.json").write_text(json.dumps(later))
        (WATCH / "reached").unlink()
    main, number = int(os.environ[MAIN]), signal.Signals[plan["signal"]]
    orphan = plan["whom"] == "snakemake" and SCRIPT and number == signal.SIGKILL and _begun
    if orphan:
        (WATCH / "pinned").write_text(str(os.getpid()))
    note(stage, point, about, killed=plan["whom"], signal=plan["signal"], orphan=bool(orphan))
    match plan["whom"]:
        case "script":
            victims = [os.getpid()]
        case "snakemake":
            victims = [main]
        case "tree":
            tree = [main, *(process.pid for process in psutil.Process(main).children(recursive=True))]
            victims = sorted(tree, key=lambda pid: pid == os.getpid())  # oneself last
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    if orphan:
        _wait_to_be_met()


def _wait_to_be_met():
    """Work on only when the next run waits for this orphan, or has begun the same work beside it."""
    began, mine = time.monotonic(), os.getpid()
    while time.monotonic() - began < PATIENCE:
        for event in noted():
            if event["pid"] != mine and (
                (event["point"] == "waits" and event["about"] in _held)
                or (event["point"] == "second writer" and (event["stage"], event["about"]) in _begun)
            ):
                note(SCRIPT, "met", event["about"])
                (WATCH / "pinned").unlink()
                return
        time.sleep(0.05)
    note(SCRIPT, "never met", ", ".join(_held))
    (WATCH / "pinned").unlink()


# --- The points ------------------------------------------------------------------------------------------------------


def stage_of(path):
    """The stage that writes a file: that of the script, or in the main process that of the file."""
    if SCRIPT:
        return SCRIPT
    name = re.sub(r"^\.(.+)\.[^.]+\.tmp$", r"\1", Path(path).name)
    names = {"plan.tsv": "plan", "run.json": "plan"} | dict.fromkeys(
        ("ledger.parquet", "ledger.csv", "report.html"), "end"
    )
    return names.get(name)


def watch_files():
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watched_fsync(fd):
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if stage := stage_of(path):
            reached(stage, "before fsync", path)
        fsync(fd)

    def watched(move):
        def moved(source, target, **options):
            stage = stage_of(target)
            what = "alias switch" if str(target).endswith(".pointer.json") else "rename"
            if stage is None:
                return move(source, target, **options)
            reached(stage, f"before {what}", target)
            move(source, target, **options)
            return reached(stage, f"after {what}", target)

        return moved

    os.fsync, os.replace, os.rename = watched_fsync, watched(replace), watched(rename)


class Torn:
    """A file that is killed in the middle of its second write (the first is the four bytes of Parquet's mark)."""

    def __init__(self, path, stage):
        self.file = Path(path).open("wb")  # noqa: SIM115 - Parquet's writer closes it
        self.path, self.stage, self.writes, self.closed = path, stage, 0, False

    def write(self, data):
        self.writes += 1
        if self.writes != 2:
            return self.file.write(data)
        half = len(data) // 2
        self.file.write(memoryview(data)[:half])
        self.file.flush()
        kill(self.stage, "inside a Parquet write", self.path)
        self.file.write(memoryview(data)[half:])
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def watch_parquet(module):
    begin = module.ParquetWriter.__init__

    @functools.wraps(begin)
    def begun(self, where, *arguments, **options):
        if stage := stage_of(where):
            note(stage, "inside a Parquet write", where)
            if _is_due(stage, "inside a Parquet write"):
                where = Torn(where, stage)
        begin(self, where, *arguments, **options)

    module.ParquetWriter.__init__ = begun


def before(point, owner, name, about=lambda *_, **__: ""):
    """Have `point` reached before each call of `owner.name`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        reached(SCRIPT or "snakemake", point, about(*arguments, **options))
        return function(*arguments, **options)

    setattr(owner, name, wrapped)


def working(owner, name, about):
    """Note when the work on a thing begins and ends, and whether another process is at it already."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*arguments, **options):
        import psutil

        key = about(*arguments, **options)
        mark = WATCH / "working" / f"{SCRIPT}-{key}"
        me = psutil.Process()
        with alone():
            with suppress(OSError, ValueError, psutil.Error):
                pid, born = json.loads(mark.read_text())
                other = psutil.Process(pid)
                if pid != me.pid and other.create_time() == born and other.status() != psutil.STATUS_ZOMBIE:
                    note(SCRIPT, "second writer", key)
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(json.dumps([me.pid, me.create_time()]))
        _begun.add((SCRIPT, key))
        reached(SCRIPT, "work", key)
        result = function(*arguments, **options)
        reached(SCRIPT, "end of work", key)
        mark.unlink(missing_ok=True)
        return result

    setattr(owner, name, wrapped)


def watch_locks(module):
    class Noted(module.FileLock):
        def acquire(self, *arguments, **options):
            if "poll_interval" in options:
                note(SCRIPT or "snakemake", "waits", self.lock_file)
            proxy = super().acquire(*arguments, **options)
            _held.add(self.lock_file)
            return proxy

        def release(self, *arguments, **options):
            super().release(*arguments, **options)
            _held.discard(self.lock_file)

    module.FileLock = Noted


def watch_metadata(module):
    started, finished = module.PersistenceBase.started, module.PersistenceBase.finished
    assert inspect.iscoroutinefunction(finished)

    def watched_started(self, job, *arguments, **options):
        started(self, job, *arguments, **options)
        reached("snakemake", "after the mark of a started job", " ".join(job.output))

    async def watched_finished(self, job):
        reached("snakemake", "before the metadata", " ".join(job.output))
        await finished(self, job)
        reached("snakemake", "after the metadata", " ".join(job.output))

    module.PersistenceBase.started, module.PersistenceBase.finished = watched_started, watched_finished


def watch_edge(module):
    for name in ("upsert", "trim", "delete_videos"):
        function = getattr(module.EdgeCollection, name)

        def wrapped(*arguments, function=function):
            function(*arguments)
            reached(SCRIPT, "inside the load", "")

        setattr(module.EdgeCollection, name, wrapped)


POINTS = {
    "pyarrow.parquet": watch_parquet,
    "snakemake.persistence": watch_metadata,
    "cuepoint.locks": watch_locks,
    "cuepoint.download": lambda module: working(module, "download", lambda video_id, *_, **__: video_id),
    "cuepoint.download.fetch": lambda module: before("inside the transfer", module.Fetcher, "check_size"),
    "cuepoint.asr.shard": lambda module: working(module, "transcribe_shard", lambda *_, videos, **__: videos.stem),
    "cuepoint.asr.engine": lambda module: before("inside the model", module.Engine, "transcribe"),
    "cuepoint.embedding.shards": lambda module: working(
        module, "embed_shard", lambda _, output, *__, **___: output.stem
    ),
    "cuepoint.embedding.embedder": lambda module: before("inside the model", module.Embedder, "encode_tokens"),
    "cuepoint.embedding.exported": lambda module: before("inside the export", module, "_to_openvino"),
    "cuepoint.qdrant.load": lambda module: working(module, "load_collection", lambda model, *_, **__: model),
    "cuepoint.qdrant.edge": watch_edge,
}


# --- Guarantees to break ---------------------------------------------------------------------------------------------


def no_lock(module):
    """Jobs lock nothing."""
    hold = module.hold
    module.hold = lambda path, what, **options: nullcontext() if SCRIPT else hold(path, what, **options)


def no_rename(module):
    """Files are written where they belong."""

    @contextmanager
    def in_place(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        yield Path(target)

    module.atomic_path = in_place


def no_cache(module):
    """What was computed is not found again."""
    cache = module.Layout.cache
    module.Layout.cache = lambda self, stage, video_id, fingerprint, suffix: cache(
        self, stage, video_id, f"{fingerprint}{os.getpid()}", suffix
    )


BREAKS = {
    "lock": ("cuepoint.locks", no_lock),
    "rename": ("cuepoint.atomic", no_rename),
    "cache": ("cuepoint.layout", no_cache),
}


class Watcher(importlib.abc.MetaPathFinder):
    """Runs `POINTS` after the import of the modules that they are about."""

    def __init__(self, patches):
        self.patches = patches  # module -> functions

    def find_spec(self, name, path=None, target=None):
        if name not in self.patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for patch in self.patches.pop(name):
                patch(module)

        spec.loader.exec_module = exec_module
        return spec


if WATCH.is_dir():
    is_snakemake = any(Path(text).name == "snakemake" for text in sys.orig_argv[:3])
    if is_snakemake and MAIN not in os.environ:
        os.environ[MAIN] = str(os.getpid())
        (WATCH / "main").write_text(os.environ[MAIN])
    if MAIN in os.environ and (is_snakemake or SCRIPT):
        patches = {name: [patch] for name, patch in POINTS.items()}
        if broken := os.environ.get("CUEPOINT_WATCH_BREAK"):
            name, patch = BREAKS[broken]
            patches.setdefault(name, []).append(patch)
        sys.meta_path.insert(0, Watcher(patches))
        watch_files()
        note(SCRIPT or "snakemake", "process", " ".join(sys.orig_argv[-3:]))
