"""The `cuepoint` command: what is not a build. None of its verbs takes a run's lock or changes its files.

Each verb is a module of this package that imports what is heavy only when it is called, so that `--help` is quick.
"""

import typer
from typer.core import TyperGroup

from cuepoint import faults
from cuepoint.cli.doctor import doctor
from cuepoint.cli.estimate import estimate
from cuepoint.cli.explain import explain
from cuepoint.cli.list import list_sources
from cuepoint.cli.search import search
from cuepoint.cli.status import status


class _Verbs(TyperGroup):
    """Shows errors that a user can act on as one message, and ends with status 1."""

    def invoke(self, context: typer.Context) -> None:
        try:
            super().invoke(context)
        except Exception as error:
            if (message := faults.message_for(error)) is None:
                raise
            typer.echo(f"cuepoint: {message}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def cuepoint() -> None:
    """Search and look after a collection of time-coded passages. Building it is Snakemake's work: `snakemake`."""


app.command("search")(search)
app.command("status")(status)
app.command("explain")(explain)
app.command("list")(list_sources)
app.command("estimate")(estimate)
app.command("doctor")(doctor)
