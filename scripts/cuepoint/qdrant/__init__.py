"""Qdrant: the points of a model in a collection, in a directory of this machine or on a server.

Importing this package is cheap: `edge` and `server` import their engine, and only the one that is used is imported.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from cuepoint.layout import Layout
from cuepoint.qdrant import pointer
from cuepoint.settings import Settings

if TYPE_CHECKING:
    from cuepoint.qdrant.collection import Store

VERSION = 1  # of the payload; raised when a point of the same chunk looks different


def published_name(settings: Settings, model: str) -> str:
    """Name under which a model's points are queried."""
    return f"{settings.qdrant.collection}-{model}"


def collection_name(settings: Settings, model: str, identity: str) -> str:
    """Name of the collection itself, which the published name stands for."""
    return f"{published_name(settings, model)}-{identity[:8]}"


def is_version_of(published: str, collection: str) -> bool:
    """Whether a collection was made for this published name."""
    return re.fullmatch(re.escape(published) + r"-[0-9a-f]{8}", collection) is not None


def edge_directory(settings: Settings, layout: Layout) -> Path | None:
    """Directory of the embedded collections, None when they are on a server."""
    location = settings.qdrant.location
    if location.startswith(("http://", "https://")):
        return None
    return layout.results / "qdrant" / "edge" if location == "embedded" else Path(location).expanduser()


def open_store(settings: Settings, layout: Layout) -> "Store":
    """The place that the settings name; nothing is asked of a server yet."""
    directory = edge_directory(settings, layout)
    if directory is None:
        from cuepoint.qdrant.server import ServerStore, connect

        return ServerStore(connect(settings.qdrant), settings.qdrant)
    from cuepoint.qdrant.edge import EdgeStore

    return EdgeStore(directory)


def shown_location(settings: Settings) -> str:
    """The location as it may be written down: a URL without user and password."""
    parts = urlsplit(settings.qdrant.location)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def present(settings: Settings, layout: Layout, model: str) -> bool:
    """Whether the model's collection is where it was loaded to, so that a load that is done need not be done again.

    Reads one small file when embedded. A server is asked once, briefly; one that does not answer counts as having it.
    """
    name = published_name(settings, model)
    directory = edge_directory(settings, layout)
    if directory is not None:
        return pointer.target(directory, name) is not None
    from cuepoint.qdrant.server import is_published

    return is_published(name, settings.qdrant)
