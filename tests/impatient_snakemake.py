"""Snakemake that asks for its cluster jobs every two seconds: the SLURM plugin waits ten seconds longer each time."""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

interval = RemoteExecutor.next_seconds_between_status_checks
RemoteExecutor.next_seconds_between_status_checks = interval.setter(lambda self, _: interval.fset(self, 2))
sys.exit(main())
