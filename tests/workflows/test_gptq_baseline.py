"""eval beside GPTQ: calibrated on the same text, block by block, its bytes counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from spectral_surgery.checkpoint.index import read_index
from spectral_surgery.checkpoint.reader import read_tensor
from spectral_surgery.errors import ConfigError
from spectral_surgery.workflows.evaluate import Beside, EvalData, evaluate
from spectral_surgery.workflows.gptq_baseline import gptq_weights
from spectral_surgery.workflows.layer_moments import CalibrationData
from tests.workflows.test_calibrate import KINDS, save_model
from tests.workflows.test_train import WORDS


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rows = torch.randint(0, 10, (80, 6), generator=torch.Generator().manual_seed(0)).tolist()
    file.write_text("\n".join(" ".join(WORDS[i] for i in row) for row in rows))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_blocks_are_quantised_as_they_are_stored(tmp_path: Path, kind: str, text: Path) -> None:
    source = save_model(kind, tmp_path / "model")
    index = read_index(source)
    wide = {name: info for name, info in index.tensors.items() if len(info.shape) == 2}
    found = gptq_weights(source, index, wide, CalibrationData(text, 32, 16), 4)
    assert len(found) == {"llama": 14, "bert": 12, "gpt2": 8}[kind]
    for name, made in found.items():
        original = read_tensor(index.tensors[name]).float()
        assert made.weight.shape == original.shape
        assert 0 < float((made.weight - original).norm() / original.norm()) < 0.3
        assert 4 < 8 * made.stored_bytes / original.numel() < 4.5
        rows = made.weight.T if kind == "gpt2" else made.weight
        assert len(rows[0, :128].unique()) <= 16  # the levels of a group


def test_the_table_has_gptq_beside_round_to_nearest(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    data, text_to_calibrate = EvalData(text=text), CalibrationData(text, 64, 16)
    report = evaluate(source, None, data, beside=Beside((), ("gptq3", "int3"), None, text_to_calibrate))
    rows = {row.model: row for row in report.models}
    own, nearest = rows["gptq3"], rows["int3 g128"]
    assert own.cost.bits_per_weight == pytest.approx(nearest.cost.bits_per_weight, rel=0.01)
    assert own.cost.relative_error > nearest.cost.relative_error  # of weights; what counts is outputs
    assert own.measures["cosine"] > 0.9


def test_gptq_without_text_is_refused(tmp_path: Path, text: Path) -> None:
    source = save_model("bert", tmp_path / "model")
    with pytest.raises(ConfigError, match="eval --baseline gptq4: needs text to calibrate on"):
        evaluate(source, None, EvalData(text=text), beside=Beside((), ("gptq4",)))
