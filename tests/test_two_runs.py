"""Two runs over the same results: the second says who is there and stops; what exists can be searched meanwhile."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import CLIPS, MANIFEST, Project, Site

from cuepoint import runs
from cuepoint.atomic import write_text
from cuepoint.errors import EnvironmentFault, LockedError
from cuepoint.layout import Layout
from cuepoint.locks import hold

LOCKLESS = """
import errno, fcntl, os

def flock(fd, operation):
    raise OSError(errno.{name}, os.strerror(errno.{name}))

fcntl.flock = flock
"""


class Gate(Site):
    """The site, which lets nobody see the page of one video until the gate opens; `asked` tells that one waits."""

    def __init__(self, video_id):
        super().__init__(CLIPS, MANIFEST)
        self.video_id, self.asked, self.opened = video_id, threading.Event(), threading.Event()

    def finish_request(self, request, client_address):
        if self.video_id.encode() in request.recv(4096, socket.MSG_PEEK):
            self.asked.set()
            self.opened.wait(240)
        super().finish_request(request, client_address)


@pytest.fixture
def halfway(tmp_path):
    """A run of two shards whose last download waits at the gate."""
    with Gate("bread-day") as site:
        project = Project.create(
            tmp_path / "project", site.proxy_url, ["greenhouse-tour", "choir-practice", "bread-day"], shard_size=2
        )
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(project.command(), env=project.environment, stdout=log, stderr=log)
            try:
                assert site.asked.wait(120), (tmp_path / "log").read_text()
                yield project, run, site
            finally:
                site.opened.set()
                run.wait(240)


def finished(run, site):
    site.opened.set()
    return run.wait(240) == 0


@pytest.mark.slow
def test_the_second_run_names_the_first_and_stops_and_nothing_is_lost(halfway):
    project, run, site = halfway
    before = Layout(project.results).plan.read_text()
    refused = project.snakemake(check=False)
    assert refused.returncode != 0
    told = re.search(r"is held by process (\d+) on (\S+) since (\S+ \S+)", refused.stderr)
    assert told, refused.stderr
    assert int(told[1]) == run.pid
    assert told[2] == socket.gethostname()
    assert time.strptime(told[3], "%Y-%m-%d %H:%M:%S")
    assert "Traceback" not in refused.stderr
    assert Layout(project.results).plan.read_text() == before
    assert finished(run, site)
    assert "Nothing to be done" in project.snakemake().stderr
    assert len(project.files("report/ledger.csv")["report/ledger.csv"].splitlines()) == 4


@pytest.mark.slow
def test_what_exists_can_be_loaded_and_searched_beside_the_run(halfway):
    project, run, site = halfway
    first = Layout(project.results).embeddings("all-MiniLM-L6-v2", "00000")
    for _ in range(1200):
        if first.exists():
            break
        time.sleep(0.1)
    assert run.poll() is None
    project.snakemake("load_available")
    assert run.poll() is None, "the run goes on beside it"
    hits = subprocess.run(
        [project.command()[0].replace("snakemake", "cuepoint"), "search", "plants in a greenhouse", "--json",
         "--directory", str(project.directory)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert hits.returncode == 0, hits.stderr
    assert "greenhouse-tour" in hits.stdout
    assert "bread-day" not in hits.stdout
    assert finished(run, site)
    assert "Nothing to be done" in project.snakemake().stderr


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_mend(tmp_path, monkeypatch, number):
    """Simulated where the kernel is asked: no such file system can be mounted here."""

    def flock(fd, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(EnvironmentFault, match=r"cannot lock .*run\.lock.*mount with working locks"),
        hold(tmp_path / "run.lock", "another run", wait=False),
    ):
        pytest.fail("nothing may be done without a lock")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK"])
def test_a_run_on_a_file_system_without_locks_stops_before_it_writes_its_plan(tmp_path, name):
    """Simulated in all processes of a run: Python's `fcntl.flock` answers as such a file system does."""
    project = Project.create(tmp_path / "project", "", ["bread-day"])
    (tmp_path / "sitecustomize.py").write_text(LOCKLESS.format(name=name))
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    refused = project.snakemake(check=False, PYTHONPATH=path)
    assert refused.returncode != 0
    assert "The file system that holds the results must support file locks" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not Layout(project.results).plan.exists()
    assert not Layout(project.results).run.exists()


def test_files_are_whole_also_without_locks(tmp_path, monkeypatch):
    """Only the removal of what killed writers left needs them."""

    def flock(fd, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    write_text(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path):
    pid = os.fork()
    if pid == 0:
        with hold(tmp_path / "run.lock", "a run", wait=False):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    with (
        hold(tmp_path / "run.lock", "a run", wait=False),
        pytest.raises(LockedError, match=f"a run is held by process {os.getpid()} on"),
        hold(tmp_path / "run.lock", "a run", wait=False),
    ):
        pytest.fail("two hold it")


def test_sigterm_ends_a_run_also_while_its_main_thread_holds_the_scheduler_s_lock():
    lock, stopped = threading.Lock(), threading.Event()

    def exit_gracefully():
        with lock:
            stopped.set()

    before = signal.getsignal(signal.SIGTERM)
    try:
        runs.stop_on_sigterm(exit_gracefully)
        with lock:
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stopped.wait(0.1)
        assert stopped.wait(30)
    finally:
        signal.signal(signal.SIGTERM, before)
