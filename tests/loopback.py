"""A video site on this machine that misbehaves on command: the demo's site, with faults in front of it.

A fault is a function of the handler and the thing asked for; it answers in the site's place. Faults are queued per
thing (`watch/ID`, `clips/FILE`) and used up one a request, so each test says exactly what happens when.
"""

import hashlib
import socket
import struct
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo.site import ORIGIN, Handler, Site

RATE = 48_000


def packet_hash(path: Path) -> str:
    """Hash of a file's audio packets by their payloads, read without the library: what `audio_hash` has to be."""
    digest = hashlib.blake2b(digest_size=16)
    with av.open(str(path)) as media:
        for packet in media.demux(media.streams.best("audio")):
            digest.update(bytes(packet))
    return digest.hexdigest()


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    thing: str
    method: str
    headers: dict[str, str]


class Misbehaving(Handler):
    """Answers with the next fault that is queued for the thing asked for; cleanly when there is none."""

    server: "Loopback"

    def answer(self, kind: str, name: str) -> None:
        thing = f"{kind}/{name}"
        with self.server.lock:
            self.server.asked.append(Asked(thing, self.command, dict(self.headers)))
            fault = self.server.fault_for(thing)
            self.server.faulty += fault is not None
        if fault is None:
            super().answer(kind, name)
        else:
            fault(self, thing)

    def hang_up(self, *, rudely: bool = False) -> None:
        """Close the connection, with a reset when `rudely`."""
        if rudely:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_WR) if not rudely else self.connection.close()

    def start(self, length: int | None, content_type: str = "audio/ogg") -> None:
        """Begin a 200 answer of a stated length; without one it ends when the connection does."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def clip(self, thing: str) -> bytes:
        return (self.server.clips / thing.removeprefix("clips/")).read_bytes()


Fault = Callable[[Misbehaving, str], None]


class Loopback(Site):
    """The site, its queued faults, and a record of what it was asked."""

    def __init__(self, clips: Path, videos: list[dict[str, Any]]):
        super().__init__(clips, videos, Misbehaving)
        self.lock = threading.Lock()
        self.asked: list[Asked] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.always: dict[str, Fault] = {}
        self.faulty = 0  # answers
        self.closing = threading.Event()

    def __exit__(self, *args: Any) -> None:
        self.closing.set()
        super().__exit__(*args)

    def fault_for(self, thing: str) -> Fault | None:
        """The fault to answer with; called under the lock."""
        return self.faults[thing].popleft() if self.faults[thing] else self.always.get(thing)

    def queue(self, thing: str, *faults: Fault) -> None:
        self.faults[thing].extend(faults)

    def requests(self, thing: str) -> list[Asked]:
        with self.lock:
            return [asked for asked in self.asked if asked.thing == thing]


def status(code: int, **headers: str) -> Fault:
    """An error status, with headers (`Retry_After="1"`)."""

    def fault(handler: Misbehaving, thing: str) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return fault


def redirect(location: str) -> Fault:
    return status(302, Location=location)


def body(content: bytes, content_type: str = "text/html; charset=utf-8") -> Fault:
    """Something else than what was asked for."""

    def fault(handler: Misbehaving, thing: str) -> None:
        handler.start(len(content), content_type)
        handler.wfile.write(content)

    return fault


def cut(share: float, *, rudely: bool = False) -> Fault:
    """Promise the whole clip, send a share of it, hang up."""

    def fault(handler: Misbehaving, thing: str) -> None:
        clip = handler.clip(thing)
        handler.start(len(clip))
        handler.wfile.write(clip[: int(len(clip) * share)])
        handler.hang_up(rudely=rudely)

    return fault


def hang_up(handler: Misbehaving, thing: str) -> None:
    """Answer nothing at all."""
    handler.hang_up(rudely=True)


def stall(share: float) -> Fault:
    """Promise the whole clip, send a share of it, then nothing, with the connection open."""

    def fault(handler: Misbehaving, thing: str) -> None:
        clip = handler.clip(thing)
        handler.start(len(clip))
        handler.wfile.write(clip[: int(len(clip) * share)])
        handler.wfile.flush()
        handler.server.closing.wait(60)
        handler.hang_up()

    return fault


def trickle(handler: Misbehaving, thing: str) -> None:
    """Send the clip byte by byte, often enough for any socket timeout."""
    clip = handler.clip(thing)
    handler.start(len(clip))
    for byte in clip:
        handler.wfile.write(bytes([byte]))
        if handler.server.closing.wait(0.02):
            break
    handler.hang_up()


def wrong_length(difference: int) -> Fault:
    """Send the clip under a Content-Length that is off by `difference` bytes, then hang up."""

    def fault(handler: Misbehaving, thing: str) -> None:
        clip = handler.clip(thing)
        handler.start(len(clip) + difference)
        handler.wfile.write(clip[: len(clip) + difference] if difference < 0 else clip)
        handler.hang_up()

    return fault


def without_ranges(handler: Misbehaving, thing: str) -> None:
    """Send the whole clip whatever range was asked for."""
    clip = handler.clip(thing)
    handler.start(len(clip))
    handler.wfile.write(clip)


def endless(content_type: str) -> Fault:
    """Never stop sending."""

    def fault(handler: Misbehaving, thing: str) -> None:
        handler.start(None, content_type)
        while not handler.server.closing.is_set():
            handler.wfile.write(b"<p>and on</p>" * 10_000)

    return fault


def make_clip(path: Path, seconds: float, seed: int = 0, codec: str = "libopus", silent: bool = False) -> None:
    """Write `seconds` of noise, or silence, as a media file of the kind that the suffix says."""
    noise = np.random.default_rng(seed).integers(-9000, 9000, (1, int(RATE * seconds)), dtype=np.int16)
    with av.open(str(path), "w") as media:
        track = media.add_stream(codec, rate=RATE, layout="mono")
        track.bit_rate = 48_000
        resampler = av.AudioResampler(format=track.format, layout="mono", rate=RATE, frame_size=track.frame_size or 0)
        frame = av.AudioFrame.from_ndarray(noise * (not silent), format="s16", layout="mono")
        frame.sample_rate = RATE
        frame.pts = 0
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            media.mux(track.encode(piece))
        media.mux(track.encode(None))


def make_mute_video(path: Path) -> None:
    """Write a second of pictures without any audio track."""
    with av.open(str(path), "w") as media:
        track = media.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        for shade in range(10):
            picture = np.full((64, 64, 3), shade * 20, dtype=np.uint8)
            media.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        media.mux(track.encode(None))


def video(video_id: str, file: str, duration: float | None, **facts: Any) -> dict[str, Any]:
    """A manifest entry."""
    return {
        "video_id": video_id,
        "file": file,
        "duration": duration,
        "title": f"The video {video_id}",
        "channel": "Loopback",
        "upload_date": "20240229",
        **facts,
    }


def watch(video_id: str) -> str:
    """The URL of a video's page."""
    return f"{ORIGIN}/watch/{video_id}"
