"""A real SLURM cluster on this machine, private to the tests: slurmctld, one slurmd a node, slurmdbd and its MariaDB.

It needs the Debian packages below and nothing else: no root, munge, cgroups or GPU. Nodes claim more cores and memory
than the machine has, and character devices that every machine has (`/dev/zero`, …) stand for GPUs: SLURM schedules
them, hands them out in CUDA_VISIBLE_DEVICES and never opens them. Ports are free ones, so that several clusters can
run side by side.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

NODES = {"n1": ["/dev/zero", "/dev/full"], "n2": ["/dev/random"]}
"""Node -> the devices that stand for its GPUs."""

MODELS = {"n1": "a100", "n2": "l40"}
"""Node -> what its GPUs are called."""

ACCOUNT, QOS = "lab", "patient"
"""What a user of the cluster may name (the account must be one of the database's)."""

PACKAGES = "slurm-wlm slurmdbd mariadb-server-core mariadb-client-core"
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "mariadbd", "mariadb-install-db")
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
# Jobs over their memory are killed within a second or so, and over their time two seconds after SIGTERM.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
KillWait=2
{accounting}
# Ended jobs stay visible, for the tests.
MinJobAge=3600
# Quick to schedule and to come back; a requeued job waits until its credential has expired.
SchedulerParameters=bf_interval=1,bf_continue,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
{nodes}
# What preemption does depends on the partition of the job that has to go.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefMemPerCPU=100 State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=spot PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""

WITH_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStorageEnforce=associations,qos
AccountingStorageTRES=gres/gpu"""
WITHOUT_ACCOUNTING = "AccountingStorageType=accounting_storage/none"

SLURMDBD = """\
AuthType=auth/none
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser={user}
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
"""

DATABASE_INIT = """\
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS slurm@'%' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'%';
"""

# Runs at the start of each job step, in its environment: which devices SLURM has given to it. Waits while jobs are
# held.
TASK_PROLOG = """\
#!/bin/sh
echo "$SLURM_JOB_ID $SLURMD_NODENAME ${{CUDA_VISIBLE_DEVICES-none}}" >> {directory}/devices
while [ -e {directory}/hold ]; do sleep 0.2; done
"""

# Wrappers that stand before the real commands on the PATH. The plugin starts `srun` without SLURM_CONF, which a cluster
# outside of /etc needs.
SRUN = """\
#!/bin/sh
SLURM_CONF={directory}/slurm.conf exec {srun} "$@"
"""
# Counts how often someone asked for jobs, and how often in vain.
ASK = """\
#!/bin/sh
echo >> {directory}/asked
{command} "$@" && exit
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
    gpu_request: str  # as it was asked for
    minutes: int  # time limit
    memory: int  # MB
    restarts: int  # how often SLURM itself put it back into the queue
    submitted: float  # Unix time
    started: float  # Unix time
    ended: float  # Unix time, of a running job when its time is up
    name: str
    project: str  # the directory that it works in
    site: dict[str, str]  # partition, account, QOS, constraint and niceness that it was submitted with


class Cluster:
    """A cluster that runs while this is used as a context manager, with an accounting database or without."""

    def __init__(self, directory: Path, accounting: bool = True):
        self.directory = directory
        self.accounting = accounting
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
            if self.accounting:
                self._start_database()
            self.start_controller("-c")
            for node in NODES:
                self._start("slurmd", "-N", node)
            self.wait_until(
                lambda: set(self.slurm("sinfo", "-hN", "-tidle", "-o%N").split()) == set(NODES), "idle nodes"
            )
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
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-1000:]}{done.stderr}"
        return done.stdout

    def jobs(self, project: Path | None = None) -> list[Job]:
        """All jobs of the cluster, or of a project's directory, ended ones too, in order of their submission."""
        text = self.slurm("scontrol", "--oneliner", "show", "jobs")
        jobs = sorted((_job(line) for line in text.splitlines() if line.startswith("JobId=")), key=lambda job: job.id)
        return [job for job in jobs if project is None or job.project == str(project)]

    def devices(self) -> dict[int, list[tuple[str, str]]]:
        """Job -> (node, CUDA_VISIBLE_DEVICES) as its step saw them, an entry for each start."""
        seen: dict[int, list[tuple[str, str]]] = {}
        with suppress(FileNotFoundError):
            for line in (self.directory / "devices").read_text().splitlines():
                job, node, devices = line.split(" ")
                seen.setdefault(int(job), []).append((node, devices))
        return seen

    def asked_in_vain(self) -> int:
        """How many times `squeue` or `sacct` has failed so far, whoever called it."""
        return self._lines("asked-in-vain")

    def start_controller(self, *options: str) -> None:
        """Start slurmctld; without `-c` it remembers the jobs from before."""
        self._start("slurmctld", *options)
        self.wait_until(lambda: self._succeeds("scontrol", "ping"), "an answer of slurmctld")

    def stop_controller(self) -> None:
        """Stop slurmctld: jobs go on, commands fail."""
        self._stop("slurmctld")

    def start_accounting(self) -> None:
        """Start slurmdbd."""
        self._start("slurmdbd")
        self.wait_until(lambda: self._succeeds("sacctmgr", "--noheader", "show", "cluster"), "an answer of slurmdbd")

    def stop_accounting(self) -> None:
        """Stop slurmdbd: jobs go on and can be submitted, `sacct` fails."""
        self._stop("slurmdbd")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Jobs that start in the block are running and do nothing before its end."""
        (self.directory / "hold").touch()
        try:
            yield
        finally:
            (self.directory / "hold").unlink()

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
        port, self._dbd_port, self._database_port, *ports = _free_ports(3 + len(NODES))
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} "
            f"CPUs=32 RealMemory=64000 Gres=gpu:{MODELS[node]}:{len(gpus)} Feature={MODELS[node]}"
            for (node, gpus), node_port in zip(NODES.items(), ports, strict=True)
        ]
        values = {
            "directory": self.directory,
            "host": host,
            "port": port,
            "user": getpass.getuser(),
            "nodes": "\n".join(nodes),
            "srun": shutil.which("srun"),
            "dbd_port": self._dbd_port,
            "database_port": self._database_port,
        }
        accounting = WITH_ACCOUNTING if self.accounting else WITHOUT_ACCOUNTING
        values["accounting"] = accounting.format(**values)
        gres = [f"NodeName={node} Name=gpu Type={MODELS[node]} File={gpu}\n" for node in NODES for gpu in NODES[node]]
        (self.directory / "slurm.conf").write_text(CONFIG.format(**values))
        (self.directory / "gres.conf").write_text("".join(gres))
        (self.directory / "slurmdbd.conf").write_text(SLURMDBD.format(**values))
        (self.directory / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists
        asking = {f"bin/{name}": ASK.replace("{command}", str(shutil.which(name))) for name in ("squeue", "sacct")}
        for path, text in {"task-prolog": TASK_PROLOG, "bin/srun": SRUN, **asking}.items():
            (self.directory / path).write_text(text.format(**values))
            (self.directory / path).chmod(0o755)

    def _start_database(self) -> None:
        """MariaDB with an empty database, slurmdbd, and in it the cluster and its user."""
        user, data, init = getpass.getuser(), self.directory / "database", self.directory / "init.sql"
        self.slurm("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}", "--skip-test-db")
        init.write_text(DATABASE_INIT)
        self._start(
            "mariadbd", "--no-defaults", f"--datadir={data}", f"--user={user}", f"--init-file={init}",
            f"--socket={data}/socket", "--bind-address=127.0.0.1", f"--port={self._database_port}",
            "--innodb-buffer-pool-size=32M", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        self.wait_until(lambda: _listens(self._database_port), "an answer of MariaDB")
        self.start_accounting()
        for entry in (
            ["cluster", "cuepoint"],
            ["qos", QOS],
            ["account", ACCOUNT],
            ["user", user, f"account={ACCOUNT}", f"qos=normal,{QOS}"],
        ):
            self.slurm("sacctmgr", "--immediate", "add", *entry)

    def _start(self, daemon: str, *options: str) -> None:
        name = "-".join([daemon, *[option for option in options if not option.startswith("-")]])
        with (self.directory / "log" / name).open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(daemon, path=_PATH), *([] if daemon == "mariadbd" else ["-D"]), *options],
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
        for name in reversed(list(self._daemons)):
            self._stop(name)

    def _succeeds(self, *command: str) -> bool:
        return not subprocess.run(
            command, env=self.environment, capture_output=True, check=False, timeout=60
        ).returncode

    def _lines(self, name: str) -> int:
        with suppress(FileNotFoundError):
            return len((self.directory / name).read_text().splitlines())
        return 0

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
    gpu_request = fields.get("TresPerJob") or fields.get("TresPerNode", "")
    gpus = re.search(r"gpu:(?:\w+:)?(\d+)", gpu_request)
    return Job(
        id=int(fields["JobId"]),
        state=fields["JobState"],
        rule=fields.get("Comment", "").strip().removeprefix("rule_"),
        node=fields.get("NodeList", "").replace("(null)", ""),
        gpus=int(gpus[1]) if gpus else 0,
        gpu_request=gpu_request.strip().removeprefix("gres:"),
        minutes=_minutes(fields["TimeLimit"]),
        memory=_megabytes(fields.get("MinMemoryNode", "0")),
        restarts=int(fields["Restarts"]),
        submitted=_time(fields["SubmitTime"]),
        started=_time(fields["StartTime"]),
        ended=_time(fields["EndTime"]),
        name=fields["JobName"],
        project=fields["WorkDir"],
        site={name: fields.get(name, "") for name in ("Partition", "Account", "QOS", "Features", "Nice")},
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


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def _end_with_parent() -> None:
    """Let the kernel end this daemon when the test process dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
