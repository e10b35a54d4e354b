"""Shared fixtures: projects to run the real workflow in, and no silent skips where CI is meant to run everything."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT))

from demo.site import Site  # noqa: E402

# Examples are made slowly on a busy machine, which says nothing about the code.
hypothesis.settings.register_profile("cuepoint", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("cuepoint")

CLIPS = ROOT / "demo" / "clips"
MANIFEST = json.loads((ROOT / "demo" / "manifest.json").read_text())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI a skipped test is a failed one: everything that the tests need is installed there."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"


class Project:
    """A directory with a config and a list in which the real Snakemake runs the real workflow."""

    def __init__(self, directory: Path, proxy: str):
        self.directory = directory
        self.results = directory / "results"
        self.environment = os.environ | {"CUEPOINT_PROXY": proxy}

    @classmethod
    def create(cls, directory, proxy, videos, **config):
        """A project over demo clips: `videos` are IDs of the manifest (served by the site) or lines for the list."""
        directory.mkdir(parents=True, exist_ok=True)
        project = cls(directory, proxy)
        (directory / "asr-model").symlink_to(ROOT / "demo" / "asr-model")
        settings = yaml.safe_load((ROOT / "demo" / "config.yaml").read_text())
        project.configure(**settings | config)
        project.list(*videos)
        return project

    def configure(self, **changes):
        path = self.directory / "config.yaml"
        config = yaml.safe_load(path.read_text()) if path.exists() else {}
        path.write_text(yaml.safe_dump(config | changes))

    def list(self, *videos):
        known = {clip["video_id"] for clip in MANIFEST} | {"removed"}
        lines = [f"http://demo.example/watch/{video}" if video in known else video for video in videos]
        (self.directory / "videos.txt").write_text("\n".join(lines) + "\n")

    def command(self, *arguments):
        return [
            str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--directory", str(self.directory),
            *(() if "--cores" in arguments else ("--cores", "2")), *arguments,
        ]  # fmt: skip

    def snakemake(self, *arguments, check=True, timeout=300, **environment):
        """Run Snakemake to its end; `check` asserts that it succeeded."""
        done = subprocess.run(
            self.command(*arguments),
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    def planned(self, *arguments, check=True):
        """What a dry run would do: rule -> number of jobs."""
        told = self.snakemake("--dry-run", *arguments, check=check)
        jobs = dict(re.findall(r"^([a-z_]+) +(\d+)$", told.stdout + told.stderr, re.MULTILINE))
        return {rule: int(number) for rule, number in jobs.items() if rule not in {"all", "report", "total"}}

    def files(self, pattern):
        """Relative path -> content of the files below results that match."""
        return {str(path.relative_to(self.results)): path.read_bytes() for path in sorted(self.results.glob(pattern))}

    def copy(self, directory):
        """The same project elsewhere, with its times, so that Snakemake sees it as done."""
        shutil.copytree(self.directory, directory, symlinks=True)
        return Project(directory, self.environment["CUEPOINT_PROXY"])


@pytest.fixture(scope="session")
def site():
    """The demo's site on a free port of this machine."""
    with Site(CLIPS, MANIFEST) as running:
        yield running


@pytest.fixture(scope="session")
def demo(tmp_path_factory, site):
    """The demo, run once for all tests. Tests look at it and never change it: see `project`."""
    project = Project.create(tmp_path_factory.mktemp("demo") / "project", site.proxy_url, [])
    shutil.copy(ROOT / "demo" / "videos.txt", project.directory / "videos.txt")
    shutil.copytree(CLIPS, project.directory / "clips")
    project.first_run = project.snakemake()
    return project


@pytest.fixture
def project(demo, tmp_path):
    """A copy of the finished demo to change and run again."""
    return demo.copy(tmp_path / "project")


@pytest.fixture
def mounted():
    """Mounts something until the test ends: `mounted(arguments of mount…, place)`. CI may; elsewhere it may not."""
    places = []

    def mount(*arguments):
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mount is not permitted here: {done.stderr.strip()}")
        places.append(str(arguments[-1]))

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "--lazy", place], check=True)


class Disk:
    """A small file system at `folder` that can be filled to the last page."""

    def __init__(self, folder):
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self):
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self):
        self._ballast.unlink()


@pytest.fixture
def small_disk(mounted):
    """Makes a `Disk` of a size at a folder: a tmpfs."""

    def make(folder, size):
        folder.mkdir(parents=True, exist_ok=True)
        mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        return Disk(folder)

    return make
