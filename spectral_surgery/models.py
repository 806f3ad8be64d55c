"""Models and tokenizers from a folder: the only importer of transformers outside the plug-ins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.errors import BackendError

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
        parts = []
        for start in range(0, len(sentences), _BATCH):
            batch = self.tokenizer(
                list(sentences[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden = self.model(**batch).last_hidden_state  # [B, T, D]
            mask = batch["attention_mask"].unsqueeze(-1)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def with_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace parameters by name, in place."""
        self.model.load_state_dict(dict(weights), strict=False)


def load_encoder(folder: Path) -> SentenceEncoder:
    """Load a sentence encoder from a local folder, in float32.

    Args:
        folder: a plain Hugging Face folder with a tokenizer.

    Returns:
        The encoder.

    Raises:
        BackendError: when transformers is not installed.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise BackendError(
            "transformers: not installed; it is needed to run models. pip install 'spectral-surgery[hf]'"
        ) from None
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return SentenceEncoder(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))
