"""Tiny models and texts under the names that the documentation and the examples have for them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.reference_text import write_passages
from spectral_surgery import CompressOptions, Target, compress
from spectral_surgery.training.tokenizers import learn_bpe


def named_models(folder: Path) -> Path:
    """Write MODEL, TUNED, TUNED-2, an encoder, texts, and MODEL at 4 bits into a folder."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    text = write_passages(folder / "notes.txt", 40).read_text(encoding="utf-8")
    tokenizer = learn_bpe(text, 320)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
    encoder = BertModel(BertConfig(**sizes))
    for name, own in {"MODEL": model, "encoder": encoder}.items():
        own.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for name in ("TUNED", "TUNED-2"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = re.findall(r"[a-z]+", text.lower())
    rows = [f"{' '.join(words[i : i + 6])},{' '.join(words[i + 3 : i + 9])},{i % 6}" for i in range(48)]
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    compress(folder / "MODEL", folder / "model-4bit", CompressOptions(Target("bits", 4.0)))
    return folder
