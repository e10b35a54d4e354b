"""The workflow on a real SLURM cluster: two nodes, three GPUs, and all that goes wrong on clusters."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import CLIPS, ROOT, Project
from hub import Hub
from slurm_cluster import ACCOUNT, MODELS, NODES, PACKAGES, QOS, Cluster

from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.locks import hold
from cuepoint.receipts import Receipt
from cuepoint.settings import TranscribeSettings
from cuepoint.slurm import audio_lengths, settle_orphans, transcribe_memory, transcribe_minutes
from cuepoint.slurm.orphans import remember_run
from cuepoint.slurm.plugin import judge
from cuepoint.states import Status

DOWNLOAD = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())["download"]
PROFILE = ROOT / "profiles" / "slurm"
IMPATIENT = ROOT / "tests" / "impatient_snakemake.py"
TIMEOUT = 400  # seconds after which a run is killed: a hanging one must not hang the tests
# The tests have no time to ask for the first time after 40 seconds. As many cores as the local run has, since sums in
# another order may differ in the last bit.
QUICK = [
    "--slurm-init-seconds-before-status-checks", "2", "--max-status-checks-per-second", "1",
    "--set-threads", "transcribe=2", "embed=2", "download=1",
]  # fmt: skip
SQUEUE = ["--slurm-status-command", "squeue"]  # as on clusters without an accounting database
FEW = ["night-sky", "kitchen-basics", "greenhouse-tour", "seed-swap"]  # two shards of two
ONE = [str(CLIPS / "eclipse-diary.opus")]


class SlurmProject(Project):
    """A project whose Snakemake runs with the SLURM profile."""

    profile = ("--workflow-profile", str(PROFILE))

    def command(self, *arguments):
        return [
            sys.executable, str(IMPATIENT), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(self.directory),
            *self.profile, *QUICK, *arguments,
        ]  # fmt: skip

    def site_profile(self, **changes):
        """Use a copy of the profile with a site's changes, as docs/slurm.md tells to make them."""
        settings = yaml.safe_load((PROFILE / "config.yaml").read_text())
        for key, value in changes.items():
            name = key.replace("_", "-")
            settings[name] = settings[name] | value if isinstance(value, dict) else value
        folder = self.directory / "profile"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        self.profile = ("--workflow-profile", str(folder))

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


def start(directory, accounting=True):
    if missing := Cluster.missing():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install {PACKAGES}")
    return Cluster(directory, accounting)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with start(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory):
    """A cluster that keeps no accounting."""
    with start(tmp_path_factory.mktemp("bare") / "cluster", accounting=False) as running:
        yield running


def demo_project(cluster, site, directory):
    """The demo's project, for a cluster. What failed is not tried again, so that a second run has the same videos."""
    project = SlurmProject.create(directory, site.proxy_url, [], download=DOWNLOAD | {"max_failed_runs": 1})
    shutil.copy(ROOT / "demo" / "videos.txt", directory / "videos.txt")
    shutil.copytree(CLIPS, directory / "clips")
    project.environment |= cluster.environment
    return project


def small_project(cluster, site, directory, videos=FEW, **config):
    """A project of a few videos, two to a shard, for a cluster."""
    project = SlurmProject.create(directory, site.proxy_url, videos, shard_size=2, **config)
    project.environment |= cluster.environment
    return project


@pytest.fixture(scope="module")
def few(site, tmp_path_factory):
    """The small project, run on this machine without SLURM: what its tables have to be."""
    project = Project.create(tmp_path_factory.mktemp("few") / "project", site.proxy_url, FEW, shard_size=2)
    project.snakemake()
    return SlurmProject.products(project)


def job_of(cluster, project, rule, state="RUNNING"):
    """Wait for a project's newest job of a rule (with wildcards) to reach a state."""

    def newest():
        jobs = [job for job in cluster.jobs(project.directory) if job.rule.startswith(rule)]
        return jobs[-1] if jobs and jobs[-1].state == state else None

    return cluster.wait_until(newest, f"{rule} {state}", TIMEOUT)


@contextmanager
def queueing(cluster, project, partition, number):
    """Let jobs of a partition wait in the queue; at the end of the block `number` jobs of the project do, and start."""
    cluster.slurm("scontrol", "update", f"PartitionName={partition}", "State=DOWN")
    try:
        yield

        def waiting():
            jobs = [job for job in cluster.jobs(project.directory) if job.site["Partition"] == partition]
            return sum(job.state == "PENDING" for job in jobs) == number

        cluster.wait_until(waiting, f"{number} jobs in the queue of {partition}", TIMEOUT)
    finally:
        cluster.slurm("scontrol", "update", f"PartitionName={partition}", "State=UP")


def most_at_once(jobs, weight=lambda job: job.gpus, since=lambda job: job.started):
    """The most GPUs (or another weight) that were in use at a time."""
    return max(sum(weight(other) for other in jobs if since(other) <= since(job) < other.ended) for job in jobs)


def tries(jobs, rule):
    return [job for job in jobs if job.rule == rule]


@pytest.fixture(scope="module")
def calm_run(cluster, site, tmp_path_factory):
    """The demo on the cluster with two of its three GPUs, the profile named the other way: (project, its jobs)."""
    project = demo_project(cluster, site, tmp_path_factory.mktemp("calm") / "project")
    project.profile = ("--profile", str(PROFILE))
    project.snakemake("--resources", "gpu=2", timeout=TIMEOUT)
    return project, cluster.jobs(project.directory)


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


def freeze(cluster, job):
    """Stop a running job's processes, so that it does not end by itself; returns them, to be killed at last."""
    found = cluster.wait_until(lambda: processes_of(job), "the job's processes")
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    return found


def resume(cluster, node):
    """Take a node back into use; one that is back already cannot be resumed."""
    with suppress(AssertionError):
        cluster.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")


@pytest.fixture(scope="module")
def rough_run(cluster, site, tmp_path_factory, request):
    """The demo while one job is cancelled, one times out, the controller goes away and a node dies.

    While it waits for the time limit, a project whose jobs can only fail runs beside it: (project, jobs) of both.
    """
    project = demo_project(cluster, site, tmp_path_factory.mktemp("rough") / "project")
    doomed = small_project(cluster, site, tmp_path_factory.mktemp("doomed") / "project", ONE)
    doomed.configure(transcribe={"model": str(tmp_path_factory.mktemp("no-model"))})
    with project.running(*SQUEUE) as (snakemake, output):
        with queueing(cluster, project, "main", 3):
            pass  # so that all of them start at the same time
        cluster.slurm("scancel", str(job_of(cluster, project, "transcribe_wildcards_00000").id))
        stuck = job_of(cluster, project, "transcribe_wildcards_00001")
        suspended = freeze(cluster, stuck)
        request.addfinalizer(lambda: kill_all(suspended))
        cluster.slurm("scontrol", "update", f"JobId={stuck.id}", "TimeLimit=1")
        failed = doomed.snakemake(*SQUEUE, check=False, timeout=TIMEOUT)
        job_of(cluster, project, "transcribe_wildcards_00002", "COMPLETED")

        known = cluster.asked_in_vain()
        cluster.stop_controller()
        cluster.wait_until(
            lambda: cluster.asked_in_vain() >= known + 8, "an outage longer than the plugin's default bears"
        )
        cluster.start_controller()

        embedding = job_of(cluster, project, "embed_wildcards_all-MiniLM-L6-v2_00001")
        cluster.slurm("scontrol", "update", f"NodeName={embedding.node}", "State=DOWN", "Reason=test")
        resume(cluster, embedding.node)
        snakemake.wait(TIMEOUT)
    assert snakemake.returncode == 0, output.read_text()[-6000:]
    assert failed.returncode == 1
    return (project, cluster.jobs(project.directory)), (doomed, cluster.jobs(doomed.directory))


@pytest.mark.slurm
def test_a_rough_run_ends_with_the_same_bytes_as_a_local_one(demo, rough_run):
    (project, _), _ = rough_run
    assert SlurmProject.products(demo) == project.products()


@pytest.mark.slurm
@pytest.mark.parametrize(("shard", "state"), [("00000", "CANCELLED"), ("00001", "TIMEOUT")])
def test_a_cancelled_or_timed_out_job_is_tried_again_with_more(rough_run, shard, state):
    (_, jobs), _ = rough_run
    first, *others = tries(jobs, f"transcribe_wildcards_{shard}")  # the lost node may cost another one
    assert (first.state, others[-1].state) == (state, "COMPLETED")
    assert [job.memory for job in others] == [number * first.memory for number in range(2, len(others) + 2)]
    assert [job.minutes for job in others] == [15 * number for number in range(2, len(others) + 2)]


@pytest.mark.slurm
def test_a_job_that_loses_its_node_goes_back_to_the_queue(rough_run):
    (_, jobs), _ = rough_run
    (job,) = tries(jobs, "embed_wildcards_all-MiniLM-L6-v2_00001")
    assert job.state == "COMPLETED"
    assert job.restarts == 1


@pytest.mark.slurm
def test_no_more_gpus_are_in_use_than_the_cluster_has(rough_run):
    jobs = [job for _, jobs in rough_run for job in jobs]
    for node, gpus in NODES.items():
        assert most_at_once([job for job in jobs if job.node == node]) <= len(gpus)


@pytest.mark.slurm
def test_a_job_that_always_fails_is_tried_as_often_as_retries_says_and_its_logs_are_kept(rough_run):
    _, (project, jobs) = rough_run
    assert [(job.rule, job.state) for job in jobs] == [("transcribe_wildcards_00000", "FAILED")] * 3
    (log,) = project.files("logs/transcribe/*").values()
    assert b"model.bin is missing" in log
    kept = project.files("logs/slurm/rule_transcribe/*/*.log")
    assert {Path(name).stem for name in kept} == {str(job.id) for job in jobs}
    assert not any(b"Trying to restart" in text for text in kept.values())  # the Snakemakes inside try once


@pytest.fixture(scope="module")
def site_run(cluster, site, tmp_path_factory):
    """A few videos as a site may want it: all of it on nodes, at most two jobs, and one of them out of memory."""
    project = small_project(cluster, site, tmp_path_factory.mktemp("site") / "project", slurm={"local": []})
    project.site_profile(
        jobs=2,
        group_components=["download=2"],
        default_resources={"slurm_account": ACCOUNT, "slurm_partition": "spot", "qos": QOS},
        set_resources={
            "transcribe": {
                "slurm_partition": "main",
                "constraint": MODELS["n1"],
                "gpu_model": MODELS["n1"],
                "tmpdir": f"'{project.directory}/scratch-$SLURM_JOB_ID'",
                "mem_mb": "200 if attempt == 1 and wildcards.shard == '00001' else 4000 * attempt",
            },
            "embed": {"gres": "gpu:1", "gpu": 0, "slurm_extra": "'--nice=100'"},
        },
    )
    project.snakemake(timeout=TIMEOUT)
    return project, cluster.jobs(project.directory)


@pytest.mark.slurm
def test_downloads_and_load_on_nodes_lead_to_the_same_bytes(few, site_run):
    project, jobs = site_run
    assert project.products() == few
    assert Counter(job.rule.partition("_")[0] for job in jobs if job.state == "COMPLETED") == {
        "download": 2, "transcribe": 2, "embed": 2, "load": 1
    }  # fmt: skip
    assert json.loads(next(iter(project.files("qdrant/*.json").values())))["points"] > 0


@pytest.mark.slurm
def test_a_job_out_of_memory_is_tried_again_with_more(site_run):
    project, jobs = site_run
    first, second = tries(jobs, "transcribe_wildcards_00001")
    assert (first.state, first.memory, second.state, second.memory) == ("FAILED", 200, "COMPLETED", 8000)
    (log,) = project.files(f"logs/slurm/*/*/{first.id}.log").values()
    assert b"exceeded memory limit" in log


@pytest.mark.slurm
def test_what_the_profile_says_of_a_site_reaches_slurm(site_run):
    _, jobs = site_run
    everywhere = {"Account": ACCOUNT, "QOS": QOS}
    for job in jobs:
        match job.rule.partition("_")[0]:
            case "transcribe":
                own = {"Partition": "main", "Features": MODELS["n1"], "Nice": "0"}
                assert (job.gpu_request, job.node) == (f"gpu:{MODELS['n1']}:1", "n1")
            case "embed":
                own = {"Partition": "spot", "Features": "(null)", "Nice": "100"}
                assert job.gpu_request == "gpu:1"
            case _:
                own = {"Partition": "spot", "Features": "(null)", "Nice": "0"}
                assert job.gpus == 0
        assert job.site == everywhere | own


@pytest.mark.slurm
def test_no_more_jobs_are_in_the_queue_than_the_limit_allows(site_run):
    _, jobs = site_run
    assert most_at_once(jobs, weight=lambda job: 1, since=lambda job: job.submitted) <= 2


@pytest.mark.slurm
def test_temporary_files_go_to_the_scratch_of_the_node(site_run):
    project, jobs = site_run
    logs = b"".join(project.files("logs/transcribe/*").values()).decode()
    for job in jobs:
        if job.rule.startswith("transcribe") and job.state == "COMPLETED":
            assert re.search(rf"SLURM job {job.id} on .*, temporary files in \S*/scratch-{job.id}$", logs, re.MULTILINE)


def preempt(cluster, job):
    """Submit a job that preempts all GPU jobs of a running job's node, and see that one go."""
    cluster.slurm(
        "sbatch", "--partition=urgent", "--nodes=1", f"--nodelist={job.node}", f"--gpus={len(NODES[job.node])}",
        "--output=/dev/null", "--wrap", "true",
    )  # fmt: skip
    cluster.wait_until(lambda: next(now for now in cluster.jobs() if now.id == job.id).state != "RUNNING", "preemption")


@pytest.fixture(scope="module")
def outage_run(cluster, site, tmp_path_factory):
    """A few videos while controller and accounting go away and other jobs take the nodes.

    Preempted transcribe jobs go back to the queue, embed jobs are cancelled. Returns the project, its jobs, and what
    Snakemake said.
    """
    project = small_project(cluster, site, tmp_path_factory.mktemp("outage") / "project")
    project.site_profile(
        default_resources={"slurm_account": ACCOUNT, "slurm_partition": "main"},
        set_resources={"embed": {"slurm_partition": "spot"}},
    )
    with project.running() as (snakemake, output):
        cluster.wait_until(Layout(project.results).slurm_runs.exists, "start of the run")
        cluster.stop_controller()
        waiting = "jobs are submitted when it is back"
        cluster.wait_until(lambda: waiting in output.read_text(), "a job that waits", TIMEOUT)
        with cluster.held():
            cluster.start_controller()
            cluster.slurm("scancel", str(job_of(cluster, project, "transcribe_wildcards_00001").id))
            preempt(cluster, job_of(cluster, project, "transcribe_wildcards_00000"))

        cluster.stop_accounting()
        known = cluster.asked_in_vain()
        cluster.wait_until(
            lambda: cluster.asked_in_vain() >= known + 8, "an outage longer than the plugin's default bears", TIMEOUT
        )
        job_of(cluster, project, "transcribe_wildcards_00000", "COMPLETED")
        with cluster.held():
            cluster.start_accounting()
            preempt(cluster, job_of(cluster, project, "embed_wildcards_all-MiniLM-L6-v2_00000"))
        snakemake.wait(TIMEOUT)
    assert snakemake.returncode == 0, output.read_text()[-6000:]
    return project, cluster.jobs(project.directory), output.read_text()


@pytest.mark.slurm
def test_outages_of_minutes_cost_no_job_and_no_retry(few, outage_run):
    project, jobs, told = outage_run
    assert project.products() == few
    assert [job.state for job in tries(jobs, "transcribe_wildcards_00000")] == ["COMPLETED"]
    assert "sacct gets no answer" in told
    assert "sacct answers again" in told


@pytest.mark.slurm
def test_a_preempted_job_comes_back_by_itself_or_is_submitted_again(outage_run):
    _, jobs, told = outage_run
    (requeued,) = tries(jobs, "transcribe_wildcards_00000")
    assert (requeued.state, requeued.restarts) == ("COMPLETED", 1)
    preempted, *_, last = tries(jobs, "embed_wildcards_all-MiniLM-L6-v2_00000")
    assert (preempted.state, last.state) == ("PREEMPTED", "COMPLETED")
    assert f"SLURM job {preempted.id} has ended as PREEMPTED and does not come back" in told


@pytest.mark.slurm
def test_a_job_whose_cancellation_stands_in_the_database_is_submitted_again(outage_run):
    _, jobs, _ = outage_run
    states = [job.state for job in tries(jobs, "transcribe_wildcards_00001")]
    assert states == ["CANCELLED", "COMPLETED"]


@pytest.mark.slurm
def test_models_are_fetched_once_before_all_jobs_ctrl_c_cancels_and_a_forgotten_job_is_submitted_again(
    bare_cluster, site, tmp_path
):
    cluster = bare_cluster
    project = small_project(cluster, site, tmp_path / "project", ONE)
    project.configure(transcribe={"model": "demo/tiny", "language": "en", "beam_size": 1})
    with Hub("demo/tiny", ROOT / "demo" / "asr-model") as hub:
        project.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "cache")}
        with project.running(*SQUEUE) as (first, _), cluster.held():
            cluster.wait_until(lambda: cluster.jobs(project.directory), "a job", TIMEOUT)
            assert hub.fetched["model.bin"] == 1
            job_of(cluster, project, "transcribe")
            first.send_signal(signal.SIGINT)
            first.wait(TIMEOUT)
        (cancelled,) = cluster.jobs(project.directory)
        assert job_of(cluster, project, "transcribe", "CANCELLED").id == cancelled.id
        with project.running(*SQUEUE) as (second, output):
            with cluster.held():
                job_of(cluster, project, "transcribe")
                cluster.stop_controller()
                cluster.start_controller("-c")  # with its memory gone
            second.wait(TIMEOUT)
        assert second.returncode == 0, output.read_text()[-6000:]
        assert "is not known any more and does not come back" in output.read_text()
        assert [job.state for job in cluster.jobs(project.directory)] == ["COMPLETED"] * 2
        assert hub.fetched["model.bin"] == 1
    assert len(project.files("embeddings/*/*")) == 1


@pytest.mark.slurm
def test_after_a_kill_the_jobs_that_go_on_are_waited_for_and_not_submitted_twice(demo, cluster, site, tmp_path):
    project = demo_project(cluster, site, tmp_path / "project")
    # One GPU is left, so that one orphan runs and two wait in the queue.
    cluster.slurm("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    try:
        with project.running() as (first, _):
            job_of(cluster, project, "transcribe")
            cluster.wait_until(lambda: len(cluster.jobs(project.directory)) == 3, "all transcribe jobs", TIMEOUT)
            first.send_signal(signal.SIGKILL)
        with project.running() as (second, output):
            cluster.wait_until(lambda: "waiting for them to end" in output.read_text(), "a word on the orphans")
            cluster.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")  # a job is running there
            cluster.slurm("scontrol", "update", "NodeName=n1", "State=RESUME")
            second.wait(TIMEOUT)
        assert second.returncode == 0, output.read_text()[-6000:]
    finally:
        for node in NODES:
            resume(cluster, node)
    assert "SLURM jobs of an earlier run that was killed still go on" in output.read_text()
    jobs = cluster.jobs(project.directory)
    assert set(Counter(job.rule for job in jobs).values()) == {1}
    nodes = [job.node for job in sorted(jobs, key=lambda job: job.started)]
    assert (nodes, nodes[0], nodes[-1]) == (sorted(nodes, reverse=True), "n2", "n1")  # none on a drained node
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
    remember_run(layout, "killed-run")
    sleepers(in_cluster, "killed-run")
    sleepers(in_cluster, "another-project", 1)
    settle_orphans(layout, "cancel")
    assert [job.name for job in in_cluster.jobs() if job.state in {"RUNNING", "PENDING"}] == ["another-project"]
    assert "2 SLURM jobs of an earlier run" in caplog.text
    assert "cancelling them" in caplog.text
    in_cluster.cancel_all()


@pytest.mark.slurm
def test_the_jobs_of_a_run_that_goes_on_are_no_orphans(in_cluster, tmp_path):
    layout = Layout(tmp_path)
    remember_run(layout, "live-run")
    sleepers(in_cluster, "live-run", 1)
    with hold(layout.lock("run", "run"), "the run"):
        settle_orphans(layout, "cancel")
    assert [job.state for job in in_cluster.jobs() if job.name == "live-run"][-1] in {"RUNNING", "PENDING"}
    in_cluster.cancel_all()


@pytest.mark.slurm
def test_the_controller_decides_about_jobs_in_doubt(in_cluster, caplog):
    sleepers(in_cluster, "some-run", 1)
    job = in_cluster.jobs()[-1].id
    assert (
        judge([str(job)], "some-run") == {str(job): "RUNNING"} or judge([str(job)], "some-run")[str(job)] == "PENDING"
    )
    assert judge([str(job + 1000)], "some-run") == {str(job + 1000): "CANCELLED"}
    assert f"SLURM job {job + 1000} is not known any more" in caplog.text
    in_cluster.cancel_all()


@pytest.mark.slurm
def test_asking_an_accounting_database_that_is_not_there_fails_at_once(bare_cluster, site, tmp_path):
    project = small_project(bare_cluster, site, tmp_path / "project", ONE)
    done = project.snakemake(check=False)
    assert done.returncode == 1
    assert "this cluster keeps no accounting" in done.stderr
    assert not project.files("transcripts/*")


def test_noted_runs_without_slurm_here_say_what_to_do(tmp_path, monkeypatch):
    layout = Layout(tmp_path)
    remember_run(layout, "killed-run")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvironmentFault, match="start the workflow on the cluster"):
        settle_orphans(layout, "wait")


def test_time_and_memory_grow_with_audio_model_and_attempt(tmp_path):
    turbo, large = TranscribeSettings(model="large-v3-turbo"), TranscribeSettings(model="large-v3")
    day = [3600.0] * 24
    assert transcribe_minutes([], turbo) < transcribe_minutes(day, turbo)
    assert transcribe_minutes(day, turbo) < transcribe_minutes(day, large)
    assert transcribe_minutes(day, large, speed=96) == transcribe_minutes([], large) + 15
    assert transcribe_minutes(day, turbo, attempt=3) == 3 * transcribe_minutes(day, turbo)
    assert transcribe_minutes(day, TranscribeSettings(device="cpu")) > 24 * 60 / 2
    assert transcribe_memory([36000.0], turbo) > transcribe_memory(day, turbo)
    assert transcribe_memory(day, large) > transcribe_memory(day, turbo)
    assert transcribe_memory(day, turbo, attempt=2) == 2 * transcribe_memory(day, turbo)
    (tmp_path / "model.bin").write_bytes(bytes(3_000_000))
    local = TranscribeSettings(model=str(tmp_path))
    assert transcribe_memory(day, turbo) - transcribe_memory(day, local) == 3300 - 3


def test_audio_is_counted_from_the_receipts_and_unknown_until_all_are_there(tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    Receipt(video_id="a", url="u", status=Status.OK, sha256="0", duration=12.5).write(paths[0])
    with pytest.raises(FileNotFoundError):
        audio_lengths(paths)
    Receipt(video_id="b", url="u", status=Status.UNAVAILABLE).write(paths[1])
    assert audio_lengths(paths) == [12.5, 0.0]
    paths[1].write_text("damaged: the job says so, the run goes on")
    assert audio_lengths(paths) == [12.5, 0.0]
