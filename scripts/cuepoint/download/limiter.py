"""One limiter per remote host for the whole run: paced starts and requests, and a circuit that a throttle opens.

The state of a host is a small file beside a lock, so all job processes share it, also on several nodes. Nothing is
reserved ahead: whoever finds that it is time goes, so a job that dies leaves nothing behind that others wait for.
"""

import ipaddress
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from cuepoint import faults
from cuepoint.errors import EnvironmentFault
from cuepoint.layout import Layout
from cuepoint.settings import DownloadSettings

log = logging.getLogger(__name__)

# Hosts that count as one: a session's limit holds for all of them together.
_ALIASES = {"youtu.be": "youtube.com", "youtube-nocookie.com": "youtube.com", "youtubei.googleapis.com": "youtube.com"}
_PROBE_SECONDS = 300.0  # a probe that has not ended by then has died with its job
_MAX_LEVEL = 1000  # of cool-downs that doubled: far beyond any longest pause
_LOOK_AGAIN = 5.0  # seconds after which a waiting job reads the shared state again


class CircuitExhausted(Exception):
    """The host has refused for longer than the run's budget: nothing more is asked of it in this run."""


@dataclass(frozen=True)
class Admission:
    """Leave to start a video: when it was given, how long it was waited for, and how much of that in cool-downs."""

    time: float
    waited: float
    cooled: float


class Limiter:
    """Paces what this run asks of one site and remembers when the site had enough.

    All times are Unix times: monotonic clocks mean nothing on another node. A clock that is ahead delays others by one
    interval at most.
    """

    def __init__(self, layout: Layout, settings: DownloadSettings):
        self._folder = layout.throttle
        self._settings = settings
        self._run = _run_identity(layout)
        self._not_before = (
            0.0  # whoever was refused lets others ask first: the refusal may have been meant for one video
        )

    def admit(self, url: str) -> Admission:
        """Wait until the site's circuit is closed and its pace allows another video.

        After a cool-down one video goes first, alone; the others follow when it was answered. Raises CircuitExhausted
        when the circuit stays open beyond the budget.
        """
        site = site_of(url)
        interval = _interval(self._settings.video_interval, site)
        asked, cooled = time.time(), 0.0
        while True:
            with self._state(site) as state:
                now = time.time()
                wait = max(
                    self._wait_for_circuit(state, site),
                    _remaining(state, "video", interval),
                    self._not_before - now if state.get("circuit") else 0.0,
                )
                if wait <= 0:
                    state["video"] = now
                    if state.get("circuit"):
                        state["circuit"]["probe"] = now
                    return Admission(now, now - asked, cooled)
            cooled += min(wait, _LOOK_AGAIN) if state.get("circuit") else 0.0
            time.sleep(min(wait, _LOOK_AGAIN))

    def request(self, url: str) -> None:
        """Wait until the pace allows another request to the URL's host."""
        site = site_of(url)
        interval = _interval(self._settings.request_interval, site)
        while interval:
            with self._state(site) as state:
                wait = _remaining(state, "request", interval)
                if wait <= 0:
                    state["request"] = time.time()
                    return
            time.sleep(wait)

    def throttled(self, url: str, admission: Admission, retry_after: float | None) -> float:
        """The site had enough: open its circuit, or keep it open for longer. Returns the circuit's identity.

        Jobs that were under way when it opened tell nothing new, so only a later one makes the cool-down grow.
        """
        site = site_of(url)
        with self._state(site) as state:
            now = time.time()
            circuit = state.get("circuit") or {"first": now, "opened": 0.0, "level": 0, "until": now, "run": self._run}
            if admission.time >= circuit["opened"]:
                pause = self._settings.cool_down * 2.0 ** circuit["level"]
                pause = min(max(pause, retry_after or 0), self._settings.max_cool_down)
                circuit |= {"level": min(circuit["level"] + 1, _MAX_LEVEL - 1), "opened": now, "until": now + pause}
                log.warning(
                    "%s says that there were too many requests: all downloads from it pause until %s",
                    site,
                    time.strftime("%H:%M:%S", time.localtime(circuit["until"])),
                )
            circuit["probe"] = None
            state["circuit"] = circuit
            self._not_before = circuit["until"] + self._settings.cool_down / 2
            return circuit["first"]

    def answered(self, url: str, admission: Admission) -> None:
        """The site answered a video that was started after its circuit opened: close it."""
        site = site_of(url)
        with self._state(site) as state:
            circuit = state.get("circuit")
            if circuit and admission.time > circuit["opened"]:
                log.info("%s answers again", site)
                state["circuit"] = None

    def undecided(self, url: str, admission: Admission) -> None:
        """The try ended in a way that says nothing about the site's limit: let another one probe it."""
        with self._state(site_of(url)) as state:
            circuit = state.get("circuit")
            if circuit and circuit.get("probe") == admission.time:
                circuit["probe"] = None

    def _wait_for_circuit(self, state: dict[str, Any], site: str) -> float:
        """Seconds until the circuit may let a video through."""
        circuit = state.get("circuit")
        if not circuit:
            return 0.0
        now = time.time()
        if (ahead := circuit["opened"] - now) > 0:  # opened by a node whose clock is ahead of this one
            circuit |= {"opened": now, "until": circuit["until"] - ahead, "first": min(circuit["first"], now)}
        if circuit["run"] != self._run:  # an earlier run gave up on this site: this one has its own budget
            circuit |= {"run": self._run, "first": now, "level": 0}
        if max(now, circuit["until"]) - circuit["first"] > self._settings.throttle_budget:
            raise CircuitExhausted(
                f"{site} has refused since {time.strftime('%H:%M', time.localtime(circuit['first']))}, longer than "
                f"download.throttle_budget ({self._settings.throttle_budget:.0f} s): left for the next run"
            )
        if now < circuit["until"]:
            return circuit["until"] - now
        probing = circuit.get("probe")
        is_probed = probing and now - probing < _PROBE_SECONDS
        return min(_LOOK_AGAIN, 0.01 + self._settings.cool_down / 20) if is_probed else 0.0

    @contextmanager
    def _state(self, site: str) -> Iterator[dict[str, Any]]:
        """The site's state, locked against all other jobs; written back when it has changed."""
        path = self._folder / f"{re.sub(r'[^a-z0-9.-]', '_', site)[:100]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), is_singleton=False, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if (fault := faults.by_number([error])) is not None:
                raise EnvironmentFault(fault) from error
            raise EnvironmentFault(f"cannot lock {path}: {error}. The results need a file system with locks") from error
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            state = _parse(text)
            before = json.dumps(state)
            yield state
            if (after := json.dumps(state)) != before:
                path.write_text(after, encoding="utf-8")  # not atomic: a torn file only means a fresh start
        finally:
            lock.release()


def site_of(url: str) -> str:
    """The host that a URL counts for, lower case and without `www.`: hosts that share a limit have one name."""
    host = (urlsplit(url).hostname or "").lower().rstrip(".")
    for name, site in {**_ALIASES, "youtube.com": "youtube.com", "googlevideo.com": "googlevideo.com"}.items():
        if host == name or host.endswith(f".{name}"):
            return site
    return host.removeprefix("www.")


def _interval(intervals: Mapping[str, float], site: str) -> float:
    """The pace of a site: that of the longest name it ends in, else that of `*`; none for this machine itself."""
    if _is_this_machine(site):
        return 0.0
    names = [name for name in intervals if site == name or site.endswith(f".{name}")]
    return intervals[max(names, key=len)] if names else intervals.get("*", 0.0)


def _is_this_machine(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _remaining(state: dict[str, Any], what: str, interval: float) -> float:
    """Seconds of `interval` that are left since the last one; a clock that is ahead of this one is brought back."""
    if what not in state:
        return 0.0
    now = time.time()
    state[what] = min(state[what], now)
    return state[what] + interval - now


def _run_identity(layout: Layout) -> str:
    """Changes with every run: a budget that one run has used up is whole again in the next."""
    try:
        return str(layout.run.stat().st_mtime_ns)
    except FileNotFoundError:
        return ""


def _parse(text: str) -> dict[str, Any]:
    """The state that a file holds. What is not as it was written is left out: that only means a fresh start."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    state: dict[str, Any] = {name: found[name] for name in ("video", "request") if _is_time(found.get(name))}
    if "circuit" in found:
        state["circuit"] = found["circuit"] if _is_circuit(found["circuit"]) else None
    return state


def _is_circuit(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and all(_is_time(found.get(name)) for name in ("first", "opened", "until"))
        and found.get("level") in range(_MAX_LEVEL)
        and (found.get("probe") is None or _is_time(found["probe"]))
        and isinstance(found.get("run"), str)
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
