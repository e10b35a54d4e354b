"""The last step of `make demo`: what was ingested, what was not and why, and three searches with known answers."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

DEMO = Path(__file__).parent

QUESTIONS = {  # query -> ID of the clip that answers it, as the site and demo/manifest.json name it
    "how do I cook a vegetable soup for dinner": "kitchen-basics",
    "watching icy objects in the sky with a telescope": "comet-watch",
    "keeping a safe copy of my data": "backup-school",
}


def main() -> None:
    """Print the ledger and the searches; end with status 1 when an answer is not the expected one."""
    console = Console()
    show_ledger(console)
    wrong = [query for query, expected in QUESTIONS.items() if not answers(console, query, expected)]
    if wrong:
        sys.exit(f"These searches did not find what they should: {wrong}")
    console.print(
        f"\nAll {len(QUESTIONS)} searches found the right clip. Ask your own: "
        "[bold].venv/bin/cuepoint search --directory demo[/bold]"
    )


def show_ledger(console: Console) -> None:
    """Print one line a video: how it ended, and why."""
    table = Table("video", "status", "segments", "why", "next", title="What was ingested")
    for row in pq.read_table(DEMO / "results" / "report" / "ledger.parquet").to_pylist():
        reason = next(iter((row["error"] or "").splitlines()), "")
        cells = (row["title"] or row["source"], row["status"], str(row["segments"] or ""), reason, row["next"])
        table.add_row(*map(escape, cells))
    console.print(table)


def answers(console: Console, query: str, expected: str) -> bool:
    """Search for `query` with the command that users have; whether the first hit is in the expected clip."""
    command = [
        Path(sys.executable).with_name("cuepoint"),
        "search",
        query,
        "--directory",
        DEMO,
        "--json",
        "--limit",
        "1",
    ]
    hits = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = bool(hits) and hits[0]["video_id"].startswith(expected)
    mark = "[green]found[/green]" if found else f"[red]expected {expected}[/red]"
    console.print(f"\n[bold]{query}?[/bold]  {mark}")
    for hit in hits:
        console.print(
            f"  {hit['score']:.2f}  {hit['title']}, {hit['start']:.0f} s: {hit['text']}\n        {hit['url']}"
        )
    return found


if __name__ == "__main__":
    main()
