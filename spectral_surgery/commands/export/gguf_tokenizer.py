"""Tokenizers as GGUF holds them: byte-level BPE, SentencePiece's BPE, and WordPiece.

The tokens, what they are, and how llama.cpp is to cut texts. Special tokens, merges and the chat template are read by
the package gguf. Source: llama.cpp's `llama-vocab.cpp` and conversion scripts, in 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectral_surgery.errors import ConfigError, required
from spectral_surgery.hf.tokenizer_json import names_of_splits, tokenizer_json

_NORMAL, _UNKNOWN, _CONTROL, _USER, UNUSED, _BYTE = range(1, 7)  # types of tokens in GGUF
_SPACE = "\u2581"  # what stands for a space in SentencePiece


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer, ready to be written.

    Attributes:
        folder: of the model.
        model: what llama.cpp calls the kind.
        pre: what it calls the way in which texts are cut first.
        tokens: by number.
        types: of the tokens.
        scores: of the tokens of SentencePiece.
        space: whether a space is put before a text; None where the kind says it.
    """

    folder: Path
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    space: bool | None = None

    def add_to(self, writer: Any) -> None:
        """Write it as keys of a GGUF file."""
        gguf: Any = required("gguf", "write GGUF files")
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.space is not None:
            writer.add_add_space_prefix(self.space)
        special = gguf.SpecialVocab(self.folder, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        special.add_to_gguf(writer, quiet=True)


def read_tokenizer(folder: Path, rows: int) -> GgufTokenizer:
    """Read the tokenizer of a model.

    Args:
        folder: of the model.
        rows: of its embedding; rows without a token get one that is unused.

    Raises:
        CheckpointError: when the folder has no tokenizer.
        ConfigError: when GGUF does not know its kind, or a token has no row.
    """
    body = tokenizer_json(folder)
    model = body["model"]
    kind = str(model.get("type"))
    if kind not in ("BPE", "WordPiece"):
        raise ConfigError(
            f"tokenizer: is of the kind {kind}, which GGUF is not written with; expected BPE of bytes or SentencePiece,"
            " or WordPiece."
        )
    read = _word_piece if kind == "WordPiece" else _sentence_piece if model.get("byte_fallback") else _byte_level
    return read(folder, body, *_listed(body, rows))


def _listed(body: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens by number, and their types as far as all kinds have them."""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    unknown = body["model"].get("unk_token")
    found = [(text, number, _NORMAL) for text, number in body["model"]["vocab"].items()]
    found += [(one["content"], one["id"], _CONTROL if one["special"] else _USER) for one in body["added_tokens"]]
    for text, number, kind in found:
        if number >= rows:
            raise ConfigError(
                f"token '{text}': has the number {number}, and the embedding {rows} rows; expected a row for each."
                " Use the tokenizer of the model, or resize its embedding."
            )
        tokens[number], types[number] = text, _UNKNOWN if text == unknown else kind
    return tokens, types


def _byte_level(folder: Path, body: Mapping[str, Any], tokens: list[str], types: list[int]) -> GgufTokenizer:
    normalizer = (body.get("normalizer") or {}).get("type")
    steps = _steps(body.get("pre_tokenizer"))
    pre = "" if normalizer not in (None, "NFC") else _pre_of(steps)
    if not pre:
        what = next((step[1] for step in steps if step[0] == "split"), " and ".join(step[0] for step in steps))
        after = f" after {normalizer}" if normalizer else ""
        raise ConfigError(
            f"tokenizer: cuts texts by {what[:80]!r}{after}, which llama.cpp has no name for; expected the way of"
            " GPT-2, SmolLM, Llama 3, Qwen2, Tekken or GPT-4o."
        )
    return GgufTokenizer(folder, "gpt2", pre, tokens, types)


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """A pre-tokenizer as steps: (split, expression), (digits, ""), (bytes, gpt-2 or ""), (kind of another, "")."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for one in pre_tokenizer["pretokenizers"] for step in _steps(one)]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return [("split", str(pre_tokenizer["pattern"].get("Regex")))]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [("digits", "")]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [("bytes", "gpt-2" if pre_tokenizer["use_regex"] else "")]
    return [(kind, "")]


def _pre_of(steps: list[tuple[str, str]]) -> str:
    """What llama.cpp calls it; empty when it has no name."""
    known: dict[tuple[tuple[str, str], ...], str] = {
        (("bytes", "gpt-2"),): "gpt-2",
        (("digits", ""), ("bytes", "gpt-2")): "smollm",
    }
    known |= {(("split", expression), ("bytes", "")): name for expression, name in names_of_splits().items()}
    return known.get(tuple(steps), "")


def _sentence_piece(folder: Path, body: Mapping[str, Any], tokens: list[str], types: list[int]) -> GgufTokenizer:
    """Scores say in which order pieces are joined; here merges say it, so that later ones get lower scores."""
    scores = [0.0 if kind in (_CONTROL, _UNKNOWN, _USER) else -1e6 for kind in types]
    numbers = {text: number for number, text in enumerate(tokens)}
    for rank, merge in enumerate(body["model"]["merges"]):
        made = numbers["".join(merge if isinstance(merge, list) else merge.split(" "))]
        scores[made] = max(scores[made], -float(rank + 1)) if types[made] == _NORMAL else scores[made]
    for text, number in numbers.items():
        if types[number] == _NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = _BYTE
    return GgufTokenizer(folder, "llama", "default", tokens, types, scores, _puts_space(body))


def _puts_space(body: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece puts a space before a text.

    Raises:
        ConfigError: when it changes texts in another way than llama.cpp.
    """
    normalizer = body.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    pre = body.get("pre_tokenizer") or {}
    kinds = {step["type"] for step in steps}
    if not kinds <= {"Prepend", "Replace"} or pre.get("type") not in (None, "Metaspace", "Split"):
        odd = sorted(kinds - {"Prepend", "Replace"}) or [pre.get("type")]
        raise ConfigError(
            f"tokenizer: changes texts by {', '.join(map(str, odd))}, which llama.cpp does not; expected SentencePiece,"
            " which replaces spaces alone."
        )
    return "Prepend" in kinds or (pre.get("type") == "Metaspace" and pre.get("prepend_scheme") != "never")


def _word_piece(folder: Path, body: Mapping[str, Any], tokens: list[str], types: list[int]) -> GgufTokenizer:
    """Words begin with a mark there, and the rest of a word has none."""
    normalizer = body.get("normalizer") or {}
    if (
        normalizer.get("type") != "BertNormalizer"
        or not normalizer.get("lowercase")
        or normalizer.get("strip_accents") is False
    ):
        raise ConfigError(
            "tokenizer: keeps capitals or accents, which WordPiece of llama.cpp does not; expected an uncased one."
        )
    prefix = body["model"]["continuing_subword_prefix"]

    def marked(text: str, kind: int) -> str:
        if kind in (_CONTROL, _UNKNOWN, UNUSED):
            return text
        return text.removeprefix(prefix) if text.startswith(prefix) else _SPACE + text

    return GgufTokenizer(folder, "bert", "default", list(map(marked, tokens, types)), types)
