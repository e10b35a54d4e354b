"""Settings of a run on a SLURM cluster."""

from typing import Literal

from pydantic import Field

from cuepoint.settings.base import Section


class SlurmSettings(Section):
    """What the workflow itself does on a SLURM cluster; partition, account and limits stand in profiles/slurm."""

    local: list[Literal["download", "load"]] = Field(["download", "load"])
    """Stages that run where Snakemake was started; take `download` or `load` out and it runs in SLURM jobs."""
    orphans: Literal["wait", "cancel"] = "wait"
    """What a start does about SLURM jobs that a killed run of the same results left behind."""
    audio_speed: float | None = Field(None, gt=0)
    """Hours of audio that one job transcribes in an hour; without it a cautious guess from the model and device."""
