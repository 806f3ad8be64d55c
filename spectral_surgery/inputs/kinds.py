"""The table of kinds of data, and which of them some data is; what goes on with it does not ask."""

from __future__ import annotations

from pathlib import Path

from spectral_surgery.errors import ConfigError
from spectral_surgery.inputs.chats import CHATS, IMAGE_CHATS
from spectral_surgery.inputs.images import IMAGES
from spectral_surgery.inputs.kind import Config, Kind
from spectral_surgery.inputs.pairs import PAIRS
from spectral_surgery.inputs.plain_text import TEXT
from spectral_surgery.inputs.sound import SOUND
from spectral_surgery.registry import Table
from spectral_surgery.text.objectives import OBJECTIVES, Objective, objective_of
from spectral_surgery.text.settings import TextData

SEQ_LENGTH = 256  # usual
KINDS: Table[Kind] = Table("kind of data", [PAIRS, IMAGE_CHATS, CHATS, TEXT, IMAGES, SOUND])


def kind_of(file: Path, config: Config) -> Kind:
    """The kind of a file or folder, for a model.

    Args:
        config: config.json of the model.

    Raises:
        ConfigError: when there is none.
    """
    for kind in KINDS.values():
        if kind.is_for(file, config):
            return kind
    raise ConfigError(f"{file}: expected text, or a folder of images or sound, got a folder with none of these.")


def objective_on(file: Path, config: Config) -> Objective:
    """What a model gives on some data: images alone are embedded, by the part that sees, also where another writes.

    Args:
        config: config.json of the model.

    Raises:
        ConfigError: as `kind_of`.
    """
    objective = objective_of(config)
    return OBJECTIVES["embeddings"] if objective.name == "tokens" and kind_of(file, config) is IMAGES else objective


def digest_of(data: TextData, config: Config) -> str:
    """What a model was calibrated on, for the manifest."""
    kind = kind_of(data.file, config)
    samples, length = data.samples or kind.samples, data.seq_length or SEQ_LENGTH
    tokens = f" x {length} tokens" if kind.unit == "sequences" else f" {kind.unit}"
    return f"{samples}{tokens} of {data.digest()}"
