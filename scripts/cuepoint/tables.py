"""The Parquet tables: schemas, and the only code that writes or reads whole files of them.

Tables depend only on inputs and settings, never on when or in how many attempts they were made, so that two runs
compare equal byte for byte. What a table was made from stands in its metadata (`cuepoint.*` keys).
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cuepoint import __version__, faults
from cuepoint.atomic import atomic_path
from cuepoint.errors import CuepointError, DataError, EnvironmentFault

FORMAT = 1  # of the tables below: part of each file's metadata
_SEAL = b"cuepoint.seal"
_FORMAT_KEY, _THIS_FORMAT = b"cuepoint.format", str(FORMAT).encode()

DAMAGE = (pa.ArrowException, OSError, ValueError, RecursionError)
"""What reading a damaged Parquet file can raise."""

_words = pa.list_(
    pa.struct([("start", pa.float64()), ("end", pa.float64()), ("word", pa.string()), ("probability", pa.float32())])
)

TRANSCRIPTS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("segment", pa.int32(), nullable=False),
        pa.field("start", pa.float64(), nullable=False),
        pa.field("end", pa.float64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("avg_logprob", pa.float32()),
        pa.field("no_speech_prob", pa.float32()),
        pa.field("compression_ratio", pa.float32()),
        pa.field("words", _words),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
    ]
)

VIDEOS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("channel", pa.string()),
        pa.field("channel_id", pa.string()),
        pa.field("upload_date", pa.date32()),
        pa.field("duration", pa.float64()),
        pa.field("speech_duration", pa.float64()),
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("segments", pa.int32(), nullable=False),
        pa.field("flagged", pa.int32(), nullable=False),
        pa.field("audio_hash", pa.string()),
    ]
)


def embeddings_schema(dimension: int) -> pa.Schema:
    """Schema of an embedding table with `dimension` numbers a vector."""
    return pa.schema(
        [
            pa.field("point_id", pa.string(), nullable=False),
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("chunk", pa.int32(), nullable=False),
            pa.field("start", pa.float64(), nullable=False),
            pa.field("end", pa.float64(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("tokens", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dimension), nullable=False),
        ]
    )


def write_table(path: Path, table: pa.Table, schema: pa.Schema, *, settings: dict[str, Any], **metadata: Any) -> None:
    """Write `table` as `schema` to `path`: zstd, whole or not at all, with its provenance in the file's metadata.

    `settings` are those that change results; `metadata` (models with revisions, packages with versions) is kept as JSON
    under `cuepoint.<name>`.
    """
    provenance = {"format": FORMAT, "version": __version__, "settings": settings, **metadata}
    encoded = {f"cuepoint.{name}": json.dumps(value, sort_keys=True) for name, value in provenance.items()}
    encoded["cuepoint.seal"] = _seal({key.encode(): value.encode() for key, value in encoded.items()}, len(table))
    table = table.cast(schema).replace_schema_metadata(encoded)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=6, write_page_checksum=True)


def read_table(path: Path, schema: pa.Schema | None = None, columns: list[str] | None = None) -> pa.Table:
    """Read a whole table. Raises DataError, with the file and the mend, when it is missing, damaged or of another kind.

    Pages carry checksums, so a flipped bit is found here and not in a search result.
    """
    try:
        table = pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
        names = table.schema.names  # which need not be text in a damaged file
        check_seal(table.schema.metadata, len(table))
    except FileNotFoundError:
        raise _missing(path) from None
    except DAMAGE as error:
        raise damaged(path, error) from error
    if (table.schema.metadata or {}).get(_FORMAT_KEY, _THIS_FORMAT) != _THIS_FORMAT:
        raise DataError(f"{path} was written by another version of this program: delete it and run snakemake again")
    if schema is not None:
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        if not table.schema.equals(wanted, check_metadata=False):
            raise DataError(f"{path} has not the columns of this version ({names}): delete it and run snakemake again")
    return table


def read_metadata(path: Path) -> dict[str, Any]:
    """The provenance that `write_table` kept, decoded (`settings`, `version`, models, packages)."""
    try:
        footer = pq.read_metadata(path)
        check_seal(footer.metadata, footer.num_rows)
        return {
            key.decode().removeprefix("cuepoint."): json.loads(value)
            for key, value in (footer.metadata or {}).items()
            if key.startswith(b"cuepoint.") and key != _SEAL
        }
    except FileNotFoundError:
        raise _missing(path) from None
    except DAMAGE as error:
        raise damaged(path, error) from error


def check_seal(metadata: Mapping[bytes, bytes] | None, rows: int) -> None:
    """Raise ValueError when a file's metadata or number of rows is not as `write_table` wrote it.

    Parquet has checksums for its pages, and none for the footer that says where they are and what they mean.
    """
    if metadata and _SEAL in metadata and metadata[_SEAL].decode() != _seal(metadata, rows):
        raise ValueError("its footer is not as it was written")


def _seal(metadata: Mapping[bytes, bytes], rows: int) -> str:
    sealed = sorted((key, value) for key, value in metadata.items() if key.startswith(b"cuepoint.") and key != _SEAL)
    return hashlib.blake2b(repr([sealed, rows]).encode(), digest_size=16).hexdigest()


def damaged(path: Path, error: BaseException) -> CuepointError:
    """The error for a table that cannot be read: it is damaged, unless the machine is at fault (its limits, rights)."""
    if (fault := faults.by_number([error])) is not None:
        return EnvironmentFault(f"{path} cannot be read: {fault}")
    return DataError(f"{path} is damaged ({error}): delete it and run snakemake again")


def _missing(path: Path) -> DataError:
    return DataError(f"{path} is missing: run snakemake again and it is made from the caches")


def package_versions(*names: str) -> dict[str, str | None]:
    """Installed versions of packages, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
