"""The limiter that all download jobs of a run share through files."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from cuepoint.download.limiter import CircuitExhausted, Limiter, site_of
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings

URL = "https://video.example/watch"
PACED = DownloadSettings(video_interval={"*": 0.2}, request_interval={"*": 0})
FREE = DownloadSettings(video_interval={"*": 0}, request_interval={"*": 0}, cool_down=0.05, max_cool_down=10)

ADMITTED = """
import sys
from pathlib import Path
from cuepoint.download.limiter import Limiter
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings
limiter = Limiter(Layout(Path(sys.argv[1])), DownloadSettings.model_validate_json(sys.argv[2]))
for _ in range(3):
    print(limiter.admit(sys.argv[3]).time)
"""


@pytest.fixture
def layout(tmp_path) -> Layout:
    return Layout(tmp_path)


def state_file(layout: Layout):
    (path,) = layout.throttle.glob("*.json")
    return path


def test_processes_share_one_pace(layout):
    command = [sys.executable, "-c", ADMITTED, str(layout.results), PACED.model_dump_json(), URL]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    times = sorted(float(line) for job in jobs for line in job.communicate()[0].splitlines())
    assert len(times) == 9
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.199


def test_requests_are_paced_by_host_and_this_machine_is_not(layout):
    limiter = Limiter(layout, DownloadSettings(request_interval={"video.example": 0.2, "*": 3600}))
    limiter.request(URL)
    began = time.time()
    limiter.request(URL)
    assert time.time() - began >= 0.199
    for _ in range(3):
        limiter.request("http://127.0.0.1:8000/x")
        limiter.request("http://localhost/x")


@pytest.mark.parametrize(
    ("url", "site"),
    [
        ("https://www.youtube.com/watch?v=x", "youtube.com"),
        ("https://m.youtube.com/watch?v=x", "youtube.com"),
        ("https://youtu.be/x", "youtube.com"),
        ("https://www.youtube-nocookie.com/embed/x", "youtube.com"),
        ("https://rr3---sn-4g5e6nsz.googlevideo.com/videoplayback", "googlevideo.com"),
        ("https://notyoutube.com/x", "notyoutube.com"),
        ("HTTPS://WWW.Example.ORG:8443/x", "example.org"),
        ("not a url", ""),
    ],
)
def test_hosts_that_share_a_limit_count_as_one(url, site):
    assert site_of(url) == site


def test_youtube_is_asked_for_fewer_videos_than_a_guest_may():
    assert 3600 / DownloadSettings().video_interval["youtube.com"] < 300


def test_a_clock_that_is_ahead_delays_by_one_interval_at_most(layout):
    limiter = Limiter(layout, PACED)
    limiter.admit(URL)
    state_file(layout).write_text(json.dumps({"video": time.time() + 86_400}))
    assert limiter.admit(URL).waited < 60


def test_a_circuit_that_a_clock_ahead_has_opened_is_no_longer_than_its_own_pause(layout):
    limiter = Limiter(layout, FREE)
    limiter.throttled(URL, limiter.admit(URL), None)
    state = json.loads(state_file(layout).read_text())
    state["circuit"] |= {key: state["circuit"][key] + 86_400 for key in ("first", "opened", "until")}
    state_file(layout).write_text(json.dumps(state))
    assert Limiter(layout, FREE).admit(URL).waited < 60


def test_a_torn_state_file_is_a_fresh_start(layout):
    limiter = Limiter(layout, FREE)
    limiter.admit(URL)
    state_file(layout).write_text('{"video": 17')
    limiter.admit(URL)
    assert json.loads(state_file(layout).read_text())["video"] > 17


def test_after_a_cool_down_one_goes_first_and_the_others_follow_when_it_was_answered(layout):
    refused = Limiter(layout, FREE)
    refused.throttled(URL, refused.admit(URL), None)
    first = Limiter(layout, FREE)
    probe = first.admit(URL)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(Limiter(layout, FREE).admit, URL) for _ in range(3)]
        path = state_file(layout)
        assert json.loads(path.read_text())["circuit"]["probe"] == probe.time
        assert not any(other.done() for other in others)
        answered = time.time()
        first.answered(URL, probe)
        assert all(other.result().time >= answered for other in others)
    assert json.loads(path.read_text())["circuit"] is None


def test_a_probe_that_decides_nothing_lets_another_one_go(layout):
    refused = Limiter(layout, FREE)
    refused.throttled(URL, refused.admit(URL), None)
    probe = Limiter(layout, FREE)
    probe.undecided(URL, probe.admit(URL))
    assert Limiter(layout, FREE).admit(URL).waited < 60


def test_the_cool_down_grows_with_each_refusal_and_not_with_those_that_were_under_way(layout):
    limiter = Limiter(layout, FREE)
    early, late = limiter.admit(URL), limiter.admit(URL)
    limiter.throttled(URL, early, None)
    limiter.throttled(URL, late, None)
    assert json.loads(state_file(layout).read_text())["circuit"]["level"] == 1
    limiter.throttled(URL, limiter.admit(URL), None)
    assert json.loads(state_file(layout).read_text())["circuit"]["level"] == 2


def test_a_retry_after_is_kept_and_bounded(layout):
    limiter = Limiter(layout, FREE)
    admission = limiter.admit(URL)
    limiter.throttled(URL, admission, 86_400.0)
    circuit = json.loads(state_file(layout).read_text())["circuit"]
    assert circuit["until"] - circuit["opened"] == pytest.approx(FREE.max_cool_down)


def test_a_spent_budget_ends_the_run_for_the_site_and_only_for_it(layout):
    settings = FREE.model_copy(update={"throttle_budget": 0.0, "cool_down": 5.0})
    limiter = Limiter(layout, settings)
    limiter.throttled(URL, limiter.admit(URL), None)
    with pytest.raises(CircuitExhausted, match=r"video\.example"):
        limiter.admit(URL)
    limiter.admit("https://other.example/watch")
