"""report: one HTML page about what a command has made, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectral_surgery.commands.report.adapters import adapter_page
from spectral_surgery.commands.report.compressed import compressed_page
from spectral_surgery.commands.report.evals import eval_page, is_eval
from spectral_surgery.commands.report.models import is_swapped, is_trained, merged_page, swapped_page, trained_page
from spectral_surgery.commands.report.page import Page, render
from spectral_surgery.commands.report.records import json_of
from spectral_surgery.errors import CheckpointError, ConfigError
from spectral_surgery.files.atomic import replace_file, writing_to
from spectral_surgery.files.compressed.checkpoint import is_compressed
from spectral_surgery.files.header import read_json
from spectral_surgery.files.index import is_adapter
from spectral_surgery.files.merge_record import is_merged
from spectral_surgery.files.sidecar_files import CONFIG_FILE

_KINDS = (
    "a compressed folder, an adapter, a merged, swapped or trained model, or a file with what `eval --json` printed"
)


@dataclass(frozen=True)
class PageReport:
    """Where the page is, and what is in it."""

    path: Path
    page: Page
    nbytes: int

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "page": str(self.path),
            "bytes": self.nbytes,
            "kind": self.page.kind,
            "title": self.page.title,
            "figures": dict(self.page.figures),
            "sections": [
                {
                    "title": section.title,
                    "charts": [figure.title for figure in section.figures],
                    "tables": [{"title": table.title, "rows": len(table.rows)} for table in section.tables],
                }
                for section in self.page.sections
            ],
        }


def report(folder: Path, out: Path, *, title: str | None = None, overwrite: bool = False) -> PageReport:
    """Write one HTML file about a folder: it needs no network, and nothing beside it.

    Headers and records are read, weights are not.

    Args:
        folder: written by compress, heal, train, merge or swap, or any adapter in PEFT's format; or the file that
            ``eval --json`` was printed to.
        out: the file to write; missing parents are created.
        title: heading; None for the name of the folder.

    Raises:
        ConfigError: when the folder is none of these.
        CheckpointError: when it is damaged, or the file is there or cannot be written.
    """
    if out.is_dir():
        raise CheckpointError(f"{out}: expected a file to write, got a folder. Name a file in it.")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: expected a new file, got one that exists. Use --overwrite to replace it.")
    page = _page(folder, title or folder.resolve().name)
    data = render(page).encode("utf-8", "replace")
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, data)
    return PageReport(out, page, len(data))


def _page(folder: Path, title: str) -> Page:
    if folder.is_file():
        body = read_json(folder) if folder.suffix != ".safetensors" else {}
        if is_eval(body):
            return eval_page(body, title)
        raise ConfigError(f"{folder}: expected {_KINDS}, got another file. Use inspect for weights.")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected {_KINDS}, got nothing of this name. Check the path.")
    if is_compressed(folder):
        return compressed_page(folder, title)
    if is_adapter(folder):
        return adapter_page(folder, title)
    if is_merged(folder):
        return merged_page(folder, title)
    if is_swapped(json_of(folder, CONFIG_FILE)):
        return swapped_page(folder, title)
    if is_trained(folder):
        return trained_page(folder, title)
    raise ConfigError(f"{folder}: expected {_KINDS}, got a folder without a record. Use inspect for a plain model.")
