"""export to GGUF: llama.cpp computes what transformers does, from the same tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from spectral_surgery.commands.decompress import decompress
from spectral_surgery.commands.export import export_model
from spectral_surgery.commands.export.gguf import GgufSettings
from spectral_surgery.commands.export.gguf_architectures import rotation_factors
from spectral_surgery.errors import CheckpointError, ConfigError
from tests.support import tokenizers_of
from tests.support.compressed import compressed_folder

gguf = pytest.importorskip("gguf", reason="not run: gguf is not installed")
TEXTS = (
    "The quick brown fox's 12345 codes, we'll see!",
    "x = f(41)\n\n  caf\u00e9 \u6771\u4eac \U0001f600",
    " two  spaces ",
)
BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = BASE | {"num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = DECODER | {"query_pre_attn_scalar": 16, "sliding_window": 512}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", DECODER | {"tie_word_embeddings": False}, "bytes"),
    "llama tied, with biases": ("llama", DECODER | {"attention_bias": True, "tie_word_embeddings": True}, "bytes"),
    "llama with biases of all layers": ("llama", DECODER | {"attention_bias": True, "mlp_bias": True}, "bytes"),
    "llama 3": ("llama", DECODER | {"rope_parameters": LLAMA3}, "qwen2"),
    "llama 2": ("llama", DECODER, "pieces"),
    "mistral": ("mistral", DECODER | {"sliding_window": None}, "pieces"),
    "qwen2": ("qwen2", DECODER, "qwen2"),
    "qwen3": ("qwen3", DECODER | {"head_dim": 32}, "qwen2"),
    "gemma": ("gemma", DECODER, "no prefix"),
    "gemma2": ("gemma2", GEMMA, "no prefix"),
    "gemma3": ("gemma3_text", GEMMA, "no prefix"),
}


def tokenizer(kind: str) -> Tokenizer:
    return {
        "bytes": tokenizers_of.byte_level,
        "qwen2": partial(tokenizers_of.byte_level, tokenizers_of.QWEN2),
        "pieces": tokenizers_of.sentence_piece,
        "no prefix": partial(tokenizers_of.sentence_piece, prefix=False),
        "words": tokenizers_of.word_piece,
    }[kind]()


def plain_model(folder: Path, kind: str, settings: dict[str, Any], tokens: str, *, more: int = 0) -> Path:
    """A random model with a tokenizer, written as transformers does; ``more`` rows of its embedding have no token."""
    import transformers

    made = tokenizer(tokens)
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    if tokens != "words":
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizers_of.save(made, folder, **special)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **settings}
    config = transformers.AutoConfig.for_model(kind, vocab_size=1, **settings)
    config.save_pretrained(folder)
    config.vocab_size = len(transformers.AutoTokenizer.from_pretrained(folder)) + more
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():  # of norms too, which are otherwise all the same
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.0 if "bias" in name or "gemma" in kind else 1.0, 0.3)
        model.save_pretrained(folder)
    return folder


def llama(file: Path, **settings: Any) -> Any:
    library = pytest.importorskip("llama_cpp", reason="not run: llama-cpp-python is not installed")
    return library.Llama(str(file), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **settings)


def theirs(file: Path, ids: list[int]) -> Tensor:
    """Logits of llama.cpp: [T, V]."""
    runner = llama(file, logits_all=True)
    runner.eval(ids)
    return torch.from_numpy(runner.scores[: len(ids)].copy())


def ours(folder: Path, ids: list[int]) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, name: str) -> None:
    import transformers

    folder = plain_model(tmp_path / "model", *MODELS[name])
    report = export_model(folder, tmp_path / "out", "gguf", GgufSettings("F32"))
    assert not report.tensors
    file = tmp_path / "out" / report.files[0]
    own = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = llama(file, vocab_only=True)
    for text in TEXTS:
        expected = own(text)["input_ids"]
        assert vocabulary.tokenize(text.encode(), add_bos=True, special=False) == expected, text
    ids = own(" ".join(TEXTS))["input_ids"][:100]
    expected = ours(folder, ids)
    found = theirs(file, ids)
    assert float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())


def test_an_encoder(tmp_path: Path) -> None:
    import transformers

    folder = plain_model(tmp_path / "model", "bert", BASE | {"max_position_embeddings": 128}, "words")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    report = export_model(folder, tmp_path / "out", "gguf", GgufSettings("F32"))
    assert any("pooler" in note for note in report.notes)
    runner = llama(tmp_path / "out" / report.files[0], embedding=True)
    own = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    for text in TEXTS[:1]:
        ids = own(text, return_tensors="pt")
        assert runner.tokenize(text.encode(), add_bos=True) == ids["input_ids"][0].tolist()
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model(**ids).last_hidden_state.mean(1)[0], dim=0)
        found = torch.nn.functional.normalize(torch.tensor(runner.embed(text)), dim=0)
        assert float(found @ expected) > 0.999


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.01), ("Q5_1", 0.06), ("Q4_0", 0.12), ("F16", 1e-3)])
def test_errors_are_those_of_the_file(tmp_path: Path, kind: Any, most: float) -> None:
    folder = plain_model(tmp_path / "model", *MODELS["llama"])
    report = export_model(folder, tmp_path / "out", "gguf", GgufSettings(kind), original=folder)
    assert 0 < report.export_error < most
    assert report.total_error == pytest.approx(report.export_error, rel=1e-6)
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / report.files[0]).tensors}
    source = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weight, found = source[name], stored["blk.1.attn_q.weight"]
    assert found.tensor_type.name == kind
    turned = weight.reshape(4, 2, 8, 64).transpose(1, 2).reshape(weight.shape)
    there = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
    told = next(tensor for tensor in report.tensors if tensor.name == name)
    assert float((there - turned).norm() / turned.norm()) == pytest.approx(told.export_error, rel=1e-4)
    assert stored["token_embd.weight"].tensor_type.name == ("Q8_0" if kind in ("Q5_1", "Q4_0") else kind)


def test_mixed_types_are_made_by_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="not run: llama-cpp-python is not installed")
    settings = MODELS["llama"][1] | {"hidden_size": 256, "intermediate_size": 256}
    folder = plain_model(tmp_path / "model", "llama", settings, "bytes")
    report = export_model(folder, tmp_path / "out", "gguf", GgufSettings("Q4_K_M"))
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["model-Q4_K_M.gguf"]
    assert {tensor.stored_as for tensor in report.tensors} >= {"Q4_K", "Q6_K"}
    assert 0.01 < report.export_error < 0.1


def test_a_compressed_model_is_decoded(tmp_path: Path) -> None:
    folder = compressed_folder("llama_tied", tmp_path)
    tokenizers_of.save(tokenizers_of.byte_level(size=96 + 256), folder)
    with pytest.raises(ConfigError, match=r"^token '.+': has the number \d+, and the embedding 96 rows"):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_decoded_weights_are_what_is_written(tmp_path: Path) -> None:
    from spectral_surgery.codec.rate import Target
    from spectral_surgery.commands.compress import compress
    from spectral_surgery.files.compressed.settings import CompressOptions

    folder = plain_model(tmp_path / "model", *MODELS["qwen2"])
    compress(folder, tmp_path / "small", CompressOptions(Target("bits", 4.0), min_weights=1000))
    report = export_model(tmp_path / "small", tmp_path / "out", "gguf", GgufSettings("F32"))
    decompress(tmp_path / "small", tmp_path / "decoded")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / report.files[0]).tensors}
    decoded = load_file(tmp_path / "decoded" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.allclose(torch.from_numpy(stored["blk.0.ffn_down.weight"].data.copy()), decoded, atol=1e-7)


def test_rows_without_a_token_and_columns_that_are_no_blocks(tmp_path: Path) -> None:
    settings = MODELS["llama"][1] | {"intermediate_size": 72}
    folder = plain_model(tmp_path / "model", "llama", settings, "bytes", more=7)
    report = export_model(folder, tmp_path / "out", "gguf")
    assert {t.stored_as for t in report.tensors if "down_proj" in t.name} == {"F16"}
    assert any(note.startswith("2 tensors are F16, whose columns are no blocks of 32") for note in report.notes)
    assert any(note.startswith("7 rows of the embedding have no token") for note in report.notes)
    rows = len(load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    assert llama(tmp_path / "out" / report.files[0], vocab_only=True).n_vocab() == rows


@pytest.mark.parametrize(
    ("kind", "settings", "tokens", "message"),
    [
        ("mixtral", DECODER, "bytes", "model_type mixtral: is none that is written as GGUF; expected llama, mistral"),
        ("llama", DECODER | {"hidden_act": "relu"}, "bytes", "hidden_act relu: expected silu"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 99}, "bytes", "query_pre_attn_scalar 99: expected 16"),
        ("llama", DECODER | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "bytes", "rope_type dynamic"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_named(
    tmp_path: Path, kind: str, settings: dict[str, Any], tokens: str, message: str
) -> None:
    folder = plain_model(tmp_path / "model", kind, settings, tokens)
    with pytest.raises(ConfigError, match=message):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_tokenizers_that_gguf_does_not_know_are_named(tmp_path: Path) -> None:
    from tokenizers import models

    folder = plain_model(tmp_path / "model", *MODELS["llama"], more=99)
    odd = {
        r"tokenizer: cuts texts by '\\\\d\+', which llama\.cpp has no name for": tokenizers_of.byte_level(r"\d+"),
        "tokenizer: is of the kind WordLevel, which GGUF is not written with": Tokenizer(
            models.WordLevel({"a": 0}, unk_token="a")
        ),
        "tokenizer: keeps capitals or accents": tokenizers_of.word_piece(lowercase=False),
    }
    for message, made in odd.items():
        tokenizers_of.save(made, folder)
        with pytest.raises(ConfigError, match=message):
            export_model(folder, tmp_path / "out", "gguf")


def test_tensors_without_a_place_and_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "model", *MODELS["llama"])
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(4, 4)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"^model\.extra\.weight: has no place in GGUF's architecture llama"):
        export_model(folder, tmp_path / "out", "gguf")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: has NaN or infinite"):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "lm_head.weight",
            r"^lm_head\.weight: expected a tensor of shape \[\d+, 64\] by config\.json of model, got none",
        ),
        (
            "model.norm.weight",
            r"^model\.norm\.weight: expected a tensor of shape \[64\] .* got none\. Use a whole checkpoint",
        ),
        ("model.layers.1.mlp.up_proj.weight", r"^model\.layers\.1\.mlp\.up_proj\.weight: .* got none"),
    ],
)
def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, gone: str, message: str) -> None:
    folder = plain_model(tmp_path / "model", *MODELS["llama"])
    tensors = load_file(folder / "model.safetensors")
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 3}, r"^model\.layers\.2\.\S+: expected a tensor of shape .* got none"),
        ({"intermediate_size": 128}, r"gate_proj\.weight: expected a tensor of shape \[128, 64\].* shape \[96, 64\]"),
        ({"vocab_size": 5}, r"^model\.embed_tokens\.weight: expected a tensor of shape \[5, 64\] by .* got shape"),
    ],
)
def test_a_configuration_of_another_model_is_named(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    folder = plain_model(tmp_path / "model", *MODELS["llama"])
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=message):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("kind", "settings", "tokens", "bias"),
    [
        ("qwen3", DECODER | {"head_dim": 32, "attention_bias": True}, "qwen2", "k_proj"),
        ("gemma", DECODER | {"attention_bias": True}, "no prefix", "k_proj"),
        ("gemma2", GEMMA | {"attention_bias": True}, "no prefix", "k_proj"),
    ],
)
def test_biases_that_llama_cpp_does_not_add_are_named(
    tmp_path: Path, kind: str, settings: dict[str, Any], tokens: str, bias: str
) -> None:
    folder = plain_model(tmp_path / "model", kind, settings, tokens)
    message = (
        rf"^model\.layers\.0\.self_attn\.{bias}\.bias: is a bias that llama\.cpp does not add in {kind}; expected none"
    )
    with pytest.raises(ConfigError, match=message):
        export_model(folder, tmp_path / "out", "gguf")
    assert not list(tmp_path.glob("out*"))


def test_biases_that_llama_cpp_adds_are_there(tmp_path: Path) -> None:
    settings = DECODER | {"attention_bias": True, "mlp_bias": True}
    folder = plain_model(tmp_path / "model", "llama", settings, "bytes")
    report = export_model(folder, tmp_path / "out", "gguf")
    stored = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / report.files[0]).tensors}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert {f"blk.1.{name}.bias" for name in names} <= stored


def test_chat_template_and_special_tokens_are_there(tmp_path: Path) -> None:
    folder = plain_model(tmp_path / "model", *MODELS["llama"])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    report = export_model(folder, tmp_path / "out", "gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / report.files[0]).fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert len(fields["tokenizer.ggml.merges"].contents()) > 50


def test_factors_of_llama_3_are_those_of_transformers() -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**DECODER, rope_parameters=LLAMA3)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = rotation_factors(config.to_dict())
    assert factors is not None
    assert torch.allclose(plain / factors, frequencies, rtol=1e-5)
