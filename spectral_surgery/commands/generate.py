"""generate: let a model continue a text; a compressed one runs as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_surgery.commands.settings import Running
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.compressed.checkpoint import is_compressed
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.hf.load_errors import check_utf8
from spectral_surgery.hf.models import continue_text, load_model, load_tokenizer
from spectral_surgery.hf.quantizer.load_compressed import load_compressed
from spectral_surgery.hf.settings import Sampling
from spectral_surgery.live.attach import load as attach_adapter
from spectral_surgery.memory import peak_rss_bytes

_CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True)
class GenerateReport:
    """What was generated.

    Attributes:
        load_seconds: until the model was there.
        seconds: from the prompt to the end.
        first_seconds: from the prompt to the first new text.
        weight_bytes: of everything that the model holds in memory.
    """

    text: str
    prompt_tokens: int
    tokens: int
    load_seconds: float
    seconds: float
    first_seconds: float
    weight_bytes: int
    peak_rss_bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {**vars(self), "tokens_per_second": self.tokens / max(self.seconds, 1e-9)}


def generate(
    source: Path, prompt: str, sampling: Sampling, running: Running, emit: Callable[[str], None] = lambda _: None
) -> GenerateReport:
    """Continue a text.

    Raises:
        CheckpointError: when the folder has no such model, or the adapter does not fit it.
        ConfigError: when a setting does not fit the model.
        LimitError: when the weights do not fit max_memory.
    """
    check_utf8(prompt, "generate: the prompt")
    started = time.perf_counter()
    model, tokenizer = _model(source, running)
    ready = time.perf_counter()
    pieces: list[str] = []
    times: list[float] = []

    def collect(piece: str) -> None:
        pieces.append(piece)
        if piece and not times:
            times.append(time.perf_counter())
        emit(piece)

    prompt_tokens, tokens = continue_text(model, tokenizer, prompt, sampling, collect)
    end = time.perf_counter()
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return GenerateReport(
        "".join(pieces),
        prompt_tokens,
        tokens,
        ready - started,
        end - ready,
        (times[0] if times else end) - ready,
        sum(sizes.values()),
        peak_rss_bytes(),
    )


def _model(source: Path, running: Running) -> tuple[Any, Any]:
    dtype, trust = _dtype(running.dtype), running.trust_remote_code
    if is_compressed(source):
        tokenizer = load_tokenizer(source, trust_remote_code=trust)
        model = load_compressed(
            source,
            running.resident or "auto",
            auto_class=_CLASS,
            dtype=dtype,
            device=running.device,
            max_memory=running.max_memory,
            trust_remote_code=trust,
        )
    else:
        if running.resident or running.max_memory:
            raise ConfigError(
                f"{source.name}: expected a compressed folder for --resident and --max-memory, got a dense one."
                " Compress it first."
            )
        model, tokenizer = load_model(source, _CLASS, dtype=dtype, trust_remote_code=trust)
        model.to(running.device)
    if running.adapter is not None:
        attach_adapter(model, read_adapter(running.adapter))
    return model, tokenizer


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"--dtype: expected float32, bfloat16, float16 or the like, got {name}.")
    return dtype
