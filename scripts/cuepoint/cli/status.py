"""`cuepoint status`: how far each stage is, how fast it goes, and what holds the run back."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings
from cuepoint.durations import duration

if TYPE_CHECKING:
    from cuepoint.progress import Progress


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every few seconds, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 5.0,
    configfile: ConfigFiles = None,
    directory: Directory = None,
) -> None:
    """Show each stage's progress, rates and failures, of a run that is going on or of the last one."""
    settings, layout = read_settings(configfile, directory)
    from cuepoint.plan import read_run
    from cuepoint.progress import Observer

    observer = Observer(layout, settings, read_run(layout))
    if not watch:
        typer.echo(_page(observer.look()))
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text(_page(observer.look())), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(Text(_page(observer.look())), refresh=True)


def _page(progress: "Progress") -> str:
    return "\n".join([_when(progress), *progress.lines()])


def _when(progress: "Progress") -> str:
    if progress.stretch is None:
        return "No work has been done yet."
    start, end = progress.stretch
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start))
    if progress.running:
        return f"Going on since {since} ({duration(end - start)})"
    return f"Not running; the last work was from {since} to {time.strftime('%H:%M:%S', time.localtime(end))}"
