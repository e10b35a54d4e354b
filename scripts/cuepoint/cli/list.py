"""`cuepoint list`: append the videos of channels, playlists and searches to the pinned list."""

import re
from datetime import datetime
from typing import Annotated

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings
from cuepoint.errors import ConfigError, CuepointError

_Day = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y%m%d"], show_default=False)]
_Seconds = Annotated[float | None, typer.Option(min=0, help="In seconds.", show_default=False)]


def list_sources(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Channels, playlists or searches (default: `sources` of the settings).", show_default=False
        ),
    ] = None,
    *,
    newest: Annotated[
        int | None, typer.Option(min=1, help="At most N of each source.", metavar="N", show_default=False)
    ] = None,
    after: _Day = None,
    before: _Day = None,
    min_duration: _Seconds = None,
    max_duration: _Seconds = None,
    title: Annotated[
        str | None, typer.Option(help="Regular expression that the title must contain.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show the lines, append nothing.")] = False,
    configfile: ConfigFiles = None,
    directory: Directory = None,
) -> None:
    """Append the new videos of the sources to the list; what stands there is never reordered or removed.

    A filter drops only what is known to be outside of it: many sites do not tell a video's date in their listings.
    """
    settings, layout = read_settings(configfile, directory)
    wanted = sources or settings.sources
    if not wanted:
        raise ConfigError("nothing to list: name a source, or write `sources:` into config.yaml")
    from cuepoint.download.listing import Filters, append, list_videos, missing

    try:
        re.compile(title or "")
    except re.error as error:
        raise ConfigError(f"--title {title!r} is no regular expression: {error}") from None
    filters = Filters(
        newest=newest,
        after=after.strftime("%Y%m%d") if after else None,
        before=before.strftime("%Y%m%d") if before else None,
        min_duration=min_duration,
        max_duration=max_duration,
        title=title,
    )
    failures = []
    for source in wanted:
        try:
            videos = list_videos(source, filters, layout, settings.download)
        except CuepointError as error:
            failures.append(str(error))
            continue
        new = missing(settings.videos, videos) if dry_run else append(settings.videos, videos)
        for video in new if dry_run else ():
            typer.echo(video.line())
        typer.echo(f"{source}: {len(videos)} videos, {len(new)} of them new in {settings.videos}", err=dry_run)
    if failures:
        raise CuepointError("\n".join(failures))
