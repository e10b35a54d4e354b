"""`cuepoint doctor`: what is missing on this machine, with the mend for each."""

import typer

from cuepoint.cli.options import ConfigFiles, Directory, read_settings
from cuepoint.doctor import Health, Project, examine


def doctor(*, configfile: ConfigFiles = None, directory: Directory = None) -> None:
    """Check this machine for what a run needs; models that are not here yet are downloaded.

    Ends with status 1 when something is missing that would stop a run.
    """
    findings = examine(Project(*read_settings(configfile, directory)))
    for name, finding in findings:
        typer.echo(f"{finding.health:<8} {name}: {finding.text}")
        if finding.mend:
            typer.echo(f"{'':<8} -> {finding.mend}")
    if any(finding.health is Health.BAD for _, finding in findings):
        raise typer.Exit(1)
