"""The weight that linear layers and embeddings share: one or more resident spectra, row ranges of one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.layers.holder import FormHolder
from spectral_surgery.matmul import (
    RESIDENTS,
    Form,
    Spectrum,
    custom_op,
    dense_rows,
    form_matmul,
    form_matmul_transposed,
    recorded,
    resident_forms,
    rows_of,
)

Spectra = Spectrum | Sequence[Spectrum]


class SpectralWeight(nn.Module):
    """An [O, I] matrix W held as a spectrum; or as spectra of row ranges that no form can hold together.

    Its one parameter is empty, and in no state: models are asked for the dtype and device of their first parameter,
    and some have nothing but matrices.
    """

    def __init__(self, forms: Sequence[Form], resident: str, dtype: torch.dtype = torch.float32) -> None:
        """Hold resident forms.

        Args:
            forms: of consecutive row ranges of W.
            dtype: floating type that W counts as; ``.half()`` and its like change it.

        Raises:
            ShapeError: when row ranges differ in their number of columns, or there is none.
        """
        super().__init__()
        self.resident = resident
        widths = sorted({form.shape[1] for form in forms})
        if len(widths) != 1:
            raise ShapeError(
                f"spectra: expected one or more of the same width, got {len(forms)} with {widths} columns."
            )
        self.parts = nn.ModuleList(map(FormHolder, forms))
        self._like = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    @classmethod
    def from_spectra(cls, spectra: Spectra, resident: str = "int8", dtype: torch.dtype = torch.float32) -> Self:
        """Hold spectra in memory.

        Args:
            spectra: codes or stored frames, of W or of consecutive row ranges of it.
            dtype: floating type that W counts as.

        Raises:
            ConfigError: when the codes do not fit the resident form.
            ShapeError: when row ranges differ in their number of columns, or there is none.
        """
        parts = spectra if isinstance(spectra, Sequence) else [spectra]
        return cls(resident_forms(parts, resident), resident, dtype)

    @property
    def forms(self) -> list[Form]:
        """The resident forms, in order of rows."""
        return [cast(FormHolder, part).form for part in self.parts]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        forms = self.forms
        return sum(form.shape[0] for form in forms), forms[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that the matrix counts as."""
        return self._like.dtype

    @property
    def nbytes(self) -> int:
        """Resident bytes, every buffer counted."""
        return sum(cast(FormHolder, part).nbytes for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Resident bits per weight, every buffer counted."""
        rows, columns = self.shape
        return 8 * self.nbytes / (rows * columns)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + b: [..., I] to [..., O]; see `form_matmul`."""
        return form_matmul(x, self.forms, bias)

    def matmul_transposed(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W + b: [..., O] to [..., I]; see `form_matmul_transposed`."""
        return form_matmul_transposed(x, self.forms, bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W: [...] integers to [..., I] float32, from the tiles that hold them.

        Raises ShapeError when a row is not in the matrix, on a CPU; a GPU would have to wait for the answer, and stops
        as it does for nn.Embedding.
        """
        forms = self.forms
        if recorded.only_torch():
            return recorded.rows(ids, forms)
        if torch.compiler.is_compiling():
            return custom_op.rows(ids, forms)
        return rows_of(ids, forms)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W: [O, I], computed in float32 and cast once; None for `dtype`."""
        return torch.cat([block.to(dtype or self.dtype) for form in self.forms for block in dense_rows(form)])

    def _save_to_state_dict(self, *_: object) -> None:
        """Nothing: the parts have the spectrum."""

    def _load_from_state_dict(self, *_: object) -> None:
        """Nothing."""

    def extra_repr(self) -> str:
        """Resident form, transform and cost."""
        basis = self.forms[0].basis
        return (
            f"resident={self.resident}, transform={basis.transform}, tile={basis.tile},"
            f" bits_per_weight={self.bits_per_weight:.3g}"
        )


def compressed(weight: Tensor, targets: Mapping[str, float | None], basis: Basis, resident: str) -> SpectralWeight:
    """Compress a matrix [O, I] into a weight on its device.

    Args:
        targets: density, bits and max_error, of which one is not None.

    Raises:
        ConfigError: when none or several targets are given, or the codes do not fit the resident form.
    """
    RESIDENTS[resident]  # refuses unknown names before the work
    chosen = [(kind, value) for kind, value in targets.items() if value is not None]
    if len(chosen) != 1:
        raise ConfigError(f"from_dense: expected one of sparsity, bits and max_error, got {len(chosen)}. Use bits=4.")
    kind, value = chosen[0]
    target = Target(kind, value)  # type: ignore[arg-type]  # the keys above
    encoded, _ = encode(weight.detach().cpu(), target, basis, threads=torch.get_num_threads())
    return SpectralWeight.from_spectra(encoded, resident, weight.dtype).to(weight.device)
