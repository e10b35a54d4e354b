"""What SLURM's own commands say."""

import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cuepoint.errors import EnvironmentFault

_SECONDS = 60.0  # until a command that does not answer is given up


@dataclass(frozen=True)
class QueuedJob:
    """A job as `squeue` shows it."""

    id: str
    state: str  # PENDING, RUNNING, COMPLETING, …
    comment: str  # the plugin's: rule_transcribe_wildcards_00000


def queued(names: Iterable[str], *, ended: bool = False) -> list[QueuedJob]:
    """This user's jobs of these names that wait, run or end; with `ended` also those that the controller remembers.

    Raises EnvironmentFault when SLURM cannot be asked.
    """
    states = ["--states=all"] if ended else []
    text = ask("squeue", "--me", "--noheader", "--format=%i|%T|%k", f"--name={','.join(names)}", *states)
    return [QueuedJob(*line.split("|", 2)) for line in text.splitlines()]


def keeps_accounting() -> bool:
    """Whether this cluster has an accounting database. Raises EnvironmentFault when SLURM cannot be asked."""
    return "accounting_storage/none" not in ask("scontrol", "show", "config")


def allocation(environment: Mapping[str, str] = os.environ) -> str | None:
    """Which SLURM job this process runs in, where, with which GPUs and scratch, for its log; None outside of one."""
    if "SLURM_JOB_ID" not in environment:
        return None
    return (
        f"SLURM job {environment['SLURM_JOB_ID']} on {environment.get('SLURMD_NODENAME', 'an unknown node')}, "
        f"CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES', '')}, "
        f"temporary files in {tempfile.gettempdir()}"
    )


def ask(*command: str) -> str:
    """What a SLURM command prints. Raises EnvironmentFault when it is not here, fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise EnvironmentFault(
            f"{command[0]} is not on the PATH here, and this run, or an earlier one over these results, uses SLURM: "
            "start the workflow on the cluster; if an earlier run's jobs have surely ended, delete .state/slurm-runs "
            "in the results"
        ) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"SLURM does not answer ({command[0]} took over {_SECONDS:.0f} s)") from None
    if done.returncode:
        raise EnvironmentFault(f"{command[0]} failed: {done.stderr.strip() or 'no message'}: try again later")
    return done.stdout
