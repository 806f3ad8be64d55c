"""y = x Wᵀ with W a spectrum: the transforms act on the activations, never on the weight."""

from __future__ import annotations

from spectral_surgery.matmul.code_blocks import Spectrum
from spectral_surgery.matmul.form import Form
from spectral_surgery.matmul.host_offload import HostMatrix
from spectral_surgery.matmul.level_form import LevelForm, transposed_form
from spectral_surgery.matmul.look_up import look_up, rows_of
from spectral_surgery.matmul.on_gpu import expert_products
from spectral_surgery.matmul.operator import dense_rows, form_matmul, form_matmul_transposed
from spectral_surgery.matmul.reference import spectral_matmul
from spectral_surgery.matmul.resident import RESIDENTS, resident_form, resident_forms
from spectral_surgery.matmul.row_blocks import block_streaming_matmul
from spectral_surgery.matmul.transfers import STREAM_BYTES

__all__ = [
    "RESIDENTS",
    "STREAM_BYTES",
    "Form",
    "HostMatrix",
    "LevelForm",
    "Spectrum",
    "block_streaming_matmul",
    "dense_rows",
    "expert_products",
    "form_matmul",
    "form_matmul_transposed",
    "look_up",
    "resident_form",
    "resident_forms",
    "rows_of",
    "spectral_matmul",
    "transposed_form",
]
