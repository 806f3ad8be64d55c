"""Model surgery and checkpoint compression in the frequency domain.

Shape letters used in all docstrings: B batch, T tokens, D model width, O out_features, I in_features, K kept
coefficients, P tile side, R rank, F = T // 2 + 1 frequency bins, N any count. Weights are [O, I] always.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

from spectral_surgery.after_import import when_imported

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """The module of each public name; loaded when first used, so that importing the package stays light."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    froms = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in froms for alias in node.names}


_HOMES = _homes()
__all__ = [*_HOMES]  # noqa: PLE0604 - names, from the stub


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == __name__:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# PEFT has to know our methods before it reads an adapter, and importing this package does not import PEFT.
when_imported("peft", f"{__name__}.hf.peft.plugin", "register")
# An unknown kind of compression would load as random weights with a mere warning.
when_imported("transformers.quantizers.auto", f"{__name__}.hf.quantizer.plugin", "register")
# Folders of FFTNet models are found by the Auto classes.
when_imported("transformers.models.auto.configuration_auto", f"{__name__}.hf.fftnet.models", "register_config")
when_imported("transformers.models.auto.modeling_auto", f"{__name__}.hf.fftnet.models", "register_models")
