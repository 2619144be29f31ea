"""Runs `adafactor trace` in this process."""

import json
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from adafactor.cli.trace import trace

app = typer.Typer()
app.command()(trace)


def run(tmp_path: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])


def run_json(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    result = run(tmp_path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
