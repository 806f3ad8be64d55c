"""What a model is for, in PEFT's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_ENDS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MTModel": "SEQ_2_SEQ_LM",  # Marian
    "Model": "FEATURE_EXTRACTION",
}


# what PEFT's model for a task passes to the base model by name, None or not; other tasks pass nothing more
_TEXT = ("input_ids", "inputs_embeds")
_PASSED = {
    "CAUSAL_LM": _TEXT,
    "SEQ_CLS": _TEXT,
    "TOKEN_CLS": _TEXT,
    "QUESTION_ANS": _TEXT,
    "FEATURE_EXTRACTION": _TEXT,
    "SEQ_2_SEQ_LM": (*_TEXT, "decoder_input_ids", "decoder_inputs_embeds"),
}
_ON_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # their encoder-decoders make what the decoder reads themselves


def architecture_of(config: Mapping[str, object]) -> str:
    """The class that config.json names; empty when it names none."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def task_of(config: Mapping[str, object]) -> str | None:
    """The task_type of an adapter for a model, from the class that config.json names.

    Returns such as CAUSAL_LM, also of a model that sees or hears before it writes; None when no task of PEFT's fits.
    """
    name = architecture_of(config)
    task = next((task for end, task in _ENDS.items() if name.endswith(end)), None)
    if task == "SEQ_2_SEQ_LM" and not config.get("is_encoder_decoder"):
        return "CAUSAL_LM"
    return task


def is_causal(config: Mapping[str, object]) -> bool:
    """Whether a model predicts the next token."""
    return task_of(config) == "CAUSAL_LM"


def needs_decoder_input(config: Mapping[str, object]) -> bool:
    """Whether a model has an encoder and a decoder, and its input text alone does not run both."""
    alone = architecture_of(config).endswith("EncoderModel") or task_of(config) in _ON_TEXT
    return bool(config.get("is_encoder_decoder")) and not alone


def class_for(config: Mapping[str, object], auto_class: str) -> str:
    """The class to load a model with: an Auto class, unless that would choose another kind of model.

    AutoModel makes an encoder and a decoder of an encoder of T5, and AutoModelForCausalLM does not know most models
    that see or hear before they write.
    """
    name = architecture_of(config)
    alone = auto_class == "AutoModel" and name.endswith("EncoderModel")
    writes = auto_class == "AutoModelForCausalLM" and name.endswith("ForConditionalGeneration")
    return name if alone or writes else auto_class


def callable_task(task: str | None, takes: Collection[str]) -> str | None:
    """The task, where PEFT's model for it can call the base model; an adapter without a task is called as its base is.

    Returns the task; None for models that do not take what would be passed, such as those of images and speech.
    """
    return task if task is not None and all(name in takes for name in _PASSED[task]) else None
