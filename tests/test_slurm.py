"""The workflow on a real SLURM cluster: two nodes, three GPUs, and all that goes wrong on clusters."""

import shutil
import signal
import subprocess
from collections import Counter
from contextlib import contextmanager, suppress

import psutil
import pytest
import yaml
from conftest import BIN, CLIPS, ROOT, Project
from slurm_cluster import NODES, Cluster

from cuepoint import slurm
from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.states import Status

DOWNLOAD = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())["download"]
PROFILE = ROOT / "profiles" / "slurm"
TIMEOUT = 400  # seconds after which a run is killed: a hanging one must not hang the tests
# This cluster keeps no accounting, and the tests have no time to ask only every 40 seconds. As many cores as the local
# run has, since sums in another order may differ in the last bit.
QUICK = [
    "--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2",
    "--max-status-checks-per-second", "1", "--set-threads", "transcribe=2", "embed=2",
]  # fmt: skip


class SlurmProject(Project):
    """A project whose Snakemake runs with the SLURM profile."""

    def command(self, *arguments):
        return [
            str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(self.directory),
            "--workflow-profile", str(PROFILE), *QUICK, *arguments,
        ]  # fmt: skip

    def products(self):
        return self.files("transcripts/*") | self.files("videos/*") | self.files("embeddings/*/*")

    @contextmanager
    def running(self, *arguments):
        """Snakemake in the background, and the file that holds what it says; killed at the end of the block."""
        output = self.directory / "output.txt"
        with output.open("ab") as file:
            process = subprocess.Popen(
                self.command(*arguments), env=self.environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            yield process, output
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if missing := Cluster.missing():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm")
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


def demo_project(cluster, site, directory):
    """The demo's project, for a cluster. What failed is not tried again, so that a second run has the same videos."""
    project = SlurmProject.create(directory, site.proxy_url, [], download=DOWNLOAD | {"max_failed_runs": 1})
    shutil.copy(ROOT / "demo" / "videos.txt", directory / "videos.txt")
    shutil.copytree(CLIPS, directory / "clips")
    project.environment |= cluster.environment
    return project


def jobs_of(cluster, earlier):
    return [job for job in cluster.jobs() if job.id > earlier]


def last_job(cluster):
    return max((job.id for job in cluster.jobs()), default=0)


def job_of(cluster, earlier, rule, state="RUNNING"):
    """Wait for the newest job of a rule (with wildcards) to reach a state."""

    def newest():
        jobs = [job for job in jobs_of(cluster, earlier) if job.rule.startswith(rule)]
        return jobs[-1] if jobs and jobs[-1].state == state else None

    return cluster.wait_until(newest, f"{rule} {state}", TIMEOUT)


def most_at_once(jobs):
    """The most GPUs that were in use at a time."""
    return max(sum(other.gpus for other in jobs if other.started <= job.started < other.ended) for job in jobs)


@pytest.fixture(scope="module")
def calm_run(cluster, site, tmp_path_factory):
    """The demo on the cluster with two of its three GPUs: (project, its jobs)."""
    earlier = last_job(cluster)
    project = demo_project(cluster, site, tmp_path_factory.mktemp("calm") / "project")
    project.snakemake("--resources", "gpu=2", timeout=TIMEOUT)
    return project, jobs_of(cluster, earlier)


@pytest.mark.slurm
def test_a_run_on_the_cluster_ends_with_the_same_bytes_as_a_local_one(demo, calm_run):
    project, _ = calm_run
    assert SlurmProject.products(demo) == project.products()


@pytest.mark.slurm
def test_a_run_is_a_job_a_shard_and_model_and_downloads_stay_on_the_submit_host(calm_run):
    project, jobs = calm_run
    shards = len(project.files("transcripts/*"))
    assert Counter(job.rule.partition("_")[0] for job in jobs) == {"transcribe": shards, "embed": shards}
    assert all(job.state == "COMPLETED" for job in jobs)


@pytest.mark.slurm
def test_no_more_gpus_are_in_use_than_the_limit_allows(calm_run):
    _, jobs = calm_run
    assert all(job.gpus == 1 for job in jobs)
    assert most_at_once(jobs) <= 2


@pytest.mark.slurm
def test_each_job_has_a_gpu_of_its_own_and_its_log_names_it(cluster, calm_run):
    project, jobs = calm_run
    seen = cluster.devices()
    given = {job.id: set(seen[job.id]) for job in jobs}
    assert all(len(devices) == 1 for devices in given.values())
    for job in jobs:
        ((node, device),) = given[job.id]
        assert node == job.node
        assert int(device) < len(NODES[node])
        together = [other for other in jobs if other.started < job.ended and job.started < other.ended]
        assert sum(given[other.id] == given[job.id] for other in together) == 1
    logs = b"".join(project.files("logs/transcribe/*").values()).decode()
    assert all(f"SLURM job {job.id} on {job.node}, CUDA" in logs for job in jobs if job.rule.startswith("transcribe"))


def processes_of(job):
    """Processes of a job on this machine: the Snakemakes and what they run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == str(job.id) and "snakemake" in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_all(processes):
    """SLURM's own kill does not reach every stopped process."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def rough_run(cluster, site, tmp_path_factory, request):
    """The demo while one job is cancelled, one times out, the controller goes away and a node dies."""
    earlier = last_job(cluster)
    project = demo_project(cluster, site, tmp_path_factory.mktemp("rough") / "project")
    with project.running() as (snakemake, output):
        stuck = job_of(cluster, earlier, "transcribe_wildcards_00001")
        suspended = cluster.wait_until(lambda: processes_of(stuck), "the job's processes")
        request.addfinalizer(lambda: kill_all(suspended))
        for process in suspended:
            process.suspend()
        cluster.slurm("scontrol", "update", f"JobId={stuck.id}", "TimeLimit=1")
        cluster.slurm("scancel", str(job_of(cluster, earlier, "transcribe_wildcards_00000").id))
        job_of(cluster, earlier, "transcribe_wildcards_00002", "COMPLETED")

        known = cluster.asked_in_vain()
        cluster.stop_controller()
        cluster.wait_until(
            lambda: cluster.asked_in_vain() >= known + 8, "an outage longer than the plugin's default bears"
        )
        cluster.start_controller()

        embedding = job_of(cluster, earlier, "embed_wildcards_all-MiniLM-L6-v2_00001")
        cluster.slurm("scontrol", "update", f"NodeName={embedding.node}", "State=DOWN", "Reason=test")
        cluster.slurm("scontrol", "update", f"NodeName={embedding.node}", "State=RESUME")
        snakemake.wait(TIMEOUT)
    assert snakemake.returncode == 0, output.read_text()[-6000:]
    return project, jobs_of(cluster, earlier)


def tries(jobs, rule):
    return [job for job in jobs if job.rule == rule]


@pytest.mark.slurm
def test_a_rough_run_ends_with_the_same_bytes_as_a_local_one(demo, rough_run):
    project, _ = rough_run
    assert SlurmProject.products(demo) == project.products()


@pytest.mark.slurm
@pytest.mark.parametrize(("shard", "state"), [("00000", "CANCELLED"), ("00001", "TIMEOUT")])
def test_a_cancelled_or_timed_out_job_is_tried_again_with_more(rough_run, shard, state):
    _, jobs = rough_run
    first, *others = tries(jobs, f"transcribe_wildcards_{shard}")  # the outage or the lost node may cost another one
    assert (first.state, others[-1].state) == (state, "COMPLETED")
    assert [job.memory for job in others] == [number * first.memory for number in range(2, len(others) + 2)]
    assert [job.minutes for job in others] == [15 * number for number in range(2, len(others) + 2)]


@pytest.mark.slurm
def test_a_job_that_loses_its_node_goes_back_to_the_queue(rough_run):
    _, jobs = rough_run
    (job,) = tries(jobs, "embed_wildcards_all-MiniLM-L6-v2_00001")
    assert job.state == "COMPLETED"
    assert job.restarts == 1


@pytest.mark.slurm
def test_after_a_kill_the_jobs_that_go_on_are_waited_for_and_not_submitted_twice(demo, cluster, site, tmp_path):
    earlier = last_job(cluster)
    project = demo_project(cluster, site, tmp_path / "project")
    # One GPU is left, so that one orphan runs and two wait in the queue.
    cluster.slurm("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        with project.running() as (first, _):
            job_of(cluster, earlier, "transcribe")
            cluster.wait_until(lambda: len(jobs_of(cluster, earlier)) == 3, "all transcribe jobs", TIMEOUT)
            first.send_signal(signal.SIGKILL)
        with project.running() as (second, output):
            cluster.wait_until(lambda: "waiting for them to end" in output.read_text(), "a word on the orphans")
            cluster.slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
            second.wait(TIMEOUT)
        assert second.returncode == 0, output.read_text()[-6000:]
    finally:
        with suppress(AssertionError):  # a node that is back already cannot be resumed
            cluster.slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert "SLURM jobs of an earlier run that was killed still go on" in output.read_text()
    assert set(Counter(job.rule for job in jobs_of(cluster, earlier)).values()) == {1}
    assert SlurmProject.products(demo) == project.products()


@pytest.fixture
def in_cluster(cluster, monkeypatch):
    """This process itself as a SLURM client."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    return cluster


def sleepers(cluster, name, number=2):
    for _ in range(number):
        cluster.slurm(
            "sbatch", f"--job-name={name}", "--comment=rule_transcribe", "--output=/dev/null", "--wrap", "sleep 600"
        )


@pytest.mark.slurm
def test_orphans_are_cancelled_when_that_is_wanted(in_cluster, tmp_path, caplog):
    layout = Layout(tmp_path)
    slurm.remember_run(layout, "killed-run")
    sleepers(in_cluster, "killed-run")
    sleepers(in_cluster, "another-project", 1)
    slurm.settle_orphans(layout, "cancel")
    assert [job.name for job in in_cluster.jobs() if job.state in {"RUNNING", "PENDING"}] == ["another-project"]
    assert "2 SLURM jobs of an earlier run" in caplog.text
    assert "cancelling them" in caplog.text
    in_cluster.cancel_all()


@pytest.mark.slurm
def test_the_jobs_of_a_run_that_goes_on_are_no_orphans(in_cluster, tmp_path):
    layout = Layout(tmp_path)
    slurm.remember_run(layout, "live-run")
    sleepers(in_cluster, "live-run", 1)
    with hold(layout.lock("run", "run"), "the run"):
        slurm.settle_orphans(layout, "cancel")
    assert [job.state for job in in_cluster.jobs() if job.name == "live-run"][-1] in {"RUNNING", "PENDING"}
    in_cluster.cancel_all()


@pytest.mark.slurm
def test_asking_an_accounting_database_that_is_not_there_fails_at_once(cluster, site, tmp_path):
    project = demo_project(cluster, site, tmp_path / "project")
    done = project.snakemake("--slurm-status-command", "sacct", check=False)
    assert done.returncode == 1
    assert "this cluster keeps no accounting" in done.stderr
    assert not project.files("transcripts/*")


def test_noted_runs_without_slurm_here_say_what_to_do(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    slurm.remember_run(layout, "killed-run")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentFault, match="start the workflow on the cluster"):
        slurm.settle_orphans(layout, "wait")


def test_time_and_memory_grow_with_audio_model_and_attempt(tmp_path):
    turbo, large = TranscribeSettings(model="large-v3-turbo"), TranscribeSettings(model="large-v3")
    day = [3600.0] * 24
    assert slurm.transcribe_minutes([], turbo) < slurm.transcribe_minutes(day, turbo)
    assert slurm.transcribe_minutes(day, turbo) < slurm.transcribe_minutes(day, large)
    assert slurm.transcribe_minutes(day, large, speed=96) == slurm.transcribe_minutes([], large) + 15
    assert slurm.transcribe_minutes(day, turbo, attempt=3) == 3 * slurm.transcribe_minutes(day, turbo)
    assert slurm.transcribe_minutes(day, TranscribeSettings(device="cpu")) > 24 * 60 / 2
    assert slurm.transcribe_memory([36000.0], turbo) > slurm.transcribe_memory(day, turbo)
    assert slurm.transcribe_memory(day, large) > slurm.transcribe_memory(day, turbo)
    assert slurm.transcribe_memory(day, turbo, attempt=2) == 2 * slurm.transcribe_memory(day, turbo)
    (tmp_path / "model.bin").write_bytes(bytes(3_000_000))
    local = TranscribeSettings(model=str(tmp_path))
    assert slurm.transcribe_memory(day, turbo) - slurm.transcribe_memory(day, local) == 3300 - 3


def test_audio_is_counted_from_the_receipts_and_unknown_until_all_are_there(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    Receipt(video_id="a", url="u", status=Status.OK, sha256="0", duration=12.5).write(paths[0])
    with pytest.raises(FileNotFoundError):
        slurm.audio_lengths(paths)
    Receipt(video_id="b", url="u", status=Status.UNAVAILABLE).write(paths[1])
    assert slurm.audio_lengths(paths) == [12.5, 0.0]
    paths[1].write_text("damaged: the job says so, the run goes on")
    assert slurm.audio_lengths(paths) == [12.5, 0.0]
