"""The `cuepoint` command: what is not a build. None of its verbs takes a run's lock or changes its files.

Each verb is a module of this package that imports what is heavy only when it is called, so that `--help` is quick.
"""

from importlib import import_module
from importlib.util import find_spec

import typer
from typer.core import TyperGroup

from cuepoint.errors import CuepointError


class _Verbs(TyperGroup):
    """Shows errors that a user can act on as one message, and ends with status 1."""

    def invoke(self, context: typer.Context) -> None:
        try:
            super().invoke(context)
        except CuepointError as error:
            typer.echo(f"cuepoint: {error}", err=True)
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


for _verb, _module, _function in (
    ("search", "search", "search"),
    ("status", "status", "status"),
    ("doctor", "doctor", "doctor"),
    ("list", "list", "list_sources"),
    ("explain", "explain", "explain"),
    ("estimate", "estimate", "estimate"),
):
    if find_spec(f"cuepoint.cli.{_module}"):
        app.command(_verb)(getattr(import_module(f"cuepoint.cli.{_module}"), _function))
