"""The Parquet tables: schemas, and the only code that writes or reads whole files of them.

Tables depend only on inputs and settings, never on when or in how many attempts they were made, so that two runs
compare equal byte for byte. What a table was made from stands in its metadata (`cuepoint.*` keys).
"""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cuepoint import __version__
from cuepoint.atomic import atomic_path
from cuepoint.errors import DataError

FORMAT = 1  # of the tables below: part of each file's metadata

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
    table = table.cast(schema).replace_schema_metadata(encoded)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", compression_level=6, write_page_checksum=True)


def read_table(path: Path, schema: pa.Schema | None = None, columns: list[str] | None = None) -> pa.Table:
    """Read a whole table. Raises DataError, with the file and the mend, when it is missing, damaged or of another kind.

    Pages carry checksums, so a flipped bit is found here and not in a search result.
    """
    try:
        table = pq.read_table(path, columns=columns, partitioning=None, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run snakemake again and it is made from the caches") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and run snakemake again") from error
    if schema is not None:
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        if not table.schema.equals(wanted, check_metadata=False):
            raise DataError(
                f"{path} has not the columns of this version ({table.schema.names}): delete it and run snakemake again"
            )
    return table


def read_metadata(path: Path) -> dict[str, Any]:
    """The provenance that `write_table` kept, decoded (`settings`, `version`, models, packages)."""
    try:
        raw = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and run snakemake again") from error
    return {
        key.decode().removeprefix("cuepoint."): json.loads(value)
        for key, value in raw.items()
        if key.startswith(b"cuepoint.")
    }


def package_versions(*names: str) -> dict[str, str | None]:
    """Installed versions of packages, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
