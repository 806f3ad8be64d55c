"""Sums of second moments are those of the definition, at every width and for every kind of rows."""

from __future__ import annotations

import pytest
import torch

from spectral_surgery.live.moments import SecondMoment


@pytest.mark.parametrize("width", [1, 5, 128, 129, 300, 1024, 1100])  # below, at and above the widths of strips
def test_a_sum_is_that_of_the_definition(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(2, 7, width, generator=generator), torch.randn(30, width, generator=generator)]
    rows = torch.cat([batch.reshape(-1, width) for batch in batches]).double()
    moment = SecondMoment(width, torch.device("cpu"))
    moment.add(batches[0])
    moment.whole()  # asked for in between, it does no harm
    moment.add(batches[1])
    whole = moment.whole()
    assert whole.dtype == torch.float32
    assert torch.equal(whole, whole.T) or torch.allclose(whole, whole.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_rows_of_other_dtypes_are_summed_in_float32() -> None:
    rows = torch.full((4096, 3), 0.1, dtype=torch.bfloat16)
    moment = SecondMoment(3, rows.device)
    moment.add(rows)
    expected = torch.full((3, 3), 4096 * float(rows[0, 0]) ** 2)
    torch.testing.assert_close(moment.whole(), expected, rtol=1e-4, atol=0.0)  # 2^-24 a term; of bfloat16 it were 0.1
