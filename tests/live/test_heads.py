"""Heads of models of transformers: found outside the base model, and by the ends of names that PEFT looks for."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.files.peft.task import callable_task
from spectral_surgery.live.choose_targets import resolve
from spectral_surgery.live.heads import head_names, trained_heads, word_table
from spectral_surgery.live.skeleton import skeleton
from spectral_surgery.targets import ModuleTargets

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BART: dict[str, Any] = {
    **{"vocab_size": 16, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8},
    **{"decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}


def outline(config: str, model: str, settings: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
    return built


@pytest.mark.parametrize(
    ("config", "model", "settings", "task", "heads"),
    [
        ("BertConfig", "BertForSequenceClassification", SIZES, "SEQ_CLS", ("classifier",)),
        ("BartConfig", "BartForSequenceClassification", BART, "SEQ_CLS", ("classification_head",)),
        ("DebertaV2Config", "DebertaV2ForSequenceClassification", SIZES, "SEQ_CLS", ("pooler", "classifier")),
        ("LlamaConfig", "LlamaForSequenceClassification", SIZES, "SEQ_CLS", ("score",)),
        ("BertConfig", "BertForQuestionAnswering", SIZES, "QUESTION_ANS", ("qa_outputs",)),
        ("BertConfig", "BertForMaskedLM", SIZES, None, ()),
        ("LlamaConfig", "LlamaForCausalLM", SIZES, "CAUSAL_LM", ()),
    ],
)
def test_what_is_trained_whole(
    config: str, model: str, settings: dict[str, Any], task: str | None, heads: tuple[str, ...]
) -> None:
    built = outline(config, model, settings)
    assert trained_heads(built, task) == heads
    assert {name.split(".")[0] for name in head_names(built)} >= set(heads)


def test_heads_without_a_configuration_are_told_by_name() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        "model.q.weight": (8, 8),
        "pre_classifier.weight": (8, 8),
        "classifier.out.weight": (2, 8),
        "lm_head.weight": (9, 8),
    }
    assert trained_heads(skeleton(shapes), "TOKEN_CLS") == ("pre_classifier", "classifier")
    assert head_names(skeleton(shapes)) == {"classifier", "lm_head"}


@pytest.mark.parametrize(
    ("config", "model", "settings", "task", "expected"),
    [
        ("BertConfig", "BertModel", SIZES, "FEATURE_EXTRACTION", "FEATURE_EXTRACTION"),
        ("LlamaConfig", "LlamaForCausalLM", SIZES, "CAUSAL_LM", "CAUSAL_LM"),
        ("BartConfig", "BartForConditionalGeneration", BART, "SEQ_2_SEQ_LM", "SEQ_2_SEQ_LM"),
        ("BartConfig", "BartForConditionalGeneration", BART, None, None),
        ("WhisperConfig", "WhisperForConditionalGeneration", BART | {"pad_token_id": 0}, "SEQ_2_SEQ_LM", None),
        ("ViTConfig", "ViTModel", {k: v for k, v in SIZES.items() if k != "vocab_size"}, "FEATURE_EXTRACTION", None),
    ],
)
def test_only_a_task_by_which_peft_can_call_the_model(
    config: str, model: str, settings: dict[str, Any], task: str | None, expected: str | None
) -> None:
    takes = inspect.signature(outline(config, model, settings).forward).parameters
    assert callable_task(task, takes) == expected


def test_modules_to_save_are_all_that_peft_saves_for_the_same_words() -> None:
    sizes = {"dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2}
    model = outline("DistilBertConfig", "DistilBertForSequenceClassification", sizes)
    method = METHODS["lora"]
    asked = ModuleTargets("all-linear", modules_to_save=("classifier",))
    targets = resolve(model, AdapterSpec(method, method.config(r=1), asked)).targets
    assert targets.modules_to_save == ("classifier", "pre_classifier")
    assert not any(targets.matches(name) for name in ("classifier", "pre_classifier"))


def test_the_table_of_words() -> None:
    model = outline("BertConfig", "BertModel", SIZES)
    assert word_table(model) is model.get_submodule("embeddings.word_embeddings")


def test_a_model_that_does_not_say_where_its_table_is_has_none() -> None:
    sizes = {"hidden_size": 16, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    model = outline("FastSpeech2ConformerConfig", "FastSpeech2ConformerModel", sizes)
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert word_table(model) is None
    assert word_table(nn.Linear(2, 2)) is None
