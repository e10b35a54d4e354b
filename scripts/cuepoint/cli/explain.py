"""`cuepoint explain`: one video's whole story."""

from typing import Annotated

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings


def explain(
    video: Annotated[str, typer.Argument(help="ID or URL of a video.", metavar="VIDEO")],
    *,
    configfile: ConfigFiles = None,
    directory: Directory = None,
) -> None:
    """Tell what happened to one video: source, attempts, shard, segments, flags, chunks, points and times."""
    settings, layout = read_settings(configfile, directory)
    from cuepoint.plan import read_run
    from cuepoint.sources import identify, is_url
    from cuepoint.story import tell

    video_id = identify(video)[0] if is_url(video) else video
    for line in tell(video_id, layout, settings, read_run(layout)):
        typer.echo(line)
