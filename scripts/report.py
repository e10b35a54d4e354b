"""The ledger of all listed videos, and the report of what was ingested, how fast, and what held it back."""

from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.jobs import job
from cuepoint.layout import Layout
from cuepoint.ledger import write_ledger
from cuepoint.plan import read_run
from cuepoint.report import write_report
from cuepoint.settings import load_settings

if TYPE_CHECKING:
    from snakemake.script import snakemake

with job(snakemake.log[0]):
    settings = load_settings(snakemake.config)
    layout = Layout(settings.results)
    run = read_run(layout)
    write_ledger(layout, settings, run)
    write_report(layout, settings, run, Path(snakemake.output.report))
