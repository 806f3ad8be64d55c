"""How the weights of a compressed folder get to vLLM's models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, is_compressed, open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME, SUFFIXES
from spectral_surgery.files.compressed.settings import AUTO
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer.fill_weights import Names, Resident, decoded, resident_forms, residents_for
from spectral_surgery.hf.quantizer.lazy_weight import LazyWeight, Rows
from spectral_surgery.hf.quantizer.prefetch import Prefetcher
from spectral_surgery.layers import SpectralWeight


class FolderLoader:
    """Reads compressed folders, and leaves others to vLLM; an option of it is the resident form."""

    load_config: Any

    def __init__(self, load_config: Any) -> None:
        """Take ``resident`` out of the options for loaders.

        Raises ConfigError when there is no such form.
        """
        options = dict(load_config.model_loader_extra_config)
        self.resident = str(options.pop("resident", AUTO))
        plain = replace(load_config, load_format="safetensors", model_loader_extra_config=options)
        super().__init__(plain)  # type: ignore[call-arg]  # vLLM's

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, Tensor]]:
        given: Any = super()
        patterns = source.allow_patterns_overrides
        folder = Path(
            given._prepare_weights(
                source.model_or_path, source.subfolder, source.revision, source.fall_back_to_pt, patterns
            )[0]
        )
        if not is_compressed(folder):
            yield from given._get_weights_iterator(source)
            return
        _fetch_manifest(folder, source)
        self.counter_before_loading_weights = time.perf_counter()  # vLLM says what it took
        for name, tensor in stored_weights(open_compressed(folder), self.resident, torch.get_default_dtype()):
            yield source.prefix + name, tensor


def _fetch_manifest(folder: Path, source: Any) -> None:
    """Of a repository on the Hub, of which vLLM fetches nothing but weights."""
    if not (folder / FILE_NAME).exists() and not Path(source.model_or_path).exists():
        from transformers.utils.hub import cached_file

        cached_file(
            source.model_or_path, FILE_NAME, revision=source.revision, _raise_exceptions_for_missing_entries=False
        )


def stored_weights(checkpoint: CompressedCheckpoint, resident: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder by their original names, and once more by the names that are tied to them.

    Matrices are a `LazyWeight`; tensors of other shapes are decoded.

    Args:
        dtype: of what is compressed.

    Raises:
        ConfigError: when there is no such resident form, or codes do not fit it.
    """
    manifest, tables = checkpoint.manifest, checkpoint.with_tables()
    residents = residents_for(checkpoint, resident)

    def forms(names: Names) -> Resident:
        return resident_forms(tables, names, residents[names[0]])

    parts = {f"{name}.{suffix}" for name in manifest.tensors for suffix in SUFFIXES}
    matrices = [name for name, record in sorted(manifest.tensors.items()) if record.shape == record.matrix]
    again: dict[str, list[str]] = {}
    for alias, name in manifest.aliases.items():
        again.setdefault(name, []).append(alias)
    prefetched = Prefetcher(forms, [(name,) for name in matrices], torch.get_num_threads())
    try:
        for name in sorted({*manifest.tensors, *checkpoint.index.tensors} - parts):
            record = manifest.tensors.get(name)
            if record is None:
                tensor = read_tensor(checkpoint.index.tensors[name])
            elif record.shape == record.matrix:
                held, form = prefetched.take((name,))
                tensor = LazyWeight.of(Rows.all(SpectralWeight(held, form, dtype)))
            else:
                tensor = decoded(tables, name).to(dtype)
            yield from ((one, tensor) for one in (name, *again.get(name, ())))
    finally:
        prefetched.close()
