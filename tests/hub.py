"""A Hugging Face hub on this machine with one model, that counts how often its files are fetched."""

import json
import threading
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder as the repository `name` while it is used as a context manager."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str, folder: Path, crowd: int = 1):
        """Files are sent only when so many clients (a `crowd`) have asked what there is."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.folder, self.crowd = name, folder, crowd
        self.fetched: Counter[str] = Counter()  # file -> how often its content was sent
        self.asked = 0
        self.state = threading.Condition()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path, hub = urlsplit(self.path).path, self.server
        if path.startswith(f"/api/models/{hub.name}"):
            with hub.state:
                hub.asked += "/tree/" not in path
                hub.state.notify_all()
            files = sorted(hub.folder.iterdir())
            if "/tree/" in path:
                answer = [
                    {"type": "file", "path": file.name, "oid": "0", "size": file.stat().st_size} for file in files
                ]
            else:
                answer = {"id": hub.name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            self._send(json.dumps(answer).encode(), "application/json")
        elif path.startswith(f"/{hub.name}/resolve/") and (file := hub.folder / path.rpartition("/")[2]).is_file():
            if self.command == "GET":
                with hub.state:
                    hub.state.wait_for(lambda: hub.asked >= hub.crowd, timeout=60)
                    hub.fetched[file.name] += 1
            self._send(file.read_bytes(), "application/octet-stream")
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
