"""A tiny video site on this machine: pages with metadata and audio files, served from the demo's own clips.

It listens on a free port of 127.0.0.1 and is used as an HTTP proxy, so that the list can hold stable addresses
(http://demo.example/watch/kitchen-basics) and nothing leaves the machine.

    python demo/site.py -- COMMAND...      run COMMAND with CUEPOINT_PROXY pointing to the site
"""

import html
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).parent
ORIGIN = "http://demo.example"


class Site(ThreadingHTTPServer):
    """Serves `/watch/{video_id}` pages and `/clips/{file}` media while it is used as a context manager."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, clips: Path, manifest: list[dict[str, Any]], handler: type["Handler"] | None = None):
        self.clips = clips
        self.videos: Mapping[str, dict[str, Any]] = {clip["video_id"]: clip for clip in manifest}
        super().__init__(("127.0.0.1", 0), handler or Handler)

    @property
    def proxy_url(self) -> str:
        """What CUEPOINT_PROXY has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that hang up, which is their right; show anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD, also for absolute URIs as a proxy gets them."""

    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        """Answer a page, a clip or 404."""
        kind, _, name = unquote(urlsplit(self.path).path).strip("/").partition("/")
        self.answer(kind, name)

    do_HEAD = do_GET

    def answer(self, kind: str, name: str) -> None:
        """Answer for the thing `name` of a kind (`watch` or `clips`)."""
        if kind == "watch" and name in self.server.videos:
            self.send("text/html; charset=utf-8", page(self.server.videos[name]).encode("utf-8", "replace"))
        elif kind == "clips" and name in {clip["file"] for clip in self.server.videos.values()}:
            self.send_media(name)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def send_media(self, name: str) -> None:
        """Send a clip, or the range of it that is asked for."""
        self.send(media_type(name), (self.server.clips / name).read_bytes())

    def send(self, content_type: str, body: bytes) -> None:
        """Send `body`, or the range of it that is asked for."""
        first = self.range_start()
        if first is not None and first >= len(body):
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(HTTPStatus.OK if first is None else HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", content_type)
        self.send_header("Accept-Ranges", "bytes")
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - (first or 0)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[first or 0 :])

    def range_start(self) -> int | None:
        """First byte of an open range (`bytes=N-`, the only kind that a resumed download asks for)."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(match[1]) if match else None

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the caller's own output is what counts."""


def media_type(file: str) -> str:
    """MIME type of a media file, by its name."""
    return {".m4a": "audio/mp4", ".mp4": "video/mp4"}.get(Path(file).suffix, "audio/ogg")


def page(video: Mapping[str, Any]) -> str:
    """A watch page with the metadata in JSON-LD, as real sites have it."""
    facts = {
        "@context": "https://schema.org",
        "@type": "VideoObject",
        "name": video["title"],
        "author": {"@type": "Organization", "name": video["channel"]},
        "uploadDate": re.sub(r"(....)(..)(..)", r"\1-\2-\3", video["upload_date"]),
        "contentUrl": f"{ORIGIN}/clips/{video['file']}",
        "encodingFormat": media_type(video["file"]),
    }
    if video.get("duration"):
        facts["duration"] = f"PT{video['duration']}S"
    script = json.dumps(facts).replace("<", "\\u003c")
    return (
        f"<!DOCTYPE html><html><head><title>{html.escape(video['title'])}</title>"
        f'<script type="application/ld+json">{script}</script></head><body></body></html>'
    )


def main(command: list[str]) -> int:
    """Run `command` beside the site; returns its exit status."""
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    with Site(HERE / "clips", manifest) as site:
        return subprocess.run(command, env=os.environ | {"CUEPOINT_PROXY": site.proxy_url}, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:2] != ["--"] or len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[2:]))
