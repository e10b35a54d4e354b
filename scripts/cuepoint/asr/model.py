"""Where the model's files are, and which revision of them this is."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from cuepoint.errors import ConfigError, EnvironmentFault
from cuepoint.settings import TranscribeSettings

log = logging.getLogger(__name__)

_NEEDED = ("model.bin", "config.json", "tokenizer.json")
# The commits that faster-whisper's names for its models stand for: no run changes its model because a repository has
# changed. Other models are taken as they are, and recorded as resolved.
PINNED = {
    "tiny": "d90ca5fe260221311c53c58e660288d3deb8d356",
    "base": "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66",
    "small": "536b0662742c02347bc0e980a01041f333bce120",
    "medium": "08e178d48790749d25932bbc082711ddcfdfbc4f",
    "large-v2": "f0fe81560cb8b68660e564f55dd99207059c092e",
    "large-v3": "edaa852ec7e145841d8ffdb056a99866b5f0a478",
    "large": "edaa852ec7e145841d8ffdb056a99866b5f0a478",
    "distil-large-v3": "c3058b475261292e64a0412df1d2681c06260fab",
    "large-v3-turbo": "0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf",
    "turbo": "0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf",
}
_PATTERNS = (*_NEEDED, "preprocessor_config.json", "vocabulary.*")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine."""

    name: str  # as the settings spell it
    revision: str  # commit of the repository, or hash of a local directory's files
    folder: Path


def find_model(settings: TranscribeSettings) -> ModelFiles:
    """The model of the settings: a local directory, else the Hugging Face cache, else a download into that cache.

    A model that is in the cache is used as it is, without asking the hub: no run changes its model halfway. Raises
    ConfigError when there is no such model, EnvironmentFault when it cannot be fetched.
    """
    folder = Path(settings.model)
    if folder.is_dir():
        _check(folder, settings.model)
        return ModelFiles(settings.model, _hash_of(folder), folder)
    folder = _from_hub(settings)
    _check(folder, settings.model)
    return ModelFiles(settings.model, folder.name, folder)


def fetch(settings: TranscribeSettings) -> None:
    """Download the model into the Hugging Face cache unless it is there or a directory here. Raises as `find_model`."""
    if not Path(settings.model).is_dir():
        _from_hub(settings)


def _from_hub(settings: TranscribeSettings) -> Path:
    """Directory of the snapshot, named by its commit."""
    from faster_whisper.utils import download_model
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    revision = settings.revision or PINNED.get(settings.model)
    try:
        try:
            cached = Path(download_model(settings.model, revision=revision, local_files_only=True))
            if all((cached / name).exists() for name in _NEEDED):
                return cached
        except LocalEntryNotFoundError:
            log.info("downloading the model %s", settings.model)
        return Path(download_model(settings.model, revision=revision))
    except (ValueError, RepositoryNotFoundError) as error:
        raise ConfigError(
            f"transcribe.model = {settings.model!r}: neither a directory here ({Path.cwd()}), nor a model of "
            f"faster-whisper, nor a repository on the hub ({error})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise EnvironmentFault(
            f"the model {settings.model!r} is not in the Hugging Face cache and cannot be downloaded "
            f"({str(error).splitlines()[0]}): "
            "connect this machine once, or set transcribe.model to a directory that holds the model"
        ) from error


def _check(folder: Path, name: str) -> None:
    for needed in _NEEDED:
        if not (folder / needed).exists():
            raise ConfigError(
                f"transcribe.model = {name!r}: {folder / needed} is missing. A model directory holds model.bin, "
                "config.json, vocabulary.json and tokenizer.json (one is made by ct2-transformers-converter with "
                "--copy_files tokenizer.json preprocessor_config.json)"
            )


def _hash_of(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()[:32]}"
