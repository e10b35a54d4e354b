"""What people see while a run goes on: the stages and the errors, and not each of ten thousand jobs."""

import os
import pty
import re
import subprocess

import pytest
from conftest import BIN
from made import make_results

pytestmark = pytest.mark.slow

SNAKEFILE = """
from pathlib import Path
from cuepoint.layout import Layout
from cuepoint.live import LiveProgress
from cuepoint.plan import read_run
from cuepoint.settings import load_settings

layout = Layout(Path("results"))
PROGRESS = LiveProgress(layout, load_settings({}), read_run(layout))

rule all:
    input: expand("{i}.txt", i=range(5)), "failed.txt"

rule download:
    output: "{i}.txt"
    message: "Downloading {wildcards.i}"
    shell: "echo something > {output}"

rule fails:
    output: "failed.txt"
    log: "failed.log"
    shell: "echo the reason stands here > {log}; false"

onstart:
    PROGRESS.start()

onsuccess:
    PROGRESS.stop()

onerror:
    PROGRESS.stop()
    print("these are the last words", file=sys.stderr)
"""


@pytest.fixture
def command(tmp_path):
    make_results(tmp_path / "results")
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    return [BIN / "snakemake", "--cores", "2", "--keep-going", "--show-failed-logs", "--directory", tmp_path,
            "--snakefile", tmp_path / "Snakefile"]  # fmt: skip


def is_quiet_but_for_errors(shown):
    assert "the reason stands here" in shown
    assert "Error in rule fails" in shown
    assert shown.index("the reason stands here") < shown.index("these are the last words")
    assert not re.search("Downloading|Finished jobid|Select jobs|Execute|steps", shown)
    assert re.search(r"embed +12/12 +100%   22 videos/h +3.1 h audio/h +GPU 12 % busy", shown)
    assert "embed is the bottleneck" in shown


def test_a_log_has_the_errors_and_the_stages_and_not_each_job(command, tmp_path):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    is_quiet_but_for_errors(done.stderr)
    assert re.search(r"^[-\d]+ [:\d]+ transcribe +12/12", (tmp_path / "results/logs/progress.log").read_text(), re.M)
    (complete,) = (tmp_path / ".snakemake" / "log").iterdir()
    assert "Finished jobid" in complete.read_text()


def test_in_a_terminal_the_stages_are_refreshed_below_the_errors(command):
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stderr=theirs, stdout=theirs, env=os.environ | {"COLUMNS": "100"}) as run:
        os.close(theirs)
        shown = b""
        while piece := read(ours):
            shown += piece
    os.close(ours)
    assert run.returncode == 1
    text = shown.decode()
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is given back
    assert "\x1b[1A" in text  # lines were written over
    plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)
    is_quiet_but_for_errors(plain)
    assert "1 running" not in plain.splitlines()[-5:]


def read(terminal):
    """What the program wrote, nothing at its end (which Linux tells as an error)."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
