"""Pointers: small files that say which directory a published name of embedded collections stands for."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cuepoint.atomic import write_json
from cuepoint.errors import DataError

_DIRECTORY = re.compile(r"(?P<collection>.+)\.(?P<generation>\d+)")


@dataclass(frozen=True)
class Generation:
    """One complete, never again changed state of a collection: the directory `{collection}.{number}`."""

    path: Path
    collection: str
    number: int


def target(directory: Path, name: str) -> Generation | None:
    """What a published name stands for, None when it was never published or its directory is gone."""
    path = _pointer(directory, name)
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["directory"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        raise DataError(f"{path} is no pointer to a collection ({error}): delete it and run snakemake again") from error
    if not isinstance(entry, str) or not _DIRECTORY.fullmatch(entry) or entry != Path(entry).name:
        raise DataError(f"{path} names no collection beside it: delete it and run snakemake again")
    return parse(directory / entry)


def point(directory: Path, name: str, generation: Generation) -> None:
    """Let a name stand for a generation, atomically."""
    write_json(_pointer(directory, name), {"directory": generation.path.name})


def names(directory: Path) -> list[str]:
    """All published names."""
    return [path.name.removesuffix(".pointer.json") for path in directory.glob("*.pointer.json")]


def generations(directory: Path) -> list[Generation]:
    """All complete generations of all collections, older ones first."""
    found = [parse(path) for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.collection, entry.number))


def parse(path: Path) -> Generation | None:
    """The generation that a directory holds, None if it is none."""
    match = _DIRECTORY.fullmatch(path.name)
    if match is None or not path.is_dir() or path.name.startswith("."):
        return None
    return Generation(path, match["collection"], int(match["generation"]))


def _pointer(directory: Path, name: str) -> Path:
    return directory / f"{name}.pointer.json"
