"""push: a folder to a repository, checked first, as one commit."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spectral_surgery import __version__, hub
from spectral_surgery.cards import card as cards
from spectral_surgery.cards.check import METRICS_FILE, Checked, check_folder
from spectral_surgery.cards.content import HERE
from spectral_surgery.commands.train.from_scratch import CONTROL
from spectral_surgery.errors import ConfigError, HubError
from spectral_surgery.files.compressed.manifest import FILE_NAME
from spectral_surgery.files.index import INDEX_FILE, SINGLE_FILE
from spectral_surgery.progress import Progress, silent
from spectral_surgery.training.trainer import CHECKPOINTS

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WHAT = {"compressed": "compressed checkpoint", "adapter": "adapter", "dense": "checkpoint"}
_KEPT_DOTFILES = (".gitattributes",)


@dataclass(frozen=True)
class PushReport:
    """What a push did, or would do.

    Attributes:
        files: bytes by path.
        deleted: files of the checkpoint that was there before and is replaced.
        commit: hash; empty in a dry run.
        url: of the commit or pull request; empty in a dry run.
        changed: whether there was anything to commit.
    """

    repository: str
    kind: str
    files: Mapping[str, int]
    deleted: tuple[str, ...]
    commit: str
    url: str
    changed: bool
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return vars(self) | {"files": dict(self.files), "deleted": list(self.deleted), "bytes": self.nbytes}


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> PushReport:
    """Check a folder and upload it as one commit.

    Content that the Hub has already is not sent again, so an upload that was cut off goes on, and a folder that has not
    changed makes no commit. Hidden files stay here. The card gets our section; a text that a person wrote, here or on
    the Hub, is kept.

    Args:
        folder: a compressed checkpoint, an adapter or any other checkpoint in safetensors.
        repository: ``org/name``; created when it is missing.
        private: visibility of a new one.
        revision: branch, created when it is missing.
        dry_run: only check the folder and say what would be uploaded; nothing is asked of the Hub.

    Raises:
        CheckpointError: when the folder is incomplete or damaged.
        ConfigError: when its card cannot be read, or revision and create_pr are both given.
        HubError: when it cannot be uploaded, or the card was edited here and there.
    """
    started = time.perf_counter()
    target = hub.to_push(repository, revision)
    if revision and create_pr:
        raise ConfigError(
            "--create-pr: expected no --revision with it, got one: a pull request is to the default branch."
        )
    checked = check_folder(folder, progress=progress)
    files: dict[str, Path | bytes] = {str(path): folder / path for path in _published(folder)}
    here = card_text(folder, checked, target.name)
    files[cards.FILE_NAME] = here.encode()
    hub.refuse_tokens(files, token)
    if dry_run:
        sizes = _sizes(files)
        return PushReport(str(target), checked.kind, sizes, (), "", "", True, time.perf_counter() - started)
    hub.prepare(target, private=private, create_pr=create_pr, token=token)
    listing = hub.list_files(target, token)
    files[cards.FILE_NAME] = _reconciled(here, listing, folder, token).encode()
    stale = _stale(listing, files)
    message = message or _message(checked)
    done = hub.upload(listing, files, delete=stale, message=message, create_pr=create_pr, token=token)
    seconds = time.perf_counter() - started
    return PushReport(str(target), checked.kind, _sizes(files), stale, done.commit, done.url, done.changed, seconds)


def push_stored(
    folder: Path, stored: Sequence[hub.Stored], checked: Checked, repository: hub.Repository, token: str | None
) -> PushReport:
    """Commit a folder together with weight files that the Hub has already.

    Args:
        folder: what is beside the weights.
        checked: of both together; nothing is checked here.

    Raises:
        ConfigError: when the card cannot be read.
        HubError: when it cannot be uploaded, or the card was edited here and there.
    """
    started = time.perf_counter()
    files: dict[str, Path | bytes] = {str(path): folder / path for path in _published(folder)}
    here = card_text(folder, checked, repository.name)
    files[cards.FILE_NAME] = here.encode()
    hub.refuse_tokens(files, token)
    listing = hub.list_files(repository, token)
    files[cards.FILE_NAME] = _reconciled(here, listing, folder, token).encode()
    sizes = _sizes(files) | {one.name: one.size for one in stored}
    stale = _stale(listing, sizes)
    done = hub.upload(listing, files, stored=stored, delete=stale, message=_message(checked), token=token)
    seconds = time.perf_counter() - started
    return PushReport(str(repository), checked.kind, sizes, stale, done.commit, done.url, done.changed, seconds)


def _message(checked: Checked) -> str:
    return f"Upload {_WHAT[checked.kind]} with spectral-surgery {__version__}"


def _stale(listing: hub.Listing, files: Mapping[str, object]) -> tuple[str, ...]:
    """Files of the checkpoint that was there before, and is replaced."""
    return tuple(sorted(_of_checkpoint(listing.files) - files.keys())) if _of_checkpoint(files) else ()


def _reconciled(here: str, listing: hub.Listing, folder: Path, token: str | None) -> str:
    """The card to push: ours, or the one somebody edited on the Hub, with our section as it is now."""
    there = hub.read_text(listing, cards.FILE_NAME, token)
    card = cards.reconciled(here, there)
    if card is None:
        raise HubError(
            f"{listing.repository}: expected one edited card, got edits of {cards.FILE_NAME} on the Hub and in"
            f" {folder.name}. Merge both into the one on the Hub, and remove the one here."
        )
    return card if card == here else cards.transplanted(card, here)


def _published(folder: Path) -> list[Path]:
    """Files to publish: of a training, not the states of optimizers, nor the model it was compared with."""
    files = visible_files(folder)
    trained = (folder / METRICS_FILE).exists()
    return [path for path in files if path.parts[0] not in (CHECKPOINTS, CONTROL)] if trained else files


def visible_files(folder: Path) -> list[Path]:
    """Files to publish, relative to the folder: all but hidden ones and what is in hidden folders."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path for path in paths if path.name in _KEPT_DOTFILES or not any(part.startswith(".") for part in path.parts)
    ]


def card_text(folder: Path, checked: Checked, repository: str) -> str:
    """The card a folder should have: that in the folder with our section in it, or a new one."""
    content = replace(checked.content, here=repository)
    text = cards.read_card(folder)
    if text is None or cards.is_untouched_template(text):
        return cards.derived(cards.only_metadata(text or ""), content)
    if cards.has_section(text) and not checked.complete:
        return cards.with_section(text, lambda section: section.replace(HERE, repository))
    return cards.refreshed(text, content)


def _of_checkpoint(names: Mapping[str, object]) -> set[str]:
    """Files that make up a model, of which those of an earlier push must not stay beside the new ones."""
    return {name for name in names if name in (SINGLE_FILE, INDEX_FILE, FILE_NAME) or _SHARD.fullmatch(name)}


def _sizes(files: Mapping[str, Path | bytes]) -> dict[str, int]:
    return {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sorted(files.items())
    }
