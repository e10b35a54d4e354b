"""What the profiles and the command line really lead to: settings of the run, limits, cores of a GPU job."""

import json
import re

import pytest
from conftest import ROOT, Project
from snakemake.cli import parse_args

from cuepoint import devices

GPUS = max(devices.count(), 1)
DOWNLOADS = 3
PROBE = f"""
import json, sys
configfile: "config.yaml"
include: "{ROOT / "rules" / "common.smk"}"
limits = {{name: workflow.global_resources[name].value for name in ("gpu", "downloads")}}
print("LIMITS", json.dumps(limits), file=sys.stderr)
rule all:
    threads: get_gpu_job_threads
    shell: "true"
"""
SLURM = str(ROOT / "profiles" / "slurm")
SAFE_RESUME = ("rerun_triggers", "rerun_incomplete", "keep_going", "nolock", "show_failed_logs", "scheduler")


@pytest.fixture
def settings(monkeypatch):
    """What Snakemake makes of a command given in the repository."""
    monkeypatch.chdir(ROOT)

    def effective(*command):
        _, arguments = parse_args(command)
        known = {name: value for name, value in vars(arguments).items() if name not in {"profile", "workflow_profile"}}
        known["default_resources"] = repr(known["default_resources"])
        known["max_jobs_per_timespan"] = vars(known["max_jobs_per_timespan"])
        return known

    return effective


def test_both_ways_to_name_the_cluster_profile_lead_to_the_same_settings(settings):
    assert settings("--workflow-profile", SLURM) == settings("--profile", SLURM)


def test_a_run_resumes_safely_on_one_machine_and_on_a_cluster_alike(settings):
    local, cluster = settings("--cores", "2"), settings("--workflow-profile", SLURM)
    assert {name: local[name] for name in SAFE_RESUME} == {name: cluster[name] for name in SAFE_RESUME}
    assert (local["rerun_incomplete"], local["keep_going"], local["nolock"]) == (True, True, True)
    assert (local["executor"], cluster["executor"]) == (None, "slurm")


def test_retries_are_set_for_the_cluster_only_where_they_do_not_multiply(settings):
    assert settings("--workflow-profile", SLURM)["retries"] == 2
    for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        assert "retries:" not in path.read_text(), f"{path.name}: each SLURM job would honour it once more"


def test_a_cluster_is_asked_seldom_and_for_as_long_as_it_takes(settings):
    cluster = settings("--workflow-profile", SLURM)
    assert cluster["max_status_checks_per_second"] <= 0.1
    assert int(cluster["slurm_init_seconds_before_status_checks"]) >= 40
    assert int(cluster["slurm_status_attempts"]) * 10 > 7 * 24 * 3600  # a week of outage


@pytest.mark.parametrize(("local", "clustered"), [(["download", "load"], 10), (["load"], 20), ([], 21)])
def test_300_videos_are_tens_of_cluster_jobs(tmp_path, local, clustered):
    videos = [f"http://demo.example/watch/video-{number}" for number in range(300)]
    project = Project.create(tmp_path / "project", "http://127.0.0.1:9", videos, shard_size=64, slurm={"local": local})
    told = project.snakemake("--dry-run", "--workflow-profile", SLURM).stdout
    jobs = {rule: int(number) for rule, number in re.findall(r"^(transcribe|embed|load) +(\d+)$", told, re.MULTILINE)}
    jobs["download"] = told.count("Group job download")
    assert sum(number for rule, number in jobs.items() if rule not in local) == clustered


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """A project whose Snakefile tells the limits; planned with `probe(*arguments)`."""
    project = Project.create(
        tmp_path_factory.mktemp("probe") / "project",
        "http://127.0.0.1:9",
        ["night-sky"],
        download={"parallel": DOWNLOADS},
    )
    (project.directory / "Snakefile").write_text(PROBE)

    def planned(*arguments):
        return project.snakemake("--snakefile", str(project.directory / "Snakefile"), "--dry-run", *arguments)

    return planned


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ([], {"gpu": GPUS, "downloads": DOWNLOADS}),
        (["--resources", "gpu=1"], {"gpu": 1, "downloads": DOWNLOADS}),
        (["--resources", "downloads=2"], {"gpu": GPUS, "downloads": 2}),
        (["--workflow-profile", SLURM], {"gpu": 8, "downloads": DOWNLOADS}),
        (["--profile", SLURM], {"gpu": 8, "downloads": DOWNLOADS}),
        (["--profile", SLURM, "--resources", "gpu=2"], {"gpu": 2, "downloads": DOWNLOADS}),
    ],
)
def test_limits_hold_however_the_run_is_started(probe, arguments, limits):
    told = re.search(r"LIMITS (\{.*\})", probe(*arguments).stderr)
    assert json.loads(told[1]) == limits


@pytest.mark.skipif(devices.count() > 0, reason="this machine has a GPU")
def test_without_a_gpu_one_job_at_a_time_has_all_cores(probe):
    told = probe("--cores", "3")
    assert re.search(r"threads: 3$", told.stdout + told.stderr, re.MULTILINE)
