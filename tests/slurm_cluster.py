"""A real SLURM cluster on this machine: slurmctld and one slurmd a node, private to the tests.

It needs Debian's `slurm-wlm` and nothing else: no root, munge, cgroups, accounting database or GPU. Nodes claim more
cores and memory than the machine has, and character devices that every machine has (`/dev/zero`, …) stand for GPUs:
SLURM schedules them, hands them out in CUDA_VISIBLE_DEVICES and never opens them. Ports are free ones, so that several
clusters can run side by side.
"""

import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NODES = {"n1": ["/dev/zero", "/dev/full"], "n2": ["/dev/random"]}
"""Node -> the devices that stand for its GPUs."""

DAEMONS = ("slurmctld", "slurmd")
_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
_PR_SET_PDEATHSIG = 1  # prctl(2)

CONFIG = """\
ClusterName=cuepoint
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MessageTimeout=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
TaskProlog={directory}/task-prolog
# More cores and memory than this machine has; nothing that needs root or cgroups.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
LaunchParameters=disable_send_gids
MailProg=/bin/true
# Jobs over their memory are killed, and over their time two seconds after SIGTERM.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
KillWait=2
# Ended jobs stay visible: there is no accounting database.
AccountingStorageType=accounting_storage/none
MinJobAge=3600
# Quick to schedule and to come back; a requeued job waits until its credential has expired.
SchedulerParameters=bf_interval=1,bf_continue,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=100 State=UP
"""

# Runs at the start of each job step, in its environment: which devices SLURM has given to it.
TASK_PROLOG = """\
#!/bin/sh
echo "$SLURM_JOB_ID $SLURMD_NODENAME ${{CUDA_VISIBLE_DEVICES-none}}" >> {directory}/devices
"""

# Wrappers that stand before the real commands on the PATH. The plugin starts `srun` without SLURM_CONF, which a cluster
# outside of /etc needs.
SRUN = """\
#!/bin/sh
SLURM_CONF={directory}/slurm.conf exec {srun} "$@"
"""
# Counts how often someone asked for jobs in vain.
SQUEUE = """\
#!/bin/sh
{squeue} "$@" && exit
echo >> {directory}/asked-in-vain
exit 1
"""


@dataclass(frozen=True)
class Job:
    """A job that the controller knows, running or ended."""

    id: int
    state: str
    rule: str  # of the workflow, with wildcards: transcribe_wildcards_00000
    node: str
    gpus: int
    minutes: int  # time limit
    memory: int  # MB
    restarts: int  # how often SLURM itself put it back into the queue
    started: float  # Unix time
    ended: float  # Unix time, of a running job when its time is up
    name: str


class Cluster:
    """A cluster that runs while this is used as a context manager."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{directory / 'bin'}:{_PATH}",
        }

    @staticmethod
    def missing() -> list[str]:
        """The daemons that are not installed."""
        return [daemon for daemon in DAEMONS if not shutil.which(daemon, path=_PATH)]

    def __enter__(self) -> "Cluster":
        self._write_files()
        try:
            self.start_controller("-c")
            for node in NODES:
                self._start("slurmd", "-N", node)
            self.wait_until(lambda: self.slurm("sinfo", "-hN", "-tidle", "-o%N").split() == list(NODES), "idle nodes")
        except BaseException:
            self._stop_daemons()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.cancel_all()
        finally:
            self._stop_daemons()

    def slurm(self, *command: str) -> str:
        """What a SLURM command prints; fails loudly."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self) -> list[Job]:
        """All jobs of the cluster, those that have ended too, in order of their submission."""
        text = self.slurm("scontrol", "--oneliner", "show", "jobs")
        return sorted((_job(line) for line in text.splitlines() if line.startswith("JobId=")), key=lambda job: job.id)

    def devices(self) -> dict[int, list[tuple[str, str]]]:
        """Job -> (node, CUDA_VISIBLE_DEVICES) as its step saw them, an entry for each start."""
        seen: dict[int, list[tuple[str, str]]] = {}
        with suppress(FileNotFoundError):
            for line in (self.directory / "devices").read_text().splitlines():
                job, node, devices = line.split(" ")
                seen.setdefault(int(job), []).append((node, devices))
        return seen

    def asked_in_vain(self) -> int:
        """How many times `squeue` has failed so far, whoever called it."""
        with suppress(FileNotFoundError):
            return len((self.directory / "asked-in-vain").read_text().splitlines())
        return 0

    def start_controller(self, *options: str) -> None:
        """Start slurmctld; without `-c` it remembers the jobs from before."""
        self._start("slurmctld", *options)
        self.wait_until(self._answers, "an answer of slurmctld")

    def stop_controller(self) -> None:
        """Stop slurmctld: jobs go on, commands fail."""
        self._stop("slurmctld")

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they are gone."""
        self.slurm("scancel", "--user", getpass.getuser())
        self.wait_until(lambda: not self.slurm("squeue", "--noheader").strip(), "an empty queue")

    def wait_until(self, true, what: str, seconds: float = 60.0):
        """The first true value that calling `true` gives; fails with the daemons' errors when it takes too long."""
        end = time.monotonic() + seconds
        while not (value := true()):
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            assert time.monotonic() < end and not dead, f"no {what}; ended daemons: {dead}\n{self._errors()}"
            time.sleep(0.1)
        return value

    def _write_files(self) -> None:
        for folder in ("state", "spool", "log", "bin"):
            (self.directory / folder).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} "
            f"CPUs=32 RealMemory=64000 Gres=gpu:{len(gpus)}"
            for (node, gpus), node_port in zip(NODES.items(), ports, strict=True)
        ]
        values = {
            "directory": self.directory,
            "host": host,
            "port": port,
            "user": getpass.getuser(),
            "nodes": "\n".join(nodes),
            "srun": shutil.which("srun"),
            "squeue": shutil.which("squeue"),
        }
        gres = [f"NodeName={node} Name=gpu File={gpu}\n" for node, gpus in NODES.items() for gpu in gpus]
        (self.directory / "slurm.conf").write_text(CONFIG.format(**values))
        (self.directory / "gres.conf").write_text("".join(gres))
        for path, text in {"task-prolog": TASK_PROLOG, "bin/srun": SRUN, "bin/squeue": SQUEUE}.items():
            (self.directory / path).write_text(text.format(**values))
            (self.directory / path).chmod(0o755)

    def _start(self, daemon: str, *options: str) -> None:
        name = "-".join([daemon, *[option for option in options if not option.startswith("-")]])
        with (self.directory / "log" / name).open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(daemon, path=_PATH), "-D", *options],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (nothing but one system call)
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _stop_daemons(self) -> None:
        for name in list(self._daemons):
            self._stop(name)

    def _answers(self) -> bool:
        ping = subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True, text=True, check=False)
        return ping.returncode == 0

    def _errors(self) -> str:
        lines = [
            f"{path.name}: {line}"
            for path in (self.directory / "log").iterdir()
            for line in path.read_text(errors="replace").splitlines()
            if re.search(r"error|fatal", line) and "pmix" not in line.lower()
        ]
        return "\n".join(lines[-20:])


def _job(line: str) -> Job:
    fields = dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|$)", line))
    gpus = re.search(r"gpu:(?:\w+:)?(\d+)", fields.get("TresPerJob", ""))
    return Job(
        id=int(fields["JobId"]),
        state=fields["JobState"],
        rule=fields.get("Comment", "").strip().removeprefix("rule_"),
        node=fields.get("NodeList", "").replace("(null)", ""),
        gpus=int(gpus[1]) if gpus else 0,
        minutes=_minutes(fields["TimeLimit"]),
        memory=_megabytes(fields.get("MinMemoryNode", "0")),
        restarts=int(fields["Restarts"]),
        started=_time(fields["StartTime"]),
        ended=_time(fields["EndTime"]),
        name=fields["JobName"],
    )


def _minutes(text: str) -> int:
    """A time limit: [D-]HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    if not re.fullmatch(r"\d+:\d+:\d+", clock):
        return 0  # UNLIMITED, Partition_Limit
    hours, minutes, _ = map(int, clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes


def _megabytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)([MG]?)", text)
    return round(float(match[1]) * (1024 if match[2] == "G" else 1)) if match else 0


def _time(text: str) -> float:
    with suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    return float("inf")  # Unknown: not started yet


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _end_with_parent() -> None:
    """Let the kernel end this daemon when the test process dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
