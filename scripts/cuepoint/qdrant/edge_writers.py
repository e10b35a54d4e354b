"""Writing a large new embedded collection with more than one core.

The engine converts points one by one and keeps Python's lock meanwhile, so one process cannot do better than one core.
But what it leaves on disk are independent segments, and a collection may have any number: each writer is a process
that fills a directory of its own, and in the end all segments stand in one. A writer reads its points from a pipe, and
ends when the pipe does, also when the process at the other end was killed.
"""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cuepoint.errors import EnvironmentFault

if TYPE_CHECKING:
    from cuepoint.qdrant.points import Points

SEGMENTS = "segments"  # the engine's name for them
WRITTEN = b"written"


class Writers:
    """Processes that write points into `directories`: empty collections of the same shape, not open here."""

    def __init__(self, directories: Sequence[Path]):
        self._directories = directories
        self._processes = [_start(directory) for directory in directories]
        self._turn = 0

    def write(self, points: "Points") -> None:
        """Give points to the writer whose turn it is, when it has written those that it got before.

        Raises Exception with the engine's message, as the engine itself does.
        """
        process = self._processes[self._turn]
        self._turn = (self._turn + 1) % len(self._processes)
        self._send(process, points)

    def finish(self) -> None:
        """Return when all points are written and all segments stand in the first directory."""
        for process in self._processes:
            self._send(process, None)
        for process in self._processes:
            self._end(process)
        first, *others = self._directories
        for directory in others:
            for segment in (directory / SEGMENTS).iterdir():
                segment.rename(first / SEGMENTS / segment.name)
            shutil.rmtree(directory)

    def stop(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def _send(self, process: subprocess.Popen[bytes], points: "Points | None") -> None:
        assert process.stdin
        try:
            pickle.dump(points, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
        except BrokenPipeError:
            self._end(process)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        said, _ = process.communicate()
        if process.returncode < 0:
            raise EnvironmentFault(
                f"a process that wrote the collection was ended by signal {-process.returncode}: look whether memory "
                "or disk ran out, and run again"
            )
        if said != WRITTEN:
            raise Exception(said.decode(errors="replace"))


def _start(directory: Path) -> subprocess.Popen[bytes]:
    package = Path(__file__).parents[2]  # found by this process as the neighbour of a rule's script
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(directory)],  # -P: nothing is imported from the working directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C is for the process that can say what it means
    )


def write_what_comes(directory: Path) -> None:
    """Write the points that standard input brings into a collection; what went wrong goes to standard output."""
    from cuepoint.qdrant.edge import EdgeCollection, open_shard

    with open_shard(directory) as shard:
        collection = EdgeCollection(shard, {})
        while points := pickle.load(sys.stdin.buffer):
            collection.upsert(points)
        shard.flush()


if __name__ == "__main__":
    try:
        write_what_comes(Path(sys.argv[1]))
    except EOFError:
        sys.exit("nobody waits for this part any more")
    except Exception as error:
        sys.stdout.write(str(error))
        sys.exit(1)
    sys.stdout.buffer.write(WRITTEN)
