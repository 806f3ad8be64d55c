"""What a card says, and the templates that say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spectral_surgery import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = "THIS_FOLDER"  # until it has a place on the Hub
TAG = "spectral-surgery"


@dataclass(frozen=True)
class CardContent:
    """What a card says.

    Attributes:
        template: the kind of folder, a name in templates.
        command: that makes these bytes again; empty when it is not known.
        rows: a table of what was measured; the first 40 are shown.
        relation: how, in the Hub's words: quantized, adapter, merge or finetune.
    """

    template: str
    values: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    rows: Sequence[Mapping[str, object]] = ()
    base_model: str | None = None
    relation: str | None = None
    library_name: str | None = None
    tags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    here: str = HERE

    def metadata(self) -> dict[str, object]:
        """Metadata of a card, without what is not known."""
        known = {
            "base_model": self.base_model,
            "base_model_relation": self.relation if self.base_model else None,
            "library_name": self.library_name,
            "tags": [TAG, *self.tags],
        }
        return {key: value for key, value in known.items() if value}

    def text(self) -> str:
        """The Markdown of our section."""
        versions = {"spectral-surgery": __version__, **{name: version(name) for name in self.libraries}}
        template = _templates().get_template(f"{self.template}.md.j2")
        rendered = template.render({**vars(self), "versions": versions, **self.values})
        return re.sub(r"\n{3,}", "\n\n", rendered).strip()


@cache
def _templates() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spectral_surgery.cards"),
        autoescape=jinja2.select_autoescape(),  # HTML alone; this is Markdown
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": _cell,
        "number": _number,
        "link": lambda name: f"[{name}](https://huggingface.co/{name})" if name else "a checkpoint",
        "short_name": lambda name: name.rpartition("/")[2] if name else "A checkpoint",
    }
    return environment


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
