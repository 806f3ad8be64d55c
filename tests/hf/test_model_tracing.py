"""torch.export, torch.jit.trace and torch.compile record compressed models as they record dense ones."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectral_surgery
from tests.support.compressed import compressed_folder

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LANGUAGE = ("llama", "gpt2", "bert")
IDS, OTHER = torch.arange(3, 27).reshape(2, 12), torch.arange(3, 33).reshape(3, 10)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Compressed folders of small language models."""
    families = (*LANGUAGE, "qwen3_moe")
    return {family: compressed_folder(family, tmp_path_factory.mktemp(family)) for family in families}


class Logits(nn.Module):
    """A language model as a function of tokens."""

    def __init__(self, model: Any) -> None:
        """Put it around a model."""
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, vocabulary]."""
        settings = {} if self.model.config.model_type == "bert" else {"use_cache": False}
        logits: Tensor = self.model(ids, **settings).logits
        return logits


def load(folder: Path, resident: str = "auto") -> Logits:
    return Logits(spectral_surgery.load_compressed(folder, resident)).requires_grad_(requires_grad=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*LANGUAGE, "qwen3_moe"])
def test_export(folders: dict[str, Path], family: str) -> None:
    """With any number of sequences and tokens; the graph needs nothing but torch."""
    model, stored = load(folders[family]), io.BytesIO()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=60)}
    with torch.no_grad():  # torch cannot store graphs that switch gradients off, as Llama's rotation does
        program = torch.export.export(model, (IDS,), dynamic_shapes=(sizes,), strict=False)
    assert not [node for node in program.graph.nodes if "spectral_surgery" in str(node.target)]
    torch.export.save(program, stored)
    stored.seek(0)
    for recording in (program.module(), torch.export.load(stored).module()):
        for ids in (IDS, OTHER):
            assert torch.allclose(recording(ids), model(ids), atol=1e-5)


@pytest.mark.parametrize("family", [*LANGUAGE, "qwen3_moe"])
def test_trace(folders: dict[str, Path], family: str) -> None:
    """Without a warning that comes from us, and for other sizes."""
    model = load(folders[family])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recording = torch.jit.trace(model, (IDS,))
    assert not [warning for warning in said if "spectral_surgery" in warning.filename]
    for ids in (IDS, OTHER):
        assert torch.allclose(recording(ids), model(ids), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend", "whole"),
    [("llama", "eager", True), ("gpt2", "aot_eager", True), ("bert", "aot_eager", True)],
)
def test_compile(folders: dict[str, Path], family: str, backend: str, whole: bool) -> None:
    """As one graph, unless experts ask who goes where."""
    torch._dynamo.reset()
    model = load(folders[family])
    compiled = torch.compile(model, backend=backend, fullgraph=whole)
    assert torch.allclose(compiled(IDS), model(IDS), atol=1e-5)
