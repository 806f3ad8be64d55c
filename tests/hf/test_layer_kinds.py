"""Layers that are no plain nn.Linear or nn.Embedding stay spectra where they can, load right, and are saved again.

Scaled embeddings, linear layers with a forward of their own, experts of undecorated classes, layers that share the rows
of one fused tensor, and modules that somebody else holds too.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.decompress import decompress
from spectral_surgery.files.compressed.settings import CompressOptions
from spectral_surgery.files.index import read_index
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.quantizer.lazy_weight import Rows, Stack
from spectral_surgery.hf.quantizer.saving import spectral_experts, spectral_layers
from spectral_surgery.layers import SpectralWeight
from tests.support.compressed import LLAMA, TEXT, compressed_folder

transformers = pytest.importorskip("transformers")
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PAIR: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
MOE = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
DBRX = {
    "vocab_size": 96,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 1,
    "max_seq_len": 64,
    "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
}
LLAMA4 = LLAMA | {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "head_dim": 16,
    "intermediate_size_mlp": 72,
    "interleave_moe_layer_step": 1,
    "no_rope_layers": [1, 0],
}
LM, MASKED, S2S = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": (LM, LLAMA | {"head_dim": 16, "sliding_window": 8}),
    "bart": (S2S, PAIR),
    "marian": (S2S, PAIR),
    "falcon": (LM, {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}),
    "granitemoe": (LM, MOE),
    "jetmoe": (LM, MOE | {"kv_channels": 16}),
    "llama4_text": (LM, LLAMA4),
    "dbrx": (LM, DBRX),
    "nomic_bert": (MASKED, TEXT),
    "gte": (MASKED, TEXT | {"intermediate_size": 128}),
    "distilbert": (MASKED, {"vocab_size": 96, "dim": 64, "hidden_dim": 72, "n_layers": 1, "n_heads": 4}),
    "electra": (MASKED, TEXT | {"embedding_size": 32}),
}
EXPERTS = {"granitemoe": 4, "jetmoe": 8, "llama4_text": 4, "dbrx": 3}


@dataclass(frozen=True)
class Folders:
    """A model on disk: as it was, compressed, and decompressed."""

    auto: str
    source: Path
    ours: Path
    plain: Path

    def load(self, folder: Path) -> Any:
        return getattr(transformers, self.auto).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    made = {}
    for kind, (auto, settings) in KINDS.items():
        root = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings))
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)  # biases count
        made[kind] = save_both(model, auto, root)
    return made


def save_both(model: Any, auto: str, root: Path) -> Folders:
    model.save_pretrained(root / "source")
    compress(root / "source", root / "ours", CompressOptions(Target("bits", 4), min_weights=1000))
    decompress(root / "ours", root / "plain")
    return Folders(auto, root / "source", root / "ours", root / "plain")


@torch.no_grad()
def output(model: Any) -> Tensor:
    ids = torch.arange(3, 27).reshape(2, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids, **more).logits
    return logits


def relative(expected: Tensor, actual: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was decoded because somebody did more than multiply by a weight."""
    found: list[object] = []
    for kind in (Rows, Stack):
        dense = kind.dense
        monkeypatch.setattr(kind, "dense", lambda own, dense=dense: found.append(own) or dense(own))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_stays_compressed_and_gives_the_same_output(
    folders: dict[str, Folders], kind: str, decoded: list[object]
) -> None:
    model = folders[kind].load(folders[kind].ours)
    assert relative(output(folders[kind].load(folders[kind].plain)), output(model)) < 1e-5
    assert not decoded
    weights = {id(part): part for part in model.modules() if isinstance(part, SpectralWeight)}.values()
    report = model.hf_quantizer.load.checkpoint.manifest.report
    assert sum(weight.shape[0] * weight.shape[1] for weight in weights) == report.weights
    assert model.hf_quantizer.held_dense == {}
    assert len(spectral_experts(model)) == EXPERTS.get(kind, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_saves_the_same_bits_again(folders: dict[str, Folders], kind: str, tmp_path: Path) -> None:
    model = folders[kind].load(folders[kind].ours)
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folders[kind].ours), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert decompress(tmp_path / "again", tmp_path / "plain", verify=True).failures == ()
    assert torch.equal(output(model), output(folders[kind].load(tmp_path / "again")))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_is_the_plain_model(folders: dict[str, Folders], kind: str, tmp_path: Path) -> None:
    plain = folders[kind].load(folders[kind].plain)
    model = folders[kind].load(folders[kind].ours)
    model.dequantize()
    assert {name: type(part) for name, part in model.named_modules()} == {
        name: type(part) for name, part in plain.named_modules()
    }
    assert relative(output(plain), output(model)) < 1e-5
    model.save_pretrained(tmp_path)
    stored, expected = tensors_of(tmp_path), tensors_of(folders[kind].plain)
    assert stored.keys() == expected.keys()
    assert all(torch.allclose(stored[name], expected[name], atol=1e-6) for name in stored)
    assert relative(output(plain), output(folders[kind].load(tmp_path))) < 1e-5


@pytest.mark.parametrize("kind", ["gemma3_text", "falcon", "jetmoe", "llama4_text", "dbrx"])
def test_gradients_reach_the_inputs(folders: dict[str, Folders], kind: str) -> None:
    grads = []
    for folder in (folders[kind].plain, folders[kind].ours):
        embedded = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        folders[kind].load(folder)(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        grads.append(embedded.grad)
    assert relative(*grads) < 1e-4


@pytest.mark.parametrize(("kind", "leaf"), [("gemma3_text", "down_proj"), ("jetmoe", "input_linear")])
def test_layers_are_copied_and_pickled(folders: dict[str, Folders], kind: str, leaf: str) -> None:
    layers = folders[kind].load(folders[kind].ours).model
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = layers(ids).last_hidden_state
        assert torch.equal(expected, copy.deepcopy(layers)(ids).last_hidden_state)
    for part in (layers.embed_tokens, layers.layers[0].mlp.get_submodule(leaf)):
        again = pickle.loads(pickle.dumps(part))
        assert type(again) is type(part)
        assert torch.equal(again.weight.data, part.weight.data)


def test_a_scaled_embedding_shares_its_spectrum_with_the_head(folders: dict[str, Folders]) -> None:
    model = folders["gemma3_text"].load(folders["gemma3_text"].ours)
    embedding = model.get_input_embeddings()
    kind = type(folders["gemma3_text"].load(folders["gemma3_text"].plain).get_input_embeddings())
    assert isinstance(embedding, kind)
    assert isinstance(embedding, nn.Embedding)
    assert embedding.spectrum is model.lm_head.spectrum
    assert float(embedding.embed_scale) == 8.0
    with torch.no_grad():
        assert torch.allclose(embedding(torch.tensor([[5]])), 8 * embedding.weight[5], atol=1e-6)


def test_what_the_files_have_no_bias_for_is_initialised(folders: dict[str, Folders], tmp_path: Path) -> None:
    """And only that: the stored biases of heads stay."""
    stored = tensors_of(folders["distilbert"].plain)["vocab_projector.bias"]
    assert float(stored.norm()) > 1
    model = folders["distilbert"].load(folders["distilbert"].ours)
    assert torch.equal(model.vocab_projector.bias, stored)
    folder = compressed_folder("llama", tmp_path)
    biased = transformers.AutoModelForCausalLM.from_pretrained(folder, attention_bias=True)
    biases = [bias for name, bias in biased.named_parameters() if name.endswith("bias")]
    assert len(biases) == 8
    assert all(bias.eq(0).all() for bias in biases)


def test_tied_in_the_configuration_but_not_in_the_files(tmp_path: Path) -> None:
    """As transformers does with dense weights: two tensors that differ are not tied."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("llama", **LLAMA, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.tie_word_embeddings = True
    made = save_both(model, LM, tmp_path)
    assert "lm_head.weight.spectral_codes" in tensors_of(made.ours)
    loaded = made.load(made.ours)
    assert loaded.lm_head.spectrum is not loaded.model.embed_tokens.spectrum
    assert relative(output(made.load(made.plain)), output(loaded)) < 1e-5
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(made.ours).keys()
    loaded.dequantize()
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_modules_stay_the_objects_that_they_are(tmp_path: Path) -> None:
    """A head of Mask2Former keeps a list of Python's of its layers, and calls those."""
    torch.manual_seed(0)
    vision = transformers.AutoConfig.for_model("bert", **TEXT, architectures=["BertForMaskedLM"])
    model = transformers.BertForMaskedLM(vision)
    made = save_both(model, MASKED, tmp_path)

    class WithList(transformers.BertForMaskedLM):  # its base has no types
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layers = [self.bert.encoder.layer[0].intermediate.dense, self.bert.embeddings.word_embeddings]

    loaded = WithList.from_pretrained(made.ours)
    assert loaded.layers[0] is loaded.bert.encoder.layer[0].intermediate.dense
    assert loaded.layers[1] is loaded.bert.embeddings.word_embeddings
    assert dict(spectral_layers(loaded))["bert.encoder.layer.0.intermediate.dense"] is loaded.layers[0]
    assert loaded.layers[0](torch.ones(1, 64)).isfinite().all()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Lines that transformers' logger was given."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("transformers"), Handler()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_what_is_held_dense_is_said(tmp_path: Path, said: list[str]) -> None:
    torch.manual_seed(0)
    settings = TEXT | {"image_size": 32, "patch_size": 8}
    auto = "AutoModelForImageClassification"
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model("vit", **settings))
    made = save_both(model, auto, tmp_path)
    loaded = made.load(made.ours)
    held = loaded.hf_quantizer.held_dense
    assert held == {
        "vit.embeddings.position_embeddings": "ViTEmbeddings",
        "vit.embeddings.patch_embeddings.projection.weight": "Conv2d",
    }
    (line,) = [line for line in said if "held dense" in line]
    assert "2 of 14 compressed tensors" in line
    assert "1 of Conv2d" in line
    assert "1 of ViTEmbeddings" in line
    assert not any(loaded.get_parameter(name).requires_grad for name in held)


def test_nothing_is_said_where_nothing_is_dense(folders: dict[str, Folders], said: list[str]) -> None:
    folders["gemma3_text"].load(folders["gemma3_text"].ours)
    assert not [line for line in said if "held dense" in line]


def test_stacks_of_matrices_are_cut_at_matrices(folders: dict[str, Folders]) -> None:
    """By their shape, where their name does not tell: fewer of them than a side of each."""
    manifest = folders["jetmoe"].load(folders["jetmoe"].ours).hf_quantizer.load.checkpoint.manifest
    record = manifest.tensors["model.layers.0.mlp.input_linear.weight"]
    assert record.shape == (4, 144, 64)
    assert record.matrix == (576, 64)
    assert [part.rows for part in record.parts] == [(0, 144), (144, 288), (288, 432), (432, 576)]


def test_rows_that_cut_tiles_are_held_dense(tmp_path: Path) -> None:
    """Of q, k and v of 48 rows each, the second begins in the middle of a tile of 64."""
    torch.manual_seed(0)
    settings = TEXT | {"hidden_size": 48, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model("nomic_bert", **settings)
    made = save_both(transformers.AutoModelForMaskedLM.from_config(config), MASKED, tmp_path)
    model = made.load(made.ours)
    assert set(model.hf_quantizer.held_dense.values()) == {"Linear"}
    assert len(model.hf_quantizer.held_dense) == 6
    assert relative(output(made.load(made.plain)), output(model)) < 1e-5
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(made.ours), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.nomic_bert.layers[0].self_attn.k_proj.weight.requires_grad_(True).data.mul_(2)
    model.save_pretrained(tmp_path / "trained")
    assert torch.allclose(output(model), output(made.load(tmp_path / "trained")), atol=1e-5)


def test_a_divided_layer_that_was_replaced_is_saved_dense(folders: dict[str, Folders], tmp_path: Path) -> None:
    model = folders["nomic_bert"].load(folders["nomic_bert"].ours)
    attention = model.nomic_bert.layers[0].self_attn
    attention.k_proj = nn.Linear(64, 64, bias=attention.k_proj.bias is not None)
    model.save_pretrained(tmp_path)
    assert torch.allclose(output(model), output(folders["nomic_bert"].load(tmp_path)), atol=1e-5)
