"""What all sections of the settings share."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """A section of config.yaml: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _paths_are_usable(cls, value: Any) -> Any:
        """A path must be one that a file can have and that Snakemake does not take for a pattern with wildcards."""
        if isinstance(value, Path) and (not str(value).isprintable() or set("{}") & set(str(value))):
            raise ValueError("a path without control characters and braces is needed")
        return value

    def result_settings(self) -> dict[str, Any]:
        """The settings that change results, JSON-able: what rules put into `params` and caches into fingerprints.

        Workers, batch sizes and politeness are left out: changing them must never compute a thing twice.
        """
        dumped = self.model_dump(mode="json")
        return {name: dumped[name] for name, field in type(self).model_fields.items() if changes_results(field)}


def result(default: Any = ..., **constraints: Any) -> Any:
    """A field whose value changes what is computed (and so triggers a rerun of its stage when it is changed)."""
    return Field(default, json_schema_extra={"changes_results": True}, **constraints)


def changes_results(field: Any) -> bool:
    """Whether a model field was declared with `result`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("changes_results"))
