"""Merging what PEFT's LoRA can be: the weights are PEFT's own, and the base comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.commands.export import export
from spectral_surgery.commands.merge import MergeReport, merge
from spectral_surgery.commands.merge.unmerge import unmerge
from spectral_surgery.errors import CheckpointError, ConfigError, NotMergeableError, UnmergeError
from spectral_surgery.files.index import read_index
from spectral_surgery.files.merge_record import FOLDER, RECORD_FILE
from spectral_surgery.files.peft.adapter_files import read_adapter, write_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.live.attach import inject, load, state_of
from spectral_surgery.targets import ModuleTargets
from tests.support.peft_lora import IDS, Merged, adapted, answer, build

LLAMA = ("LlamaForCausalLM", {"num_key_value_heads": 2})
TIED = ("LlamaForCausalLM", {"num_key_value_heads": 2, "tie_word_embeddings": True})
BIASED = ("LlamaForCausalLM", {"num_key_value_heads": 2, "attention_bias": True})
GPT2 = ("GPT2LMHeadModel", {"tie_word_embeddings": False, "n_positions": 32})
BERT = ("BertForMaskedLM", {"max_position_embeddings": 32})
VIT = ("ViTForImageClassification", {"image_size": 32, "patch_size": 8, "num_labels": 3})
MOE = {"head_dim": 8, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
QWEN = ("Qwen3MoeForCausalLM", {**MOE, "decoder_sparse_step": 1})
OSS = ("GptOssForCausalLM", {**MOE, "intermediate_size": 32, "num_local_experts": 4})
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
CONVOLUTION = {"conv_dim": (16,), "conv_kernel": (5,), "conv_stride": (3,), "num_conv_pos_embeddings": 8}
WAVES = ("Wav2Vec2ForCTC", {**CONVOLUTION, "feat_extract_norm": "layer", "num_conv_pos_embedding_groups": 4})
SOUND = {"input_values": torch.linspace(-1, 1, 200)[None]}
Model = tuple[str, dict[str, Any]]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: read_tensor(info) for name, info in read_index(folder).tensors.items()}


def peft(folder: Path, model: Model, lora: dict[str, Any], grow: int = 0) -> Merged:
    inputs = PIXELS if model is VIT else SOUND if model is WAVES else None
    return adapted(folder, build(model[0], **model[1]), inputs, lora, grow)


def merged_as_peft_does(folder: Path, model: Model, lora: dict[str, Any], grow: int = 0) -> tuple[MergeReport, Merged]:
    """Merge, compare weights, configuration and outputs with PEFT's, and unmerge."""
    import transformers

    theirs = peft(folder, model, lora, grow)
    report = merge(theirs.base, [theirs.adapter], folder / "merged")
    ours, info = getattr(transformers, model[0]).from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(info.values())
    assert getattr(ours.config, "tie_word_embeddings", None) == theirs.tied
    own = ours.state_dict()
    for name, tensor in theirs.weights.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=2e-6 * float(tensor.abs().max()), msg=name)
    assert_given_back(folder, theirs.base)
    return report, theirs


def assert_given_back(folder: Path, base: Path) -> None:
    unmerge(folder / "merged", folder / "again")
    before, after = tensors_of(base), tensors_of(folder / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    assert (folder / "again" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        pytest.param(LLAMA, {"target_modules": ["embed_tokens", "lm_head"]}, id="embedding and head"),
        pytest.param(LLAMA, {"target_modules": ["q_proj", "k_proj"], "r": 50}, id="rank above the sides"),
        pytest.param(LLAMA, {"target_modules": ["q_proj"], "fan_in_fan_out": True}, id="a flag that is wrong"),
        pytest.param(VIT, {"target_modules": ["projection", "classifier"], "r": 4}, id="convolution"),
        pytest.param(WAVES, {"target_modules": ["0.conv"], "use_dora": True}, id="convolution along one axis"),
        pytest.param(VIT, {"target_modules": ["projection"], "use_dora": True}, id="DoRA of a convolution"),
        pytest.param(VIT, {"target_modules": ["projection"], "lora_bias": True}, id="lora_bias of a convolution"),
        pytest.param(LLAMA, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, id="DoRA"),
        pytest.param(
            LLAMA, {"target_modules": ["q_proj"], "use_dora": True, "use_rslora": True}, id="DoRA with rsLoRA"
        ),
        pytest.param(GPT2, {"target_modules": ["c_attn", "attn.c_proj"], "use_dora": True}, id="DoRA of Conv1D"),
        pytest.param(GPT2, {"target_modules": ["c_attn", "attn.c_proj", "lm_head"]}, id="Conv1D beside Linear"),
        pytest.param(BIASED, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, id="lora_bias"),
        pytest.param(
            BIASED, {"target_modules": ["q_proj"], "lora_bias": True, "bias": "lora_only"}, id="both kinds of bias"
        ),
        pytest.param(LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]}, id="trained tokens"),
        pytest.param(
            LLAMA,
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2]}},
            id="trained tokens of two modules",
        ),
        pytest.param(QWEN, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}, id="experts stored one by one"),
        pytest.param(
            QWEN,
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.down_proj"],
                "use_rslora": True,
                "rank_pattern": {"down_proj": 3},
            },
            id="one of two parameters",
        ),
        pytest.param(
            OSS,
            {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
            id="experts [E, I, O]",
        ),
        pytest.param(
            OSS, {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}, id="square experts [E, I, O]"
        ),
        pytest.param(
            LLAMA,
            {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
            id="a matrix as a parameter",
        ),
    ],
)
def test_weights_are_those_of_peft(tmp_path: Path, model: Model, lora: dict[str, Any]) -> None:
    report, _ = merged_as_peft_does(tmp_path, model, lora)
    assert [report.tied, report.untied, report.resized] == [{}, (), {}]


@pytest.mark.parametrize("method", ["fourierft", "spectral_delta"])
def test_square_matrices_of_conv1d_beside_linear_with_a_method_that_has_no_shapes(tmp_path: Path, method: str) -> None:
    from transformers import GPT2LMHeadModel

    model = build(GPT2[0], **{**GPT2[1], "vocab_size": 32})
    model.save_pretrained(tmp_path / "base")
    row = METHODS[method]
    settings = row.config(n_frequency=40, **({"scaling": 300.0} if method == "fourierft" else {}))
    spec = inject(model, AdapterSpec(row, settings, ModuleTargets(("attn.c_proj", "lm_head"))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    write_adapter(state_of(model, spec), tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    inputs = {"input_ids": IDS}
    merged = answer(GPT2LMHeadModel.from_pretrained(tmp_path / "merged"), inputs)
    torch.testing.assert_close(merged, answer(model, inputs), rtol=1e-4, atol=1e-4)
    assert_given_back(tmp_path, tmp_path / "base")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_update_of_one_of_two_tied_modules_changes_both_and_is_said(tmp_path: Path, target: str) -> None:
    report, theirs = merged_as_peft_does(tmp_path, TIED, {"target_modules": [target]})
    assert report.to_json()["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not torch.allclose(theirs.live, theirs.merged, atol=0.1)  # as PEFT warns


def test_updates_of_both_tied_modules_are_added(tmp_path: Path) -> None:
    merged_as_peft_does(tmp_path, TIED, {"target_modules": ["embed_tokens", "lm_head"]})


def test_one_update_for_both_tied_modules_is_added_once(tmp_path: Path) -> None:
    """PEFT's merge adds it twice, so that its own outputs change; ours stay those of the live model."""
    from transformers import LlamaForCausalLM

    theirs = peft(tmp_path, TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True})
    merge(theirs.base, [theirs.adapter], tmp_path / "merged")
    ours = answer(LlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(ours, theirs.live, rtol=1e-4, atol=1e-3)
    assert_given_back(tmp_path, theirs.base)


@pytest.mark.parametrize(
    ("saved", "tying", "untied"),
    [
        (["embed_tokens"], False, True),
        (["lm_head"], False, True),
        (["embed_tokens", "lm_head"], False, True),
        (["embed_tokens"], True, False),
    ],
)
def test_saved_modules_of_a_tied_base(tmp_path: Path, saved: list[str], tying: bool, untied: bool) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": saved, "ensure_weight_tying": tying}
    report, theirs = merged_as_peft_does(tmp_path, TIED, lora)
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    assert report.to_json()["untied"] == (names if untied else [])
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is not untied
    torch.testing.assert_close(theirs.live, theirs.merged, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Names have one prefix less; in the whole model, the output layer is tied to what it changes."""
    from transformers import LlamaForCausalLM, LlamaModel

    whole = build(TIED[0], **TIED[1])
    whole.save_pretrained(tmp_path / "whole")
    inner = LlamaModel.from_pretrained(tmp_path / "whole")
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    theirs = adapted(tmp_path, inner, None, lora)
    report = merge(tmp_path / "whole", [theirs.adapter], tmp_path / "merged")
    assert report.untied == ("lm_head.weight", "model.embed_tokens.weight")
    after = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    torch.testing.assert_close(after["model.embed_tokens.weight"], theirs.weights["embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], whole.state_dict()["lm_head.weight"])
    assert_given_back(tmp_path, tmp_path / "whole")


def test_all_ties_of_a_model_come_apart_together(tmp_path: Path) -> None:
    lora = {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}
    report, _ = merged_as_peft_does(tmp_path, BERT, lora)
    assert "cls.predictions.decoder.bias" in report.untied


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 65]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_embeddings_that_were_resized(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    report, _ = merged_as_peft_does(tmp_path, TIED if tied else LLAMA, lora, grow=3)
    assert report.to_json()["resized"]["model.embed_tokens.weight"] == [64, 67]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 67


def test_a_resized_embedding_without_its_output_layer_is_refused(tmp_path: Path) -> None:
    theirs = peft(tmp_path, LLAMA, {"target_modules": ["q_proj"]}, grow=3)
    file = theirs.adapter / "adapter_model.safetensors"
    save_file({name: own for name, own in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(
        CheckpointError, match=r"embed_tokens.* another number of rows, and lm_head\.weight is not in the"
    ):
        merge(theirs.base, [theirs.adapter], tmp_path / "merged")


def test_dora_in_bfloat16_and_its_small_record(tmp_path: Path) -> None:
    model = build(LLAMA[0], torch.bfloat16, **LLAMA[1])
    theirs = adapted(tmp_path, model, None, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True})
    report = merge(theirs.base, [theirs.adapter], tmp_path / "merged")
    for name, tensor in tensors_of(tmp_path / "merged").items():
        expected = theirs.weights[name]
        torch.testing.assert_close(tensor, expected, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))
    assert report.undo_bytes < 0.8 * report.merged_bytes
    assert_given_back(tmp_path, theirs.base)


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_dora_beside_another_adapter_is_scaled_in_order(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    one = peft(tmp_path, LLAMA, {"target_modules": ["q_proj"], "use_dora": True})
    two = peft(tmp_path / "two", LLAMA, {"target_modules": ["q_proj"], "r": 3})
    three = peft(tmp_path / "three", LLAMA, {"target_modules": ["q_proj"], "use_dora": True})
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(one.base), one.adapter, "one")
    for name, own in (("two", two), ("three", three)):
        model.load_adapter(own.adapter, name)
    theirs = model.merge_and_unload(adapter_names=["one", "two", "three"]).state_dict()
    merge(one.base, [one.adapter, two.adapter, three.adapter], tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(tensors_of(tmp_path / "merged")[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert_given_back(tmp_path, one.base)
    with pytest.raises(ConfigError, match=r"--weights: expected 1 for an adapter.*got 0\.5"):
        merge(one.base, [one.adapter], tmp_path / "half", weights=[0.5])


def test_a_record_that_lost_factors_of_dora_is_refused(tmp_path: Path) -> None:
    theirs = peft(tmp_path, LLAMA, {"target_modules": ["q_proj"], "use_dora": True})
    merge(theirs.base, [theirs.adapter], tmp_path / "merged")
    record = tmp_path / "merged" / FOLDER / RECORD_FILE
    body = json.loads(record.read_text())
    for row in body["tensors"].values():
        row["nbytes"] = 9
    record.write_text(json.dumps(body))
    with pytest.raises(UnmergeError, match=r"model\.layers\.0\.self_at.*got a tensor, or a record, that was changed"):
        unmerge(tmp_path / "merged", tmp_path / "again")


def test_a_bias_for_a_base_that_has_none(tmp_path: Path) -> None:
    theirs = peft(tmp_path, BIASED, {"target_modules": ["q_proj"], "lora_bias": True})
    build(*LLAMA[:1], **LLAMA[1]).save_pretrained(tmp_path / "plain")
    with pytest.raises(NotMergeableError, match=r"model\.layers\.0\.self_attn\.q_proj:.*got one without"):
        merge(tmp_path / "plain", [theirs.adapter], tmp_path / "merged")


def test_trained_tokens_that_do_not_fit(tmp_path: Path) -> None:
    theirs = peft(tmp_path, LLAMA, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]})
    file = theirs.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "trainable_token_indices": [5, 64]}))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens\.weight is \[64, 32\], in the adapter 2 rows up to 64 of 32"
    ):
        merge(theirs.base, [theirs.adapter], tmp_path / "merged")
    file.write_text(json.dumps({**config, "trainable_token_indices": [5]}))
    with pytest.raises(CheckpointError, match=r"expected a row for each of.*got \[5\], and shape \[2, 32\] of"):
        read_adapter(theirs.adapter)


def test_parameters_that_the_base_does_not_have(tmp_path: Path) -> None:
    theirs = peft(tmp_path, QWEN, {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]})
    build(*LLAMA[:1], **LLAMA[1]).save_pretrained(tmp_path / "llama")
    with pytest.raises(
        CheckpointError, match=r"mlp\.experts\.down_proj: no such parameters of the base have the shapes"
    ):
        merge(tmp_path / "llama", [theirs.adapter], tmp_path / "merged")


def test_a_live_model_and_other_forms_refuse_what_only_merge_takes(tmp_path: Path) -> None:
    theirs = peft(tmp_path, LLAMA, {"target_modules": ["q_proj"], "use_dora": True, "trainable_token_indices": [1]})
    state = read_adapter(theirs.adapter)
    with pytest.raises(ConfigError, match="DoRA, trainable_token_indices, which a model here has no place for"):
        load(build(LLAMA[0], **LLAMA[1]), state)
    with pytest.raises(ConfigError, match="has DoRA, trainable_token_indices, which other forms have no place for"):
        export(theirs.adapter, tmp_path / "out", "lora")


def test_a_live_model_takes_lora_of_peft_on_embeddings_and_compares_the_stored_base(tmp_path: Path) -> None:
    theirs = peft(tmp_path, LLAMA, {"target_modules": ["embed_tokens", "lm_head"]})
    model = build(LLAMA[0], **LLAMA[1])
    load(model, read_adapter(theirs.adapter))
    torch.testing.assert_close(answer(model, {"input_ids": IDS}), theirs.live, rtol=1e-4, atol=1e-4)
    other = build(LLAMA[0], **LLAMA[1])
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    with pytest.raises(
        CheckpointError,
        match=r"got another: lm_head\.base_layer\.weight differs",
    ):
        load(other, read_adapter(theirs.adapter))
