"""Models whose blocks autograd cannot follow are refused by healing, in one line that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.settings import Healing
from spectral_surgery.errors import SpectralSurgeryError, TargetError
from spectral_surgery.files.compressed.settings import CompressOptions
from tests.support.tiny import save_tokenizer

pytest.importorskip("transformers")

import transformers

from spectral_surgery.commands.heal import heal
from spectral_surgery.text.settings import TextData
from spectral_surgery.training.settings import DistillSettings

FEW = DistillSettings(steps=2, eval_every=2, warmup_steps=1)
REFUSED = r"^heal: expected a model that autograd can follow, got .*Compress it without healing\.$"
INSIDE = ("*attention*weight", "*dense*weight")


def save_reformer(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(
        vocab_size=12, hidden_size=64, num_attention_heads=2, attention_head_size=32, feed_forward_size=128,
        attn_layers=["local", "local"], local_attn_chunk_length=4, axial_pos_embds=False, is_decoder=True,
        pad_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    transformers.ReformerModelWithLMHead(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("include", [(), INSIDE], ids=["with embeddings", "blocks alone"])
@pytest.mark.parametrize("keep", ["important", "largest"])
def test_blocks_with_a_backward_pass_of_their_own(tmp_path: Path, text: Path, keep: Any, include: Any) -> None:
    source = save_reformer(tmp_path / "model")
    options = CompressOptions(Target("density", 0.3), include=include, min_weights=1)
    with pytest.raises(TargetError, match=REFUSED):
        compress(source, tmp_path / "out", options, heal=Healing(TextData(text, 0, 16, 16), FEW, keep))


def test_block_after_block(tmp_path: Path, text: Path) -> None:
    source = save_reformer(tmp_path / "model")
    compress(source, tmp_path / "sparse", CompressOptions(Target("density", 0.3), min_weights=1))
    with pytest.raises(SpectralSurgeryError):
        heal(
            tmp_path / "sparse",
            source,
            tmp_path / "out",
            TextData(text, 0, 16, 16),
            FEW,
            blocks=True,
        )


@pytest.mark.parametrize("include", [(), ("*layer*weight",)], ids=["with embeddings", "blocks alone"])
@pytest.mark.parametrize("keep", ["important", "largest"])
def test_blocks_under_no_grad(
    tmp_path: Path, text: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, keep: Any, include: Any
) -> None:
    layer = transformers.models.bert.modeling_bert.BertLayer
    monkeypatch.setattr(layer, "forward", torch.no_grad()(layer.forward))
    options = CompressOptions(Target("density", 0.3), include=include, min_weights=1)
    with pytest.raises(TargetError, match=REFUSED):
        compress(bert, tmp_path / "out", options, heal=Healing(TextData(text, 0, 16, 16), FEW, keep))
    assert not (tmp_path / "out").exists()
