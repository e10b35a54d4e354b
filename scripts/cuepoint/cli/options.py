"""Options that the verbs share, read as Snakemake reads them."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from cuepoint.errors import ConfigError
from cuepoint.layout import Layout
from cuepoint.settings import Settings, load_settings

ConfigFiles = Annotated[
    list[Path] | None,
    typer.Option("--configfile", help="Settings over those of config.yaml; later files win.", show_default=False),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--directory", "-d", help="Working directory of the workflow (default: this one).", show_default=False
    ),
]


def read_settings(configfiles: list[Path] | None, directory: Path | None) -> tuple[Settings, Layout]:
    """Settings and paths of a workflow; changes to its working directory, as `snakemake --directory` does.

    Raises ConfigError when there is no configuration, or it cannot be used.
    """
    files = [path.resolve() for path in configfiles or []]
    if directory:
        try:
            os.chdir(directory)
        except OSError as error:
            raise ConfigError(f"--directory {directory}: {error.strerror}") from None
    if Path("config.yaml").exists():
        files.insert(0, Path("config.yaml"))
    if not files:
        raise ConfigError(
            f"there is no config.yaml in {Path.cwd()}: name the workflow's working directory with --directory, or its "
            "settings with --configfile"
        )
    merged: dict[str, Any] = {}
    for path in files:
        merged = _merge(merged, _read(path))
    settings = load_settings(merged)
    return settings, Layout(settings.results)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict | None):
        raise ConfigError(f"{path} holds no settings: `name: value` lines are expected")
    return value or {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
