"""The settings: typed models that validate config.yaml and from which the schema and the reference are generated."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from cuepoint.errors import ConfigError
from cuepoint.settings.base import Section, result
from cuepoint.settings.download import DownloadSettings
from cuepoint.settings.embedding import ChunkSettings, EmbeddingModel, EmbeddingSettings
from cuepoint.settings.qdrant import QdrantSettings
from cuepoint.settings.report import ReportSettings
from cuepoint.settings.slurm import SlurmSettings
from cuepoint.settings.transcribe import TranscribeSettings

__all__ = [
    "ChunkSettings",
    "DownloadSettings",
    "EmbeddingModel",
    "EmbeddingSettings",
    "QdrantSettings",
    "ReportSettings",
    "Section",
    "Settings",
    "SlurmSettings",
    "TranscribeSettings",
    "load_settings",
    "result",
]

_SHOWN = 200  # characters of a wrong value


class Settings(Section):
    """All settings of a run. Paths are relative to the working directory (`--directory`)."""

    videos: Path = Path("videos.txt")
    """The list: one video ID, URL or local media file per line, `#` starts a comment."""
    sources: list[str] = Field(default_factory=list)
    """Channels, playlists and searches whose videos `cuepoint list` appends to the list."""
    results: Path = Path("results")
    """Where everything is written. Copy this directory and you have copied the run's memory too."""
    shard_size: int = Field(64, ge=1, le=1000)
    """Videos of a new shard, the unit of GPU work and of Parquet files (existing shards stay as they are)."""
    limit_unprocessed: int | None = Field(None, ge=1)
    """Process at most this many videos that are not done yet in this run."""
    keep_audio: bool = True
    """Keep the audio after it has been transcribed; without it another ASR model means another download."""
    allow_shrink: bool = False
    """Let a load delete more than `qdrant.max_delete_share` of a collection (`--config allow_shrink=true`)."""
    max_failed_share: float = Field(1.0, ge=0, le=1)
    """The run fails when more than this share of the listed videos did not end as `ok` or `empty`."""
    download: DownloadSettings = DownloadSettings()
    transcribe: TranscribeSettings = TranscribeSettings()
    chunking: ChunkSettings = ChunkSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    qdrant: QdrantSettings = QdrantSettings()
    report: ReportSettings = ReportSettings()
    slurm: SlurmSettings = SlurmSettings()

    @model_validator(mode="after")
    def _models_are_known(self) -> "Settings":
        for name in self.embedding.use:
            if name not in self.embedding.models:
                hint = _nearest(name, self.embedding.models)
                raise ValueError(f"embedding.use names {name!r}, which is not in embedding.models{hint}")
        return self


def load_settings(config: Mapping[str, Any]) -> Settings:
    """Validate a merged configuration. Raises ConfigError that names each setting, its value and what is allowed."""
    try:
        return Settings.model_validate(dict(config))
    except ValidationError as error:
        raise ConfigError("\n".join(["config.yaml cannot be used:", *map(_explain, error.errors())])) from None


def _explain(error: Mapping[str, Any]) -> str:
    location = [part for part in error["loc"] if isinstance(part, str | int)]
    name = ".".join(map(str, location))
    if error["type"] == "extra_forbidden":
        return f"  {name}: no such setting{_nearest(str(location[-1]), _names_beside(location))}"
    if not location:
        return f"  {error['msg'].removeprefix('Value error, ')}"
    return f"  {name} = {_shown(error['input'])}: {error['msg'].removeprefix('Value error, ')}"


def _shown(value: Any) -> str:
    """A value as the user may have written it, cut to a bearable length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number with more digits than Python writes, or a list that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _names_beside(location: list[str | int]) -> list[str]:
    """Names of the settings that could have been meant at `location`."""
    section: Any = Settings
    for part in location[:-1]:
        if section is Settings and part in Settings.model_fields:
            section = Settings.model_fields[str(part)].annotation
        elif section is EmbeddingSettings and part == "models":
            section = dict
        elif section is dict:
            section = EmbeddingModel
    return list(getattr(section, "model_fields", ()))


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
