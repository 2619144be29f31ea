"""What the tests of ``adafactor plan`` share. Nothing here is itself a test."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

from adafactor.cli import _plan_report, main

if TYPE_CHECKING:
    import pytest


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def rows(found: dict[str, Any], case: int = 0) -> dict[str, Any]:
    return {row["name"]: row for row in found["cases"][case]["rows"]}


def printed(found: dict[str, Any], case: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(_plan_report.table(found, case))
    return console.export_text()
