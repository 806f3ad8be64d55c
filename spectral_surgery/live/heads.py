"""The ends of a model: the layer that reads tokens, and heads, which carry no adapter and are trained whole."""

from __future__ import annotations

from typing import Any

from torch import nn

# ends of names that PEFT trains whole for a task, heads or not; an adapter without them cannot be loaded
_SAVED_BY_PEFT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_USUAL = ("lm_head", "embed_out", "score", "classifier", "qa_outputs")
_CLASSES = ("Classification", "QuestionAnswering")  # in the name of a class whose head is all around the base model


def trained_heads(model: nn.Module, task: str | None) -> tuple[str, ...]:
    """The modules that an adapter for a task trains whole and stores, as PEFT expects them.

    Returns names, in order: of a classifier, a tagger or a model that finds answers; none for other tasks.
    """
    ends = _SAVED_BY_PEFT.get(str(task))
    if ends is None:
        return ()
    outside, heads = _outside(model), list[str]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{head}.") for head in heads)
        if name and not inside and (name in outside or name.endswith(ends)) and module.state_dict():
            heads.append(name)
    return tuple(heads)


def classifier_heads(model: nn.Module) -> tuple[str, ...]:
    """The modules that adapters train whole, by the class of a model: classifier, tagger or finder of answers."""
    kind = type(model).__name__
    task = "QUESTION_ANS" if "QuestionAnswering" in kind else "SEQ_CLS" if "Classification" in kind else None
    return trained_heads(model, task)


def head_names(model: nn.Module) -> set[str]:
    """Names of the modules that all-linear leaves out: output layers, and the heads of classifiers with all inside."""
    ask = getattr(model, "get_output_embeddings", None)
    output = ask() if callable(ask) else None
    outside = _outside(model) if any(word in type(model).__name__ for word in _CLASSES) else ()
    return {
        name
        for name, module in model.named_modules()
        if (output is not None and module is output)
        or name.split(".")[-1] in _USUAL
        or any(f"{name}.".startswith(f"{head}.") for head in outside)
    }


def word_table(model: Any) -> nn.Module | None:
    """The layer that reads token ids; None where there is none, or transformers does not know which."""
    try:
        words: nn.Module | None = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return words


def _outside(model: nn.Module) -> tuple[str, ...]:
    """Children of a model of transformers beside its base model."""
    base = getattr(model, "base_model", None)
    if base is None or base is model:
        return ()
    return tuple(name for name, child in model.named_children() if child is not base)
