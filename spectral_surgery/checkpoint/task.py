"""What a model is for, in PEFT's words."""

from __future__ import annotations

from collections.abc import Mapping

_ENDS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


def task_of(config: Mapping[str, object]) -> str | None:
    """The task_type of an adapter for a model, from the class that config.json names.

    Args:
        config: content of config.json.

    Returns:
        Such as CAUSAL_LM; None when no task of PEFT's fits.
    """
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((task for end, task in _ENDS.items() if name.endswith(end)), None)
