"""Tokenizers for models that start from nothing: byte-level BPE learned from the text, or one of tiktoken's."""

from __future__ import annotations

from typing import Any

from spectral_surgery.errors import ConfigError, required

END = "<|endoftext|>"
_BYTES = 256


def learn_bpe(text: str, vocabulary: int) -> Any:
    """Learn a byte-level BPE, which can write any text. Raises ConfigError when the vocabulary is too small."""
    if vocabulary <= _BYTES:
        raise ConfigError(
            f"--vocab-size: expected {_BYTES + 1} or more, for the bytes and an end of text, got {vocabulary}."
        )
    required("tokenizers", "learn one")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def tiktoken_named(name: str) -> Any:
    """One of tiktoken's encodings, as a tokenizer that transformers saves and loads without tiktoken.

    Returns:
        A tokenizer of transformers; special tokens may have other numbers than in tiktoken.

    Raises:
        ConfigError: when tiktoken does not know the name.
    """
    tiktoken = required("tiktoken", f"make the tokenizer {name}", "tiktoken")
    required("transformers", "make tokenizers")
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        encoding = tiktoken.get_encoding(name)
    except ValueError:
        known = ", ".join(tiktoken.list_encoding_names())
        raise ConfigError(f"--tokenizer: expected tiktoken: and one of {known}, got tiktoken:{name}.") from None
    converter = TikTokenConverter(pattern=encoding._pat_str, extra_special_tokens=[END])
    converter.load_tiktoken_bpe = lambda _: encoding._mergeable_ranks  # they are here, not in a file
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=END, eos_token=END, pad_token=END)
