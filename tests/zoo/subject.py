"""One model of the zoo in work: its folders, and what earlier steps left for later ones."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.zoo.compare import Keys, Outputs, distance, load, more, outputs, tensors
from tests.zoo.corpus import Corpus
from tests.zoo.entry import SMALL_SHARD, Entry
from tests.zoo.outcome import command

EXACT = 1e-4  # relative error of outputs in float32; 1e-6 is usual
ROUNDED = 2e-2  # the same in bfloat16, where every layer rounds
MERGED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # the merged weights were rounded once more


@dataclass
class Subject:
    """A saved model and what has been found of it."""

    entry: Entry
    folder: Path
    corpus: Corpus
    weights: dict[str, Tensor]  # as saved
    first: Outputs  # of what transformers loads from its own file
    keys: Keys  # that transformers misses or ignores in the original too
    saved_error: float  # between the model and what transformers loads from its own file
    lost: str = ""  # what transformers itself loses when it saves what it has loaded, in words
    found: dict[str, Any] = field(default_factory=dict)  # by name, from one step to another

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def compressed(self) -> Path:
        return self.folder / "compressed"

    @property
    def plain(self) -> Path:
        return self.folder / "plain"

    @property
    def half(self) -> bool:
        return self.entry.half

    @property
    def tolerance(self) -> float:
        return ROUNDED if self.half else EXACT

    def load(self, folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Keys]:
        return load(self.entry, folder, dtype)

    def outputs(self, model: Any, base: Any = None) -> Outputs:
        return outputs(self.entry, model, base)

    def saved_plain(self) -> tuple[Outputs, dict[str, Tensor]]:
        """What transformers makes of the decompressed model by saving it: outputs once loaded again, and tensors."""
        folder = self.folder / "plain_saved"
        if not folder.exists():
            self.found["plain"].save_pretrained(folder)
        return self.outputs(self.load(folder)[0]), tensors(folder)

    def pair_in_float32(self) -> tuple[Any, Any]:
        """(compressed, decompressed), both loaded in float32 from files that were not rounded on the way."""
        plain = self.plain
        if self.half:
            plain = self.folder / "plain32"
            if not plain.exists():
                command("decompress", self.compressed, plain, "--dtype", "float32")
        return self.load(self.compressed, torch.float32)[0], self.load(plain, torch.float32)[0]


def prepare(entry: Entry, folder: Path, corpus: Corpus) -> Subject:
    """Build the model and save it as transformers does, once and again.

    Raises:
        Exception: whatever transformers raises when it cannot build, run, save or load it.
    """
    source = folder / "source"
    model = entry.build()
    first = outputs(entry, model)
    if not first:
        raise ValueError(f"{entry.name} returns no floating tensor")
    model.save_pretrained(source, max_shard_size=SMALL_SHARD if entry.sharded else "5GB")
    if entry.text:
        shutil.copytree(corpus.tokenizer, source, dirs_exist_ok=True)
    again, keys = load(entry, source)
    loaded = outputs(entry, again)
    error, _ = distance(first, loaded)
    if error > ROUNDED and entry.half:  # a rounding may send a token to another expert; what is kept in float32 differs
        error, _ = distance(outputs(entry, model.float()), outputs(entry, load(entry, source, torch.float32)[0]))
    lost = _lost_again(entry, again, folder / "again", keys)
    return Subject(entry, folder, corpus, tensors(source), loaded, keys, error, lost)


def _lost_again(entry: Entry, model: Any, folder: Path, keys: Keys) -> str:
    """Saves a plain model that was loaded, and loads it: what is lost then is no fault of compression."""
    said = "transformers itself: the plain model, once loaded and saved again,"
    wanted = outputs(entry, model)
    try:
        model.save_pretrained(folder)
        again, found = load(entry, folder)
        error, where = distance(wanted, outputs(entry, again))
    except Exception as raised:  # noqa: BLE001 - transformers fails in any way
        return f"{said} fails with {type(raised).__name__}: {raised}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    others = more(found, keys)
    if others:
        return f"{said} loads with {others}"
    return f"{said} has outputs that differ by {error:.2g} in {where}" if error > EXACT else ""
