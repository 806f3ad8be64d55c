"""Small tokenizers of the kinds that language models have, trained in a moment."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The quick brown fox jumps over the lazy dog, 1234 times. It's what they'd do; we'll see!",
    "the spectral surgery of models: weights, codes and tables. \u00c4pfel, na\u00efve caf\u00e9s, \u6771\u4eac 2026",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # 42",
) * 20
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(expression: str | None = None, *, size: int = 400) -> Tokenizer:
    """GPT-2's kind; with an expression, texts are cut by it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if expression:
        steps = [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def sentence_piece(*, prefix: bool = True, size: int = 500) -> Tokenizer:
    """Llama 2's kind with a space before a text, or Gemma's without: bytes for what no piece has."""
    steps = [normalizers.Replace(" ", "\u2581")]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *steps] if prefix else steps)
    trained.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size - 256, special_tokens=SPECIAL, show_progress=False)
    trained.train_from_iterator((text.encode("ascii", "ignore").decode() for text in TEXT), trainer)
    import json

    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(p for p in model["vocab"] if p not in SPECIAL)]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = trained.normalizer
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    template = [("<s>", vocab["<s>"])]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=template)
    return made


def word_piece(*, lowercase: bool = True, size: int = 300) -> Tokenizer:
    """BERT's kind."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return made


def save(tokenizer: Tokenizer, folder: Path, **settings: object) -> None:
    """Write a tokenizer as transformers does."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
