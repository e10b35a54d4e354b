"""What Snakemake itself costs: planning, running and checking the workflow when the stages do nothing.

    python benchmarks/workflow.py 300 --plain
    python benchmarks/workflow.py 300 --stock
    python benchmarks/workflow.py 300 --snakemake="--persistence-backend db"
    python benchmarks/workflow.py 10000
    python benchmarks/workflow.py 100000 --limit 10000

For each number of videos: a dry run; a full run in which every script only writes outputs of the right names; a run
that finds nothing to do; a dry run after ten videos were appended. Lists longer than `--full-run-up-to` are not run:
one shard is, and the others get the same files and the same Snakemake records. With `--plain` each step is also
measured for the plain design (one job a video and stage: as scripts like ours, and as the cheapest shell commands that
there are), with `--stock` for our design with Snakemake's scheduler as it is; ratios are printed. With `--limit` a dry
run with that `limit_unprocessed` comes first.

Seconds of wall, and in brackets seconds of processor time of all processes. A full run is told per video: everything
from the command to its end over the number of videos (the goal of 60 ms is about this), then the processor time of all
processes, then that of the main process alone, which is what Snakemake adds where jobs take their time elsewhere.
"""

import argparse
import base64
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cuepoint.layout import Layout, prefix
from cuepoint.plan import draft_run, write_run
from cuepoint.settings import load_settings
from cuepoint.sources import read_list

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")

NO_OPS = {
    "download.py": """
text = '{"video_id": "%s", "url": "u", "status": "ok", "sha256": "0"}' % snakemake.wildcards.video_id
open(snakemake.output.receipt, "w").write(text)
""",
    "transcribe.py": """
open(snakemake.output.transcripts, "w")
open(snakemake.output.videos, "w")
""",
    "embed.py": 'open(snakemake.output.embeddings, "w")\n',
    "report.py": 'for path in snakemake.output:\n    open(path, "w")\n',
    # A receipt, and an empty collection: one that is missing would be loaded again.
    "load.py": """
import os
folder, name = os.path.split(snakemake.output.receipt)
os.makedirs(folder + "/edge/empty.1", exist_ok=True)
open(folder + "/edge/" + name.replace(".json", ".pointer.json"), "w").write('{"directory": "empty.1"}')
open(snakemake.output.receipt, "w").write("{}")
""",
}

PLAIN = """
VIDEOS = open("videos.txt").read().split()
rule all:
    input: "results/loaded"
rule download:
    output: "results/audio/{video}.mka"
    shell: "touch {output}"
rule transcribe:
    input: "results/audio/{video}.mka"
    output: "results/transcripts/{video}.parquet"
    resources: gpu=1
    shell: "touch {output}"
rule embed:
    input: "results/transcripts/{video}.parquet"
    output: "results/embeddings/{video}.parquet"
    resources: gpu=1
    shell: "touch {output}"
rule load:
    input: expand("results/embeddings/{video}.parquet", video=VIDEOS)
    output: "results/loaded"
    shell: "touch {output}"
"""


@dataclass(frozen=True)
class Cost:
    """What one Snakemake process took."""

    seconds: float
    cpu: float  # processor seconds of it and all its jobs
    main: float  # processor seconds of it alone
    memory: float  # MB, its peak


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=int, nargs="+")
    parser.add_argument("--plain", action="store_true", help="also the plain design, and the ratio")
    parser.add_argument("--stock", action="store_true", help="also with the scheduler as it is, and the ratio")
    parser.add_argument("--full-run-up-to", type=int, default=10_000, help="longer lists are made as if they had run")
    parser.add_argument("--limit", type=int, help="also a dry run with this limit_unprocessed")
    parser.add_argument("--cores", default="2")
    parser.add_argument("--snakemake", default="", help="further arguments of Snakemake, as one word")
    options = parser.parse_args()
    print("| videos | design | dry run | full run, a video | nothing to do | ten appended (dry run) | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for number in options.videos:
        designs = {"cuepoint": cuepoint_project}
        if options.plain:
            designs |= {"plain, scripts": plain_project, "plain, touch": touching_project}
        if options.stock:
            designs["stock scheduler"] = stock_project
        measured = {}
        for name, prepare in designs.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name] = measure(prepare(Path(folder)), number, options)
            print_row(number, name, measured[name])
        for name in measured.keys() - {"cuepoint"}:
            print_ratio(number, name, measured["cuepoint"], measured[name])


def measure(project: Path, number: int, options: argparse.Namespace) -> dict[str, Cost]:
    """Cost of each step for a list of `number` videos in `project`."""
    write_list(project, number)
    run = [str(SNAKEMAKE), "--cores", options.cores, "--resources", "gpu=1", *options.snakemake.split()]
    costs = {}
    if options.limit:
        costs["limited"] = timed([*run, "--dry-run", "--config", f"limit_unprocessed={options.limit}"], project)
        told("dry run with limit_unprocessed", costs["limited"])
    costs["dry run"] = timed([*run, "--dry-run"], project)
    told("dry run", costs["dry run"])
    if number <= options.full_run_up_to:
        costs["full run"] = timed(run, project)
        told("full run", costs["full run"])
    else:
        write_list(project, 64)
        timed(run, project)
        write_list(project, number)
        pretend(project)
        told("load, ledger and report only", timed(run, project))
    costs["nothing to do"] = timed(run, project, expected="Nothing to be done")
    told("nothing to do", costs["nothing to do"])
    write_list(project, number + 10)
    costs["appended"] = timed([*run, "--dry-run"], project)
    told("ten appended", costs["appended"])
    entries = max((len(names) + len(files), folder) for folder, names, files in os.walk(project))
    print(f"largest folder: {entries[1]} with {entries[0]} entries", file=sys.stderr, flush=True)
    return costs


def print_row(number: int, name: str, costs: dict[str, Cost]) -> None:
    """Print one row of the table."""
    full = costs.get("full run")
    cells = {step: f"{cost.seconds:.1f} s ({cost.cpu:.1f})" for step, cost in costs.items()}
    cells["full run"] = "-"
    if full:
        wall, cpu, main = (1000 * seconds / number for seconds in (full.seconds, full.cpu, full.main))
        cells["full run"] = f"{wall:.0f} ms ({cpu:.0f}, main process {main:.1f})"
    memory = max(cost.memory for cost in costs.values())
    steps = [cells[step] for step in ("dry run", "full run", "nothing to do", "appended")]
    print(f"| {number:,} | {name} | " + " | ".join(steps) + f" | {memory:.0f} MB |", flush=True)


def print_ratio(number: int, name: str, ours: dict[str, Cost], plain: dict[str, Cost]) -> None:
    """Print what another design takes, as a multiple of ours: wall, and processor time in brackets."""
    cells = [
        f"{plain[step].seconds / ours[step].seconds:.1f}x ({plain[step].cpu / ours[step].cpu:.1f}x)"
        if step in ours and step in plain
        else "-"
        for step in ("dry run", "full run", "nothing to do", "appended")
    ]
    memory = max(cost.memory for cost in plain.values()) / max(cost.memory for cost in ours.values())
    print(f"| {number:,} | {name} / cuepoint | " + " | ".join(cells) + f" | {memory:.1f}x |", flush=True)


def cuepoint_project(folder: Path) -> Path:
    """The workflow with scripts that only make their outputs."""
    for name in ("Snakefile", "rules", "profiles", "envs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "scripts").mkdir()
    (folder / "scripts" / "cuepoint").symlink_to(ROOT / "scripts" / "cuepoint")
    for path in (ROOT / "scripts").glob("*.py"):
        (folder / "scripts" / path.name).write_text(NO_OPS.get(path.name, ""))
    return folder


def stock_project(folder: Path) -> Path:
    """Our workflow with Snakemake's scheduler as it is."""
    common = cuepoint_project(folder) / "rules" / "common.smk"
    rules = common.read_text()
    assert "scheduling.show_few(" in rules
    common.write_text(rules.replace("scheduling.show_few(", "str("))
    return folder


def plain_project(folder: Path) -> Path:
    """The plain design: one job a video and stage, with the profile that ours has."""
    touching_project(folder)
    (folder / "Snakefile").write_text(PLAIN.replace('shell: "touch {output}"', 'script: "touch.py"'))
    (folder / "touch.py").write_text('open(snakemake.output[0], "w")\n')
    return folder


def touching_project(folder: Path) -> Path:
    """The plain design with shell commands that only make their outputs."""
    (folder / "Snakefile").write_text(PLAIN)
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    return folder


def write_list(project: Path, number: int) -> None:
    """Write a list of `number` IDs of the form that YouTube has."""
    (project / "videos.txt").write_text("".join(f"{index:011d}\n" for index in range(number)))


def pretend(project: Path) -> None:
    """Give all listed videos the outputs, and Snakemake's records of them, that the one shard has that was run."""
    settings = load_settings({})
    layout = Layout(project / settings.results)
    records = project / ".snakemake" / "metadata"
    draft = draft_run(read_list(project / "videos.txt"), layout, shard_size=settings.shard_size)
    write_run(draft, layout)
    (model,) = settings.embedding.use
    made = f"{0:011d}"  # a video of shard 00000

    def copy(source: Path, target: Path, renamed: dict[str, str]) -> None:
        record = records / encoded(source.relative_to(project))
        text, known = source.read_text(), record.read_text()
        for old, new in renamed.items():
            text, known = text.replace(old, new), known.replace(old, new)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        (records / encoded(target.relative_to(project))).write_text(known)

    for video_id in draft.run.members:
        if not layout.receipt(video_id).exists():
            renamed = {made: video_id, f"/{prefix(made)}/": f"/{prefix(video_id)}/"}
            copy(layout.receipt(made), layout.receipt(video_id), renamed)
    for shard in draft.run.shards():
        for path in (layout.transcripts, layout.videos, lambda shard: layout.embeddings(model, shard)):
            if not path(shard).exists():
                copy(path("00000"), path(shard), {"00000.": f"{shard}."})


def encoded(path: Path) -> str:
    """The name of Snakemake's record of an output."""
    return base64.urlsafe_b64encode(str(path).encode()).decode()


def timed(command: list[str], folder: Path, expected: str = "") -> Cost:
    """Run a command to its end; exits with what it printed when it fails or does not say what is expected."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        alone = [0.0]
        watch = threading.Thread(target=watch_processor_time, args=(process.pid, alone), daemon=True)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        said = output.read().decode()
        if status or expected not in said:
            sys.exit(f"{' '.join(command)} failed:\n{said[-3000:]}")
    watch.join()
    return Cost(seconds, usage.ru_utime + usage.ru_stime, alone[0], usage.ru_maxrss / 1024)


def watch_processor_time(pid: int, seconds: list[float]) -> None:
    """Keep in `seconds[0]` what the process itself has used, its children left out, until it has ended."""
    try:
        process = psutil.Process(pid)
        while True:
            times = process.cpu_times()
            seconds[0] = times.user + times.system or seconds[0]
            time.sleep(0.1)
    except psutil.Error:
        return


def told(step: str, cost: Cost) -> None:
    """Say on the error stream what a step took: a long measurement shows how far it is."""
    print(f"{step}: {cost.seconds:.1f} s, processor {cost.cpu:.1f} s (main process {cost.main:.1f} s), "
          f"{cost.memory:.0f} MB", file=sys.stderr, flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
