"""The repository holds together: form, pins, and what Snakemake itself says of the workflow."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command, **options):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def pins(text):
    return dict(re.findall(r"^\s*(?:- )?([A-Za-z0-9_.-]+)==([^\s#+]+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("snakefmt", "--check", "Snakefile", "rules")],
)
def test_the_code_is_in_form(command):
    done = run(BIN / command[0], *command[1:])
    assert done.returncode == 0, done.stdout + done.stderr


def test_environments_and_requirements_pin_the_same_versions():
    plain = pins((ROOT / "requirements.txt").read_text()) | pins((ROOT / "requirements-gpu.txt").read_text())
    for path in (ROOT / "envs").glob("*.yaml"):
        (pip,) = [part["pip"] for part in yaml.safe_load(path.read_text())["dependencies"] if isinstance(part, dict)]
        for name, version in pins("\n".join(pip)).items():
            assert plain[name] == version, f"{path.name}: {name}"


def test_every_direct_requirement_is_pinned():
    wanted = {line.split("==")[0] for line in (ROOT / "requirements.in").read_text().splitlines() if line[:1].isalpha()}
    assert wanted <= pins((ROOT / "requirements.txt").read_text()).keys()


def test_each_rule_with_a_script_has_its_environment_log_and_message():
    for path in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^(?:local)?rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            if "script:" in rule:
                assert all(word in rule for word in ("conda:", "log:", "message:")), f"{path.name}: {rule[:40]}"


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        code = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert len(code) <= 40, f"{path.name} has {len(code)} lines: logic belongs in scripts/cuepoint"


@pytest.mark.slow
def test_snakemake_lint_is_clean(tmp_path):
    (tmp_path / "videos.txt").write_text("dQw4w9WgXcQ\n")
    done = run(BIN / "snakemake", "--lint", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Congratulations" in done.stderr


@pytest.mark.slow
def test_parsing_the_workflow_imports_nothing_heavy(tmp_path):
    (tmp_path / "videos.txt").write_text("dQw4w9WgXcQ\n")
    done = run(
        BIN / "snakemake", "--dry-run", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path,
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    heavy = {"torch", "transformers", "yt_dlp", "faster_whisper", "ctranslate2", "qdrant_client", "av", "onnxruntime"}
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert imported, "no import times were printed"
    assert not heavy & imported
