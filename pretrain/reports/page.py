"""Pages as HTML: self-contained, for a screen or a phone, light or dark."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from data_pipeline.messages import visible


def render(template: str, page: dict[str, Any]) -> str:
    """A template of this folder, filled; every value is escaped, a missing one is an error."""
    return _environment().get_template(template).render(page)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """What is filled in, as text: characters that a browser would obey are escapes."""
    return visible(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value
