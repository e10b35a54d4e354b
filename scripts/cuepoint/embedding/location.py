"""Where a model's files are, and which revision of them: a directory, an installed package, or Hugging Face."""

import hashlib
import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cuepoint.errors import ConfigError, EnvironmentFault
from cuepoint.settings import EmbeddingModel

log = logging.getLogger(__name__)

PACKAGE = "package:"
_CONTENT = ("*.json", "*.txt", "*.model", "*.safetensors", "*.py")  # what makes a model; exported copies do not count
_EXPORTS = ("onnx/*", "openvino/*")


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory and its revision: the commit on Hugging Face, or the hash of the files."""

    path: Path
    revision: str


def locate(model: EmbeddingModel) -> ModelFiles:
    """Find the model's files, downloading them from Hugging Face only if they are not there yet.

    Raises ConfigError for a name that leads nowhere, EnvironmentFault when Hugging Face cannot be reached.
    """
    if model.model.startswith(PACKAGE):
        return _local(_in_package(model.model), model)
    path = Path(model.model).expanduser()
    return _local(path, model) if path.is_dir() else _from_hub(model)


def fetch(model: EmbeddingModel) -> None:
    """Download the model into the Hugging Face cache unless it is there or a local one. Raises as `locate`."""
    if not model.model.startswith(PACKAGE) and not Path(model.model).expanduser().is_dir():
        _from_hub(model)


def _in_package(name: str) -> Path:
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise ConfigError(f"embedding model {name!r}: no Python package {package!r} is installed here: pip install it")
    root = Path(roots[0])
    if folder:
        return root / folder
    found = [path.parent for path in [root / "config.json", *sorted(root.glob("*/config.json"))] if path.is_file()]
    found = [path for path in found if (path / "modules.json").is_file()] or found
    if len(found) != 1:
        raise ConfigError(f"embedding model {name!r}: the package holds {len(found)} models: name its subdirectory")
    return found[0]


def _local(path: Path, model: EmbeddingModel) -> ModelFiles:
    if model.revision is not None:
        raise ConfigError(f"embedding model {model.model!r} is local: `revision` is for Hugging Face repositories only")
    if not (path / "config.json").is_file():
        raise ConfigError(f"embedding model {model.model!r}: {path} has no config.json, so it holds no model")
    return ModelFiles(_with_safetensors(path, model), _content_hash(path))


def _from_hub(model: EmbeddingModel) -> ModelFiles:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = {"allow_patterns": [*_CONTENT[:4], *(["*.py"] * model.trust_remote_code)], "ignore_patterns": _EXPORTS}
    try:
        path = _kept_commit(model) or Path(snapshot_download(model.model, revision=model.revision, **patterns))
    except HFValidationError:
        raise ConfigError(
            f"embedding model {model.model!r} is no directory here and no name of a Hugging Face repository"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFault(
            f"embedding model {model.model!r} cannot be had from Hugging Face ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}): check its name and the network, or copy it here and set its directory as "
            "`model`"
        ) from error
    return ModelFiles(_with_safetensors(path, model), path.name)


def _kept_commit(model: EmbeddingModel) -> Path | None:
    """The snapshot of a pinned commit if an earlier job downloaded it: then the network is not asked at all."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if model.revision is None or len(model.revision) != 40:  # a branch or tag can have moved
        return None
    try:
        path = Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return path if list(path.glob("*.safetensors")) and (path / "config.json").is_file() else None


def _with_safetensors(path: Path, model: EmbeddingModel) -> Path:
    """The directory, if all weights in it are there as safetensors: sentence-transformers would unpickle the others."""
    for folder in {path, *(weights.parent for weights in path.rglob("pytorch_model*.bin"))}:
        if not list(folder.glob("*.safetensors")):
            raise ConfigError(
                f"embedding model {model.model!r} has no safetensors weights in {folder}, and no other kind is loaded"
            )
    return path


def _content_hash(path: Path) -> str:
    """Hash over the names and contents of the files that make the model."""
    digest = hashlib.blake2b(digest_size=16)
    files = {file for pattern in _CONTENT for file in path.rglob(pattern) if file.is_file()}
    for file in sorted(files):
        with file.open("rb") as content:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
            digest.update(hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()
