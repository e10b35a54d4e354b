"""`cuepoint search`: ask the loaded collection."""

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings
from cuepoint.qdrant.collection import Filters

if TYPE_CHECKING:
    from cuepoint.search import Result

INDENT = "    "
_DAY = {"formats": ["%Y-%m-%d"], "metavar": "YYYY-MM-DD", "show_default": False}


def search(
    query: Annotated[str | None, typer.Argument(help="What to look for; without it, asks again and again.")] = None,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Passages to show.")] = 5,
    video: Annotated[str | None, typer.Option(help="Only in this video: ID or URL.")] = None,
    channel: Annotated[str | None, typer.Option(help="Only of this channel: its name or ID.")] = None,
    language: Annotated[str | None, typer.Option(help="Only in this language: en, de, …")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only uploaded on this day or later.", **_DAY)] = None,
    until: Annotated[datetime | None, typer.Option(help="Only uploaded on this day or before.", **_DAY)] = None,
    model: Annotated[str | None, typer.Option(help="Embedding model; the first of embedding.use by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print results as JSON, one line a query.")] = False,
    configfile: ConfigFiles = None,
    directory: Directory = None,
) -> None:
    """Search what has been loaded, and print the passages with links that open the video at that second."""
    settings, layout = read_settings(configfile, directory)
    model = model or settings.embedding.use[0]
    filters = Filters(
        video=_video_id(video) if video else None,
        channel=channel,
        language=language,
        since=since.date() if since else None,
        until=until.date() if until else None,
    )
    from cuepoint import search as searching

    with searching.open_published(settings, layout, model) as collection:
        from cuepoint.embedding import open_embedder

        embedder = open_embedder(model, settings)
        searching.check_model(collection, model, embedder.revision)
        for asked in [query] if query is not None else _ask():
            results = searching.search(collection, embedder.encode_query(asked), limit, filters)
            if as_json:
                typer.echo(json.dumps([asdict(result) for result in results], ensure_ascii=False))
            else:
                _show(results)


def _ask() -> Iterator[str]:
    """Queries as they are typed, or the lines of a pipe; ends at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives `input` a history and arrow keys)
    while True:
        try:
            asked = input("search: " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if asked:
            yield asked


def _show(results: Sequence["Result"]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for result in results:
        about = " · ".join(filter(None, (result.title or result.video_id, result.channel, result.upload_date)))
        passage = f"{_clock(result.start)}-{_clock(result.end)}  {result.text}"
        console.print(Text.assemble((f"{result.rank:2}  {result.score:.2f}  ", "dim"), (about, "bold")))
        console.print(textwrap.fill(passage, console.width, initial_indent=INDENT, subsequent_indent=INDENT))
        console.print(f"{INDENT}{result.url}\n", style="cyan")
    if not results:
        typer.echo("nothing found", err=True)


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _video_id(written: str) -> str:
    from cuepoint.sources import identify, is_url

    return identify(written)[0] if is_url(written) else written
