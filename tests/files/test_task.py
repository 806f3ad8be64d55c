"""What a model is for, and with which class it is loaded, from config.json alone."""

from __future__ import annotations

import pytest

from spectral_surgery.files.peft.task import class_for, is_causal, needs_decoder_input, task_of

CAUSAL = "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("architecture", "both", "task", "refused"),
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM", False),
        ("LlavaForConditionalGeneration", False, "CAUSAL_LM", False),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM", True),
        ("MarianMTModel", True, "SEQ_2_SEQ_LM", True),
        ("BartModel", True, "FEATURE_EXTRACTION", True),
        ("T5EncoderModel", True, "FEATURE_EXTRACTION", False),  # its configuration is that of all of T5
        ("BartForSequenceClassification", True, "SEQ_CLS", False),  # it makes the decoder's input itself
        ("BertModel", False, "FEATURE_EXTRACTION", False),
    ],
)
def test_encoders_with_decoders_are_told_by_the_configuration(
    architecture: str, both: bool, task: str, refused: bool
) -> None:
    config = {"architectures": [architecture], **({"is_encoder_decoder": True} if both else {})}
    assert task_of(config) == task
    assert is_causal(config) == (task == "CAUSAL_LM")
    assert needs_decoder_input(config) == refused


def test_the_class_follows_the_architecture_where_an_auto_class_would_not() -> None:
    def chosen(architecture: str, auto_class: str) -> str:
        return class_for({"architectures": [architecture]}, auto_class)

    assert chosen("LlavaForConditionalGeneration", CAUSAL) == "LlavaForConditionalGeneration"
    assert chosen("LlavaForConditionalGeneration", "AutoModel") == "AutoModel"
    assert chosen("T5EncoderModel", "AutoModel") == "T5EncoderModel"
    assert chosen("LlamaForCausalLM", CAUSAL) == CAUSAL
    assert class_for({}, CAUSAL) == CAUSAL
