"""A model beside others, one at a time: on text, and on whatever else models are run on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.errors import ConfigError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.hf.models import load_any, load_model, load_tokenizer
from spectral_surgery.inputs.kind import Kind, Reading
from spectral_surgery.inputs.kinds import kind_of, objective_on
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.inputs.plain_text import TEXT
from spectral_surgery.inputs.scores import compare
from spectral_surgery.live.attach import load
from spectral_surgery.text.scores import score
from spectral_surgery.text.settings import EvalData, TextData


class Scores:
    """Holds model A in memory, and one other at a time beside it."""

    def __init__(self, a: Path, data: EvalData, device: str) -> None:
        """Load A.

        Raises:
            ConfigError: when there is nothing in the data that A reads.
        """
        self._folder, self._data, self._device = a, data, device
        self._config = read_index(a).config
        self._kind = kind_of(data.text, self._config) if data.text is not None else TEXT
        if self._kind is not TEXT and data.sts is not None:
            raise ConfigError(f"eval --sts: expected a model that embeds sentences, got one of {self._kind.summary}.")
        self._causal = data.text is not None and is_causal(self._config)
        self._model = self._load(a)
        self._inputs = [] if self._kind is TEXT else self._read(self._kind)

    def measures(self, other: Path | None = None, adapter: Path | None = None) -> dict[str, float]:
        """Measures of A, of another model, and of both, by name; see `score` and `compare`."""
        models = [self._model]
        if other is not None:
            model = self._load(other)
            if adapter is not None:
                load(model, read_adapter(adapter))
            models.append(model.to(self._device))
        if self._kind is TEXT or self._data.text is None:
            return score(models, self._tokenizer, self._data, causal=self._causal)
        objective, device = objective_on(self._data.text, self._config).name, self._device
        return compare(models, self._inputs, objective, tokenizer=lambda: self._tokenizer, device=device)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._folder, trust_remote_code=self._data.trust_remote_code)

    def _load(self, folder: Path) -> Any:
        trust = self._data.trust_remote_code
        if self._kind is not TEXT:
            return load_any(folder, dtype=torch.float32, trust_remote_code=trust).to(self._device)
        auto_class = "AutoModelForCausalLM" if self._causal else "AutoModel"
        return load_model(folder, auto_class, dtype=torch.float32, trust_remote_code=trust)[0].to(self._device)

    def _read(self, kind: Kind) -> list[ModelInput]:
        data = self._data
        if data.text is None:
            return []
        read = TextData(data.text, data.samples, unreadable=data.unreadable, trust_remote_code=data.trust_remote_code)
        reading = Reading(read, self._folder, self._config, self._model, data.seq_length, self._causal)
        return kind.read(reading, data.samples)
