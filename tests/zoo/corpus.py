"""A text to calibrate with, and a tokenizer for it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

WORDS = (
    "the a of frequency spectral weight model tensor layer small large code bit error matrix row column energy noise"
    " signal text token word line page shore river stone light wind water night day green blue red cold warm slow"
)
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
SENTENCES = 400


@dataclass(frozen=True)
class Corpus:
    """Where text and tokenizer are."""

    folder: Path

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


def make_corpus(folder: Path) -> Corpus:
    """Write sentences of random words, always the same, and a tokenizer with bytes, special tokens and their words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    own = Corpus(folder)
    draw = random.Random(0)
    words = WORDS.split()
    lines = [" ".join(draw.choices(words, k=draw.randint(6, 14))).capitalize() + "." for _ in range(SENTENCES)]
    own.text.write_text("\n".join(lines) + "\n")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=299, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token="<s>", sep_token="</s>", model_max_length=64, **SPECIAL
    )
    tokenizer.save_pretrained(own.tokenizer)
    return own
