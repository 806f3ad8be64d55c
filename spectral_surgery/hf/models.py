"""Models and tokenizers from a folder: the only importer of transformers outside the plug-ins."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import CheckpointError, ConfigError, required
from spectral_surgery.files.peft.task import class_for
from spectral_surgery.hf.load_errors import check_utf8, loading, own_code
from spectral_surgery.hf.plain_weights import from_pretrained, plain_config, without_weights
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.live.blocks import text_config
from spectral_surgery.live.running import called, running

_BATCH = 32


@dataclass(frozen=True)
class SentenceEncoder:
    """A transformer encoder with mean pooling, as sentence-transformers runs it.

    ``model``: a transformers encoder in eval mode.
    """

    model: Any
    tokenizer: Any

    def embed(self, sentences: Sequence[str]) -> Tensor:
        """Sentence embeddings, mean-pooled over tokens and normalised: [N, D] float32."""
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # equal lengths need little padding
        parts = []
        for start in range(0, len(sentences), _BATCH):
            texts = [sentences[i] for i in order[start : start + _BATCH]]
            batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                hidden = called(self.model, named=batch).last_hidden_state  # [B, T, D]
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        vectors = torch.cat(parts)
        vectors = torch.empty_like(vectors).index_copy_(0, torch.tensor(order), vectors)
        return torch.nn.functional.normalize(vectors, dim=-1)


def load_model(
    folder: Path, auto_class: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a local folder: (model in eval mode, tokenizer with a padding token).

    Args:
        auto_class: class of transformers that knows the architecture: ``AutoModelForCausalLM``; see `class_for`.
        dtype: of the weights; None for the stored one.

    Raises:
        CheckpointError: when the folder has no model of that kind, or not its output layer.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    model = load_any(folder, auto_class, dtype=dtype, trust_remote_code=trust_remote_code)
    return _padding(model, tokenizer), tokenizer


def load_any(
    folder: Path, auto_class: str = "", *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a model of any kind, without what makes its inputs, in eval mode.

    Args:
        auto_class: see `load_model`; empty for the class that config.json names, which has a place for every tensor.

    Raises:
        CheckpointError: when the folder has no model of that kind, or with ``auto_class`` not its output layer.
    """
    transformers = _transformers()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with loading(folder, f"cannot be loaded{f' by {auto_class}' if auto_class else ''}"):
        if auto_class:
            cls = _class(transformers, folder, auto_class)
        else:
            cls = _class_of(transformers, transformers.AutoConfig.from_pretrained(folder, **local), folder)
        settings = {"dtype": dtype or "auto", "output_loading_info": True}
        model, report = from_pretrained(cls, folder, settings, trust_remote_code=trust_remote_code)
    if auto_class:
        check_head(folder, model, report["missing_keys"])
    return model.eval()


def check_head(folder: Path, model: Any, missing: Iterable[str]) -> None:
    """Refuse a model whose head is not in the checkpoint: it would begin at random. Tied weights are not missing.

    Raises:
        CheckpointError: when names of missing weights are outside the model's body.
    """
    prefix = model.base_model_prefix
    head = sorted(name for name in missing if prefix and not name.startswith(f"{prefix}."))
    if head and hasattr(model, prefix):
        raise CheckpointError(
            f"{folder}: expected the weights of {type(model).__name__}, got none for {', '.join(head[:3])}."
            " Use a checkpoint that has this output layer."
        )


def load_classifier(
    folder: Path, labels: Sequence[str] | int, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any, tuple[str, ...]]:
    """Load a model with a head for some classes: the stored one where it is of that size, else a new one.

    Returns (model in eval mode, tokenizer with a padding token, names of weights that are new and random).

    Raises CheckpointError when the folder has no such model, or other weights than those of the head do not fit.
    """
    transformers, auto_class = _transformers(), "AutoModelForSequenceClassification"
    of_config: dict[str, Any] = {"num_labels": labels}
    if not isinstance(labels, int):
        of_config = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    settings = {"dtype": dtype or "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with loading(folder, f"cannot be loaded by {auto_class}"):
        cls = getattr(transformers, auto_class)
        model, report = from_pretrained(cls, folder, settings, of_config=of_config, trust_remote_code=trust_remote_code)
    misfits = sorted({str(name) for name, *_ in report["mismatched_keys"]})
    inside = [name for name in misfits if name.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise CheckpointError(
            f"{folder}: expected a head of another size at most, got other shapes than config.json says of"
            f" {', '.join(inside[:3])}."
        )
    return _padding(model, tokenizer).eval(), tokenizer, tuple(sorted({*misfits, *report["missing_keys"]}))


def _padding(model: Any, tokenizer: Any) -> Any:
    """A model that knows the padding token; models of several parts have none."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def load_outline(folder: Path, auto_class: str = "", *, trust_remote_code: bool = False) -> Any:
    """Build a model without weights, in eval mode: parameters are on the meta device, buffers are real.

    Args:
        auto_class: see `load_model`; empty for the class that config.json names.

    Raises:
        CheckpointError: when the folder has no model of that kind.
    """
    transformers = _transformers()
    trust = {"trust_remote_code": trust_remote_code}
    with loading(folder, f"cannot be loaded by {auto_class}"):
        config = plain_config(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **trust))
        cls = _class(transformers, folder, auto_class) if auto_class else _class_of(transformers, config, folder)
        with without_weights():
            if hasattr(cls, "from_config"):
                model = cls.from_config(config, dtype=torch.float32, **trust)
            else:
                model = cls._from_config(config, dtype=torch.float32)
        model.tie_weights()
    return model.eval().requires_grad_(requires_grad=False)


def outline_model(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """A model from the config.json of a folder: parameters are on the meta device, buffers are real.

    Raises CheckpointError when transformers does not know the configuration.
    """
    transformers = _transformers()
    from transformers.initialization import no_init_weights

    with loading(folder, "has no configuration that transformers knows"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        cls = _class_of(transformers, plain_config(config), folder)
        with without_weights(), no_init_weights():
            if hasattr(cls, "from_config"):
                model = cls.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = cls(config)
        model.tie_weights()
        return model.eval()


def outline_of(model: Any) -> Any:
    """The same model without numbers, all its weights as parameters: on the meta device, tied as transformers does.

    ``model``: of transformers, dense or compressed.
    """
    from transformers.initialization import no_init_weights

    with without_weights(), no_init_weights():
        outline = type(model)(plain_config(copy.deepcopy(model.config)))
    outline.tie_weights()
    return outline


def save_weights(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights of a model as transformers does, under the names and in the shards that it reads.

    ``model``: of transformers; cast in place.
    """
    model.to(dtype).save_pretrained(folder)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a local folder, with a padding token.

    Raises:
        CheckpointError: when the folder has no tokenizer.
        ConfigError: when Python could not read the name of the folder, see check_utf8.
    """
    transformers = _transformers()
    check_utf8(folder, str(folder))
    with loading(folder, "has no tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def longest_sequence(model: Any) -> int | None:
    """Tokens that a model can read at most, as far as its configuration says."""
    limit = getattr(text_config(model), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def continue_text(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling, emit: Callable[[str], None]
) -> tuple[int, int]:
    """Let a language model continue a text.

    Returns (tokens of the prompt, new tokens); fewer new ones than asked for where the model's context ends.

    Raises ConfigError when the model cannot generate, or the prompt has no tokens, or as many as the model can read.
    """
    if not hasattr(model, "generate"):
        raise ConfigError(
            "generate: expected a model that transformers lets generate, a class with its GenerationMixin, got"
            f" {type(model).__name__} without that method."
        )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise ConfigError("generate: expected a prompt with some text, got no tokens.")
    context = longest_sequence(model) or ids.shape[1] + sampling.max_tokens
    if ids.shape[1] >= context:
        raise ConfigError(
            f"generate: expected at most {context - 1} tokens of a prompt for this model, got {ids.shape[1]}. Cut it."
        )
    streamer = _transformers().TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: emit(text)  # noqa: ARG005 - transformers names it
    choice: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        choice |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = ids.to(next(model.parameters()).device)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        named = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": min(sampling.max_tokens, context - ids.shape[1]),
            "pad_token_id": tokenizer.pad_token_id,
            "streamer": streamer,
            **choice,
        }
        with running(model):
            tokens = model.generate(ids, **named)
    return ids.shape[1], tokens.shape[1] - ids.shape[1]


def _class(transformers: Any, folder: Path, auto_class: str) -> Any:
    """An Auto class, or the class that a folder names where that would choose another kind of model.

    A model that brings code may be found by other Auto classes only.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    brought = [name for name in own_code(folder) if name.startswith("AutoModel")]
    if brought and auto_class not in brought:
        auto_class = brought[0]
    return getattr(transformers, class_for(config, auto_class), None) or getattr(transformers, auto_class)


def class_named(transformers: Any, config: Any, name: str) -> Any:
    """A class by its name, or the Auto class that finds it in code that the model brings; None when there is none."""
    own_code = getattr(config, "auto_map", None) or {}
    auto = next((auto for auto, path in own_code.items() if str(path).endswith(f".{name}")), name)
    return getattr(transformers, name, None) or getattr(transformers, auto, None)


def _class_of(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that a configuration names."""
    name = str((config.architectures or ["none"])[0])
    cls = class_named(transformers, config, name)
    if cls is None:
        raise CheckpointError(
            f"{folder}: expected a class that transformers has, got {name} in config.json. Name it in architectures."
        )
    return cls


def _transformers() -> Any:
    transformers = required("transformers", "run models")
    transformers.utils.logging.disable_progress_bar()
    return transformers
