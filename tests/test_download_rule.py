"""The download rule as users run it, against a site of which a third of the answers are faulty."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from loopback import (
    Fault,
    Loopback,
    body,
    cut,
    hang_up,
    make_clip,
    make_mute_video,
    packet_hash,
    stall,
    status,
    trickle,
    video,
    watch,
    without_ranges,
    wrong_length,
)

from cuepoint.layout import Layout
from cuepoint.receipts import Receipt, read_receipt
from cuepoint.sources import identify
from cuepoint.states import Status

ROOT = Path(__file__).parents[1]
FAULTY_SHARE = 0.3
PASSING: dict[str, list[Fault]] = {
    "watch": [status(500), status(502), status(503), status(429), hang_up, status(504)],
    "clips": [
        *(status(500), status(403), hang_up, cut(0.5), cut(0.9, rudely=True), stall(0.5), trickle),
        *(wrong_length(400), wrong_length(-8_000), without_ranges, body(b""), body(b"<html>not now</html>")),
    ],
}
LASTING = {
    Status.UNAVAILABLE: status(404),
    Status.NEEDS_AUTH: status(401),
    Status.GEO_BLOCKED: status(451),
}


class Unreliable(Loopback):
    """Faults by lot, drawn from the thing's name and how often it was asked for: the same in every run of the test."""

    def fault_for(self, thing: str) -> Fault | None:
        if thing in self.always:
            return self.always[thing]
        lot = Random(f"{thing} {len([asked for asked in self.asked if asked.thing == thing])}")
        return lot.choice(PASSING[thing.split("/", maxsplit=1)[0]]) if lot.random() < FAULTY_SHARE else None


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_videos_behind_faulty_answers_end_in_their_true_state(tmp_path, count):
    """In one run plus at most one resume; the audio of every good one is its source stream, packet for packet."""
    clips = tmp_path / "clips"
    clips.mkdir()
    make_mute_video(clips / "mute.mp4")
    expected = {f"v{number}": true_state(number) for number in range(count)}
    videos = []
    for number, (name, state) in enumerate(expected.items()):
        file = "mute.mp4" if state is Status.EMPTY else f"{name}.opus"
        if state is Status.OK:
            make_clip(clips / file, 4.0, seed=number)
        videos.append(video(name, file, 1.0 if state is Status.EMPTY else 4.0))
    project = tmp_path / "project"
    project.mkdir()
    (project / "videos.txt").write_text("".join(f"{watch(name)}\n" for name in expected))
    settings = {
        "videos": "videos.txt",
        "download": {
            **{"video_interval": {"*": 0}, "request_interval": {"*": 0}, "attempts": 5, "backoff": 0.01},
            **{"cool_down": 0.05, "max_cool_down": 0.5, "socket_timeout": 1, "stall_seconds": 1, "parallel": 8},
        },
    }
    (project / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    with Unreliable(clips, videos) as site:
        for name, state in expected.items():
            if state in LASTING:
                site.always[f"watch/{name}"] = LASTING[state]
        runs = 1
        run(project, site)
        if any(not receipt.status.final for receipt in receipts(project, expected).values()):
            runs = 2
            run(project, site)
        found = receipts(project, expected)
        faults = site.faulty
    assert {name: receipt.status for name, receipt in found.items()} == expected
    layout = Layout(project / "results")
    for name, receipt in found.items():
        if receipt.status is Status.OK:
            source = packet_hash(clips / f"{name}.opus")
            assert packet_hash(layout.audio(receipt.video_id)) == receipt.audio_hash == source
    assert faults > 0.2 * len(site.asked), "the site behaved too well to prove anything"
    print(f"{runs} runs, {len(site.asked)} requests, {faults} of them answered faultily")


def true_state(number: int) -> Status:
    """How the video of this number ends when the site is asked often enough."""
    if number % 10 == 3:
        return [*LASTING][number // 10 % len(LASTING)]
    return Status.EMPTY if number % 40 == 7 else Status.OK


def run(project: Path, site: Loopback) -> None:
    """One run of the workflow as far as the receipts."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2", "downloads"]
    environment = os.environ | {"CUEPOINT_PROXY": site.proxy_url, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


def receipts(project: Path, names: dict[str, Status]) -> dict[str, Receipt]:
    layout = Layout(project / "results")
    return {name: read_receipt(layout.receipt(identify(watch(name))[0])) for name in names}
