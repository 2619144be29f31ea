"""report.html: one file, pictures inside, no script, nothing fetched."""

from __future__ import annotations

from typing import Any

import jinja2

from adafactor.cli._screen import size


def render(template: str, values: dict[str, Any], **filters: Any) -> str:
    """The template of that name, filled in; ``size`` is always among the filters."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adafactor.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, **filters)
    return environment.get_template(template).render(**values)
