"""A run on a SLURM cluster.

`estimates` says what a job asks for, `orphans` finds the jobs that a killed run left behind, `plugin` lets Snakemake's
executor plugin hold out what happens on clusters, `client` asks SLURM itself.
"""

from cuepoint.slurm.client import allocation
from cuepoint.slurm.estimates import audio_lengths, transcribe_memory, transcribe_minutes
from cuepoint.slurm.orphans import settle_orphans
from cuepoint.slurm.plugin import prepare_executor

__all__ = [
    "allocation",
    "audio_lengths",
    "prepare_executor",
    "settle_orphans",
    "transcribe_memory",
    "transcribe_minutes",
]
