"""Models and tokenizers from a folder: the only importer of transformers outside the plug-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from spectral_surgery.errors import BackendError, CheckpointError, ConfigError, SpectralSurgeryError

_BATCH = 32


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformer encoder with mean pooling, as sentence-transformers runs it.

    Attributes:
        model: a transformers encoder in eval mode.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Sentence embeddings, mean-pooled over tokens and normalised: [N, D] float32."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # equal lengths need little padding
        parts = []
        for start in range(0, len(sentences), _BATCH):
            own = [sentences[i] for i in order[start : start + _BATCH]]
            batch = self.tokenizer(own, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = self.model(**batch).last_hidden_state  # [B, T, D]
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        found = torch.cat(parts)
        found = torch.empty_like(found).index_copy_(0, torch.tensor(order), found)
        return torch.nn.functional.normalize(found, dim=-1)

    def with_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace parameters by name, in place."""
        self.model.load_state_dict(dict(weights), strict=False)


def load_model(
    folder: Path, auto_class: str, *, dtype: torch.dtype | None = None, labels: Sequence[str] | int | None = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a local folder.

    Args:
        folder: a Hugging Face folder with a tokenizer.
        auto_class: class of transformers that knows the architecture: ``AutoModelForCausalLM``.
        dtype: of the weights; None for the stored one.
        labels: classes of a classifier, or the number of its outputs.

    Returns:
        (model in eval mode, tokenizer with a padding token).

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has no model of that kind.
    """
    transformers = _transformers()
    own: dict[str, Any] = {}
    if isinstance(labels, int):
        own = {"num_labels": labels}
    elif labels is not None:
        own = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    tokenizer = load_tokenizer(folder)
    with _loading(folder, auto_class):
        model = getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto", **own
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_outline(folder: Path, auto_class: str) -> tuple[Any, Any]:
    """Build a model without weights: parameters are on the meta device, buffers are real.

    Args:
        folder: a Hugging Face folder with a tokenizer.
        auto_class: class of transformers that knows the architecture.

    Returns:
        (model in eval mode, tokenizer with a padding token).

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has no model of that kind.
    """
    transformers = _transformers()
    tokenizer = load_tokenizer(folder)
    with _loading(folder, auto_class):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with _without_weights():
            model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
        model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False), tokenizer


def load_whole(folder: Path, *, dtype: torch.dtype | None = None) -> Any:
    """Load a model with the class that its config.json names, so that every tensor of the folder has its place.

    Args:
        folder: a Hugging Face folder.
        dtype: of the weights; None for the stored one.

    Returns:
        The model in eval mode.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has no model that transformers knows.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        own = _class_of(transformers, config, folder)
        return own.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto").eval()
    except SpectralSurgeryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason}") from None


def outline_model(folder: Path) -> Any:
    """A model from the config.json of a folder: parameters are on the meta device, buffers are real.

    Args:
        folder: a Hugging Face folder; only its configuration is read.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when transformers does not know the configuration.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with _without_weights():
            model = _class_of(transformers, config, folder)(config)
        model.tie_weights()
        return model.eval()
    except SpectralSurgeryError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: has no configuration that transformers knows: {reason}") from None


def save_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights of a model as transformers does, under the names and in the shards that it reads.

    Args:
        model: of transformers; cast in place.
        folder: exists; a configuration is written too.
        dtype: of the files.
    """
    model.to(dtype).save_pretrained(folder)


def _without_weights() -> AbstractContextManager[object]:
    """Build modules without memory for their parameters; buffers, which no file has, get their values."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise BackendError(
            "accelerate: not installed; it is needed to build models without weights. pip install"
            " 'spectral-surgery[hf]'"
        ) from None
    return cast("AbstractContextManager[object]", init_empty_weights(include_buffers=False))


@contextmanager
def _loading(folder: Path, auto_class: str) -> Iterator[None]:
    """Turn what transformers raises for a folder that it cannot load into one line."""
    try:
        yield
    except SpectralSurgeryError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be loaded by {auto_class}: {reason}") from None


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local folder, with a padding token.

    Args:
        folder: a Hugging Face folder.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has no tokenizer.
    """
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: has no tokenizer that can be loaded: {reason}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 for the likeliest token.
        top_k: choose among so many tokens; 0 for all.
        top_p: choose among the likeliest tokens of so much probability.
        seed: of the choices.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def continue_text(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, emit: Callable[[str], None]
) -> tuple[int, int]:
    """Let a language model continue a text.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompt: the text, as it is.
        sampling: how tokens are chosen.
        emit: called with each piece of new text.

    Returns:
        (tokens of the prompt, new tokens); fewer new ones than asked for where the model's context ends.

    Raises:
        ConfigError: when the prompt has no tokens, or as many as the model can read.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise ConfigError("generate: the prompt has no tokens; some text is accepted.")
    context = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + sampling.max_tokens
    if ids.shape[1] >= context:
        raise ConfigError(
            f"generate: the prompt has {ids.shape[1]} tokens; at most {context - 1} are accepted by this model. Cut it."
        )
    streamer = _transformers().TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: emit(text)  # noqa: ARG005 - transformers names it
    choice: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        choice |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = ids.to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(sampling.max_tokens, context - ids.shape[1]),
            pad_token_id=tokenizer.pad_token_id,
            streamer=streamer,
            **choice,
        )
    return ids.shape[1], tokens.shape[1] - ids.shape[1]


def compare_logits(
    models: Sequence[Any], tokenizer: Any, text: str, seq_length: int, samples: int = 0
) -> dict[str, float]:
    """Perplexity of language models on a text, cut into sequences, and how far a second one is from the first.

    Args:
        models: one or two, on one device.
        tokenizer: of both.
        text: any.
        seq_length: tokens of a sequence.
        samples: sequences at most; 0 for all.

    Returns:
        ``perplexity_a``; of two models also ``perplexity_b``, ``kl`` (mean of KL(A || B) per token, nats) and
        ``same_top`` (part of the tokens where both rank the same one first).

    Raises:
        ConfigError: when the text is too short.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    length = min(seq_length, len(ids))
    if length < 2:
        raise ConfigError("eval --text: fewer than two tokens; some text is accepted.")
    rows = ids[: len(ids) // length * length].reshape(-1, length)[: samples or None]
    sums = {"a": 0.0, "b": 0.0, "kl": 0.0, "top": 0.0}
    for row in rows:
        batch = row[None].to(next(models[0].parameters()).device)
        with torch.inference_mode():
            logs = [model(batch).logits[0, :-1].float().log_softmax(-1) for model in models]
        for name, log in zip("ab", logs, strict=False):
            sums[name] -= float(log.gather(-1, batch[0, 1:, None]).sum())
        if len(logs) == 2:
            sums["kl"] += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            sums["top"] += float((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
    tokens = rows.shape[0] * (length - 1)
    found = {f"perplexity_{name}": math.exp(sums[name] / tokens) for name, _ in zip("ab", models, strict=False)}
    both = {"kl": sums["kl"] / tokens, "same_top": sums["top"] / tokens} if len(models) == 2 else {}
    return found | both


def load_encoder(folder: Path) -> SentenceEncoder:
    """Load a sentence encoder from a local folder, in float32.

    Args:
        folder: a plain Hugging Face folder with a tokenizer.

    Returns:
        The encoder.

    Raises:
        BackendError: when transformers is not installed.
        CheckpointError: when the folder has no model.
    """
    return SentenceEncoder(*load_model(folder, "AutoModel", dtype=torch.float32))


def _class_of(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that a configuration names."""
    name = str((config.architectures or ["none"])[0])
    own = getattr(transformers, name, None)
    if own is None:
        raise CheckpointError(
            f"{folder}: config.json names the class {name}; one that transformers has is accepted. Name it in"
            " architectures."
        )
    return own


def _transformers() -> Any:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise BackendError(
            "transformers: not installed; it is needed to run models. pip install 'spectral-surgery[hf]'"
        ) from None
    logging.disable_progress_bar()
    return transformers
