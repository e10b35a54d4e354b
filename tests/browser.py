"""A headless Chromium, spoken to in its own DevTools protocol: no driver and no further package is needed."""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import ClientConnection, connect

TIMEOUT = 60  # seconds for any answer: the machine may be busy


class Page:
    """One page; collects what the console says in `messages` and the addresses of all requests in `requests`."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self._events: list[str] = []
        self.messages: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, width: int = 1000, height: int = 800) -> None:
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._events.clear()
        self.command("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self._connection.recv(timeout=TIMEOUT))
        method, parameters = message.get("method"), message.get("params", {})
        self._events.append(method)
        match method:
            case "Runtime.consoleAPICalled":
                self.messages.append(str(parameters["args"]))
            case "Runtime.exceptionThrown":
                self.messages.append(str(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.messages.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
        return message


@contextmanager
def browser(program: str) -> Iterator[Page]:
    """A page in a browser of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        try:
            # Chromium says on stderr where it listens, as soon as it does.
            address = next(line.split()[-1] for line in process.stderr if line.startswith("DevTools listening on"))
            host = address.split("/")[2]
            with urlopen(Request(f"http://{host}/json/new", method="PUT"), timeout=TIMEOUT) as answer:
                page = json.load(answer)["webSocketDebuggerUrl"]
            with connect(page, max_size=None) as connection:
                yield Page(connection)
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
