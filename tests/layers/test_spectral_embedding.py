"""Rows of a compressed table equal those of the decompressed one, whatever the tiles and forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec import encoded as codec
from spectral_surgery.codec.encode import encode
from spectral_surgery.codec.encoded import Basis
from spectral_surgery.codec.rate import Target
from spectral_surgery.errors import ConfigError, ShapeError
from spectral_surgery.layers import SpectralEmbedding, SpectralLinear
from spectral_surgery.matmul import RESIDENTS

IDS = torch.tensor([[0, 299, 5], [63, 64, 5]])


def table() -> Tensor:
    return torch.randn(300, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_rows_are_those_of_the_dense_table(resident: str, axes: tuple[int, ...]) -> None:
    spectrum, _ = encode(table(), Target("bits", 2.0), Basis(axes=axes))
    embedding = SpectralEmbedding.from_quantized(spectrum, padding_idx=0, resident=resident)
    dense = embedding.to_dense()
    assert (dense.num_embeddings, dense.embedding_dim, dense.padding_idx) == (300, 48, 0)
    torch.testing.assert_close(embedding(IDS), dense(IDS))
    torch.testing.assert_close(embedding(IDS.int()), dense(IDS))
    assert embedding(torch.empty(0, dtype=torch.long)).shape == (0, 48)


@pytest.mark.parametrize("resident", RESIDENTS)
@pytest.mark.parametrize("axes", [(0, 1), (1,)])
def test_rows_of_many_frames(resident: str, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "FRAME_SIZE", 1)
    spectrum, _ = encode(table(), Target("bits", 2.0), Basis(axes=axes))
    assert len(spectrum.frames) == 5  # of 64 rows
    embedding = SpectralEmbedding.from_quantized(spectrum, resident=resident)
    torch.testing.assert_close(embedding(IDS), spectrum.to_dense()[IDS])


def test_dtype_follows_the_module() -> None:
    embedding = SpectralEmbedding.from_dense(nn.Embedding(300, 48, _weight=table()), max_error=0.1)
    assert embedding(IDS).dtype == torch.float32
    expected = embedding(IDS).to(torch.bfloat16)
    assert torch.equal(embedding.bfloat16()(IDS), expected)
    assert embedding.weight.dtype == torch.bfloat16
    assert "300, 48, bits_per_weight=8" in repr(embedding)
    assert "padding_idx=3" in repr(SpectralEmbedding(embedding.spectrum, 3))


def test_an_output_layer_can_share_the_table() -> None:
    embedding = SpectralEmbedding.from_dense(nn.Embedding(300, 48, _weight=table()), bits=4)
    head = SpectralLinear(embedding.spectrum)
    model = nn.ModuleList([embedding, head])
    assert sum(buffer.nbytes for buffer in model.buffers()) < 1.01 * 300 * 48
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(x), x @ embedding.weight.T, rtol=1e-4, atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"SpectralEmbedding:.*got 2, which rescales the table while it is used"):
        SpectralEmbedding.from_dense(nn.Embedding(300, 48, max_norm=2.0), bits=4)
    embedding = SpectralEmbedding.from_dense(nn.Embedding(300, 48, _weight=table()), bits=4)
    with pytest.raises(ShapeError, match="rows: 0 to 300 were asked for; expected 0 to 299"):
        embedding(torch.tensor([0, 300]))
