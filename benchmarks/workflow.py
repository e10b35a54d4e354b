"""What Snakemake itself costs: planning, running and checking the workflow when the stages do nothing.

    python benchmarks/workflow.py 100 1000 10000 [--plain] [--full-run-up-to 1000]

For each number of videos: a dry run, a full run in which every script only writes outputs of the right names, a run
that finds nothing to do, and one after ten videos were appended; wall seconds and peak memory of the main process. With
`--plain` each is also measured for the plain design (one job a video and stage) and the ratio is printed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SNAKEMAKE = Path(sys.executable).with_name("snakemake")

NO_OPS = {
    "download.py": """
from pathlib import Path
text = '{"video_id": "%s", "url": "u", "status": "ok"}' % snakemake.wildcards.video_id
Path(snakemake.output.receipt).write_text(text)
""",
    "transcribe.py": """
from pathlib import Path
Path(snakemake.output.transcripts).touch(); Path(snakemake.output.videos).touch()
""",
    "embed.py": "from pathlib import Path\nPath(snakemake.output.embeddings).touch()\n",
    "report.py": "from pathlib import Path\nPath(snakemake.output.report).touch()\n",
    "load.py": "from pathlib import Path\nPath(snakemake.output.receipt).write_text('{}')\n",
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
    """Wall seconds and peak resident memory (MiB) of one Snakemake process."""

    seconds: float
    memory: float


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=int, nargs="+")
    parser.add_argument("--plain", action="store_true", help="also the plain design, and the ratio")
    parser.add_argument("--full-run-up-to", type=int, default=1000, help="larger lists are marked as done instead")
    parser.add_argument("--cores", default="2")
    options = parser.parse_args()
    print(
        "| videos | design | "
        + " | ".join(["dry run", "full run, a video", "nothing to do", "ten appended (dry)"])
        + " |"
    )
    print("|---|---|---|---|---|---|")
    for number in options.videos:
        designs = {"cuepoint": cuepoint_project} | ({"plain": plain_project} if options.plain else {})
        for name, prepare in designs.items():
            with tempfile.TemporaryDirectory() as folder:
                print_row(number, name, measure(prepare(Path(folder)), number, options))


def print_row(number: int, name: str, costs: dict[str, Cost | None]) -> None:
    """Print one row of the table."""
    cells = []
    for step, cost in costs.items():
        if cost is None:
            cells.append("-")
        elif step == "full run":
            cells.append(f"{1000 * cost.seconds / number:.0f} ms")
        else:
            cells.append(f"{cost.seconds:.1f} s, {cost.memory:.0f} MiB")
    print(f"| {number} | {name} | " + " | ".join(cells) + " |", flush=True)


def measure(project: Path, number: int, options: argparse.Namespace) -> dict[str, Cost | None]:
    """Cost of each step for a list of `number` videos in `project`."""
    write_list(project, number)
    run = [str(SNAKEMAKE), "--cores", options.cores, "--resources", "gpu=1", "--quiet", "all"]
    costs: dict[str, Cost | None] = {"dry run": timed([*run, "--dry-run"], project)}
    full = number <= options.full_run_up_to
    costs["full run"] = timed(run, project) if full else None
    if not full:
        return costs | {"nothing to do": None, "appended": None}
    costs["nothing to do"] = timed(run, project)
    write_list(project, number + 10)
    costs["appended"] = timed([*run, "--dry-run"], project)
    return costs


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


def plain_project(folder: Path) -> Path:
    """The plain design: one job a video and stage."""
    (folder / "Snakefile").write_text(PLAIN)
    return folder


def write_list(project: Path, number: int) -> None:
    """Write a list of `number` IDs of the form that YouTube has."""
    (project / "videos.txt").write_text("".join(f"{index:011d}\n" for index in range(number)))


def timed(command: list[str], folder: Path) -> Cost:
    """Run a command to its end. Raises CalledProcessError, with what it printed, when it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read().decode()[-3000:]}")
    return Cost(time.perf_counter() - began, usage.ru_maxrss / 1024)


if __name__ == "__main__":
    main()
