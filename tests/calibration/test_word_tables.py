"""What errors in tables of words cost: as the whole model says, and kept sets that follow it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from spectral_surgery.calibration import word_tables as module
from spectral_surgery.calibration.block_streaming import ActivationStore
from spectral_surgery.calibration.kept_set import keep_best, kept_codes
from spectral_surgery.calibration.word_tables import output_costs, read_costs
from spectral_surgery.hf.models import load_model
from spectral_surgery.inputs.plain_text import token_inputs
from tests.calibration.test_layer_moments import TOKENS, opened, sequences


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_costs_are_those_of_the_whole_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", TOKENS)
    lazy, _ = opened(kind, tmp_path / "model")
    model, _ = load_model(tmp_path / "model", "AutoModelForCausalLM", dtype=torch.float32)
    head = model.get_output_embeddings().weight.detach()
    with closing(ActivationStore(1 << 20)) as store:
        costs = output_costs(lazy, token_inputs(sequences()), store, lambda: head, read=False)
    hidden, likely = [], []
    with torch.no_grad():
        for sequence in sequences():
            outputs = model(input_ids=torch.tensor([sequence]), output_hidden_states=True)
            hidden.append(outputs.hidden_states[-1][0].double())
            likely.append(outputs.logits[0].double().softmax(-1))
    x, rows = torch.cat(hidden), torch.cat(likely).sum(0)
    moment = x.T @ x
    torch.testing.assert_close(costs.moment.double(), moment / moment.diagonal().mean(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(costs.rows.double(), (rows / rows.mean() + 0.1) / 1.1, rtol=1e-3, atol=1e-4)


def test_words_that_are_read_count() -> None:
    costs = read_costs(token_inputs([[2, 2, 3], [2]]), (5, 4))
    counts = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0])
    torch.testing.assert_close(costs.rows, (counts / counts.mean() + 0.1) / 1.1)
    assert torch.equal(costs.moment, torch.eye(4))


def lost(weight: Tensor, kept: Tensor, moment: Tensor, rows: Tensor) -> float:
    error = (weight - kept).double()
    return float(((error @ moment.double()) * error).sum(1) @ rows.double())


@pytest.mark.parametrize("chunk", [8192, 64])
def test_kept_sets_follow_what_rows_count(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_surgery.calibration import kept_set

    monkeypatch.setattr(kept_set, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(300, 32, generator=generator), torch.randn(400, 32, generator=generator)
    x[:, 1:] += x[:, :-1]
    moment, rows = x.T @ x / 400, torch.rand(300, generator=generator) ** 8 + 1e-3
    codes = kept_codes(weight, moment, 0.2, rows)
    kept = codes.coefficients()
    assert torch.equal(codes.values != 0, kept != 0)
    assert float((kept != 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert lost(weight, kept, moment, rows) < 0.3 * lost(weight, keep_best(weight, moment, 0.2), moment, rows)


def test_rows_that_count_the_same_change_little() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(100, 32, generator=generator), torch.randn(400, 32, generator=generator)
    moment, rows = x.T @ x / 400, torch.ones(100)
    alike, plain = kept_codes(weight, moment, 0.2, rows).coefficients(), kept_codes(weight, moment, 0.2).coefficients()
    assert lost(weight, alike, moment, rows) == pytest.approx(lost(weight, plain, moment, rows), rel=0.02)
