"""Write config.yaml, its JSON schema and the settings reference from the typed settings: `make generate`."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from cuepoint.settings import EmbeddingModel, Section, Settings
from cuepoint.settings.base import changes_results
from cuepoint.settings.embedding import READY_MADE

HEADER = """\
# yaml-language-server: $schema=schemas/config.schema.json
# All settings with their defaults; delete what you do not change. docs/settings.md says more of each.
# Written by `make generate` from scripts/cuepoint/settings/.
"""


def config_yaml() -> str:
    """The default configuration with each setting's description as its comment."""
    return HEADER + "\n".join(_yaml_lines(Settings, Settings(), indent=0)) + "\n"


def json_schema() -> str:
    """JSON schema of config.yaml, for editors."""
    schema = Settings.model_json_schema()
    schema["title"] = "Cuepoint configuration"
    return json.dumps(schema, indent=1) + "\n"


def reference() -> str:
    """The settings reference as Markdown."""
    lines = [
        "# Settings",
        "",
        "All settings of `config.yaml`, written by `make generate` from the typed settings. Changing one that *changes"
        " results* runs its stage again; the others (workers, batch sizes, politeness) never do.",
    ]
    for path, section in _sections(Settings, ""):
        lines += ["", f"## {path or 'Top level'}", "", (section.__doc__ or "").split("\n")[0], ""]
        lines += ["| setting | type | default | changes results | |", "|---|---|---|---|---|"]
        for name, field in section.model_fields.items():
            if _is_section(field):
                continue
            cells = [
                f"`{name}`",
                _type_name(field),
                f"`{_scalar(_default(field))}`",
                "yes" if changes_results(field) else "",
                " ".join((field.description or "").split()),
            ]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the three files into the repository."""
    for path, text in generated().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def generated() -> dict[Path, str]:
    """File -> the text that it should hold."""
    root = Path(__file__).parents[3]
    return {
        root / "config.yaml": config_yaml(),
        root / "schemas" / "config.schema.json": json_schema(),
        root / "docs" / "settings.md": reference(),
    }


def _yaml_lines(section: type[Section], value: Section, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for number, (name, field) in enumerate(section.model_fields.items()):
        description = field.description or (type(getattr(value, name)).__doc__ if _is_section(field) else "")
        if number or indent == 0:
            yield ""
        yield from textwrap.wrap(
            " ".join((description or "").split()),
            116 - len(pad),
            initial_indent=f"{pad}# ",
            subsequent_indent=f"{pad}# ",
        )
        if _is_section(field):
            yield f"{pad}{name}:"
            yield from _yaml_lines(type(getattr(value, name)), getattr(value, name), indent + 1)
        elif name == "models":
            yield f"{pad}{name}:"
            yield from _model_lines(indent + 1)
        else:
            yield f"{pad}{name}: {_scalar(value.model_dump(mode='json')[name])}"


def _model_lines(indent: int) -> Iterator[str]:
    """The ready-made models: the first with all that can be set, the others with what differs."""
    pad = "  " * indent
    for number, (name, values) in enumerate(READY_MADE.items()):
        yield f"{pad}{name}:"
        if number == 0:
            yield from _yaml_lines(EmbeddingModel, EmbeddingModel(**values), indent + 1)
        else:
            for key, value in values.items():
                yield f"{pad}  {key}: {_scalar(value)}"


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = f"{path}.{name}".lstrip(".")
        if _is_section(field):
            yield from _sections(field.annotation, inner)  # type: ignore[arg-type]
        elif name == "models":
            yield f"{inner}.NAME", EmbeddingModel


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    return str(value) if isinstance(value, Path) else value


def _scalar(value: Any) -> str:
    if isinstance(value, str) and value == "":
        return '""'
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).removesuffix("...\n").strip()
    )


def _type_name(field: FieldInfo) -> str:
    name = str(field.annotation) if not isinstance(field.annotation, type) else field.annotation.__name__
    for long, short in (("typing.", ""), ("pathlib.", ""), ("cuepoint.settings.embedding.", "")):
        name = name.replace(long, short)
    return name


if __name__ == "__main__":
    main()
