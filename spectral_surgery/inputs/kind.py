"""What a kind of data is: a row of the table of kinds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spectral_surgery.errors import ConfigError
from spectral_surgery.hf.models import load_tokenizer, longest_sequence
from spectral_surgery.inputs.model_input import ModelInput
from spectral_surgery.live.stacks import entry_of
from spectral_surgery.text.settings import TextData

Config = Mapping[str, object]
_TAKEN = {
    "pixel_values": "a folder of images",
    "input_features": "a folder of sound",
    "input_values": "a folder of sound",
    "input_ids": "text",
}


@dataclass(frozen=True)
class Reading:
    """What data is read with.

    Attributes:
        data: where it is.
        folder: of the model.
        config: its config.json.
        model: it, with or without weights.
        length: tokens of a sequence at most.
        causal: whether the model predicts the next token.
    """

    data: TextData
    folder: Path
    config: Config
    model: Any
    length: int
    causal: bool

    @cached_property
    def tokenizer(self) -> Any:
        """That of the model, with a padding token."""
        return load_tokenizer(self.folder, trust_remote_code=self.data.trust_remote_code)

    @cached_property
    def longest(self) -> int:
        """Tokens of a sequence at most, as far as the model can read."""
        return min(self.length, longest_sequence(self.model) or self.length)


@dataclass(frozen=True)
class Kind:
    """A row of KINDS.

    Attributes:
        summary: what it is, for errors.
        samples: usual number to calibrate on.
        unit: what is counted; tokens of a sequence are told only of sequences.
        empty: why there may be nothing, before the name of the model.
        auto_class: that the model is loaded with to be calibrated; empty for the one that config.json names.
        by_objective: whether it is healed with the class of its objective; else that of config.json.
        given: names of what a model of this kind takes, one of them.
        is_for: whether (a file or folder, config.json of a model) is of this kind.
        items: what stands by itself in the data, to be held out or not.
        inputs: what a model is run on, from some items; so many at most, all for 0.
    """

    name: str
    summary: str
    samples: int
    unit: str
    empty: str
    auto_class: str
    by_objective: bool
    given: frozenset[str]
    is_for: Callable[[Path, Config], bool]
    items: Callable[[Reading], Sequence[Any]]
    inputs: Callable[[Reading, Sequence[Any], int], list[ModelInput]]

    def items_of(self, reading: Reading) -> Sequence[Any]:
        """What stands by itself in the data.

        Raises:
            ConfigError: when the model takes another kind of data.
        """
        entry = entry_of(reading.model, self.given)[1]
        takes = inspect.signature(entry.forward).parameters
        wanted = [summary for name, summary in _TAKEN.items() if name in takes]
        if wanted and not self.given & takes.keys():
            raise ConfigError(
                f"{reading.data.file}: expected {wanted[0]} for {type(entry).__name__}, got {self.summary}."
            )
        return self.items(reading)

    def read(self, reading: Reading, samples: int) -> list[ModelInput]:
        """What a model is run on, from all of the data; so many at most, all for 0.

        Raises:
            ConfigError: when there is nothing that the model reads, or it does not know its tokens.
        """
        inputs = self.inputs(reading, self.items_of(reading), samples)
        if not inputs:
            raise ConfigError(
                f"{reading.data.file}: expected {self.summary} that the model reads, got none: {self.empty}"
                f" {reading.folder.name}."
            )
        return inputs
