"""Every deliberate error of the package, under one base.

Text follows one pattern, on one line: `<where>: expected <what>, got <what>. <what to do>`.
"""

from importlib import import_module
from typing import Any


class SpectralSurgeryError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(SpectralSurgeryError, ValueError):
    """An option, name or setting that is not accepted."""


class ShapeError(SpectralSurgeryError, ValueError):
    """A tensor whose shape does not fit."""


class DomainError(SpectralSurgeryError, TypeError):
    """A spectrum where a spatial tensor is expected, the reverse, or two spectra that do not fit."""


class TargetError(SpectralSurgeryError):
    """A pattern that matches no module or tensor."""


class CausalityError(SpectralSurgeryError):
    """A mixer that would let a token see later tokens where it must not."""


class NotMergeableError(SpectralSurgeryError, ValueError):
    """An adapter whose effect is not one weight update, or a sum that is not finite."""


class UnmergeError(SpectralSurgeryError):
    """A merged checkpoint from which the exact base cannot be given back."""


class BackendError(SpectralSurgeryError):
    """An implementation that is not available for this device, dtype or installation."""


class CheckpointError(SpectralSurgeryError):
    """A checkpoint that is missing, damaged, hostile, or not to be overwritten."""


class FormatVersionError(CheckpointError):
    """A compressed checkpoint written in a format version this release does not read."""


class LimitError(CheckpointError):
    """A checkpoint that claims more memory than its limits allow."""


class HubError(SpectralSurgeryError):
    """A Hub repository that cannot be resolved, read or written."""


def required(module: str, purpose: str, install: str = "'spectral-surgery[hf]'") -> Any:
    """A module of a library that may not be there. Raises BackendError, with what to install, when it is not."""
    try:
        return import_module(module)
    except ImportError:
        library = module.partition(".")[0].replace("_", "-")
        raise BackendError(f"{library}: expected it to {purpose}, got none installed. pip install {install}") from None
