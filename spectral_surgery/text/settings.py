"""Text to train, calibrate and judge on; light to import, since the command line makes options of the fields."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spectral_surgery.errors import ConfigError

Keep = Literal["calibrated", "important", "largest"]
TaskName = Literal["causal-lm", "classification", "regression", "similarity"]
TRUST = {"help": "Run the code that a model brings along (auto_map in config.json); read it first."}
UNREADABLE = {"help": "Files of a folder that are no image or sound, or broken: refuse, or skip and name them."}


@dataclass(frozen=True)
class TextData:
    """What to calibrate, heal or distil on; 0 stands for what is usual for the work and the model.

    Models with an encoder and a decoder take pairs of a source and a target; those that see or hear, folders of files;
    those that see and write, chats with images.
    """

    file: Path = field(
        metadata={
            "help": "Text, .jsonl or .csv file, also .jsonl of chats; for encoder-decoders of pairs; or a folder of"
            " images or sound. Of what is trained on, a part is held out.",
            "metavar": "PATH",
        }
    )
    samples: int = field(
        default=0,
        metadata={
            "help": "Sequences, chats, pairs or files at most.",
            "least": 1,
            "unset": "to calibrate 512, or 256 images, 128 chats with images, 64 sounds; 20000 to swap, all to heal",
        },
    )
    seq_length: int = field(
        default=0,
        metadata={
            "help": "Tokens of a sequence at most.",
            "least": 2,
            "unset": "256; 128 to heal a model other than a language model",
        },
    )
    batch_size: int = field(
        default=0,
        metadata={
            "help": "Sequences, pairs or files of a step and process.",
            "least": 1,
            "unset": "4 of language models, else 24",
        },
    )
    unreadable: Literal["refuse", "skip"] = field(default="refuse", metadata=UNREADABLE)
    trust_remote_code: bool = field(default=False, metadata=TRUST)

    def digest(self) -> str:
        """What it is, for the manifest and for recognising unfinished work.

        Raises ConfigError when the file cannot be read.
        """
        if self.file.is_dir():
            whole = hashlib.sha256()
            for path in sorted(path for path in self.file.rglob("*") if path.is_file()):
                whole.update(f"{path.relative_to(self.file)}\0{path.stat().st_size}\0".encode())
                whole.update(path.read_bytes())
            return f"sha256:{whole.hexdigest()}"
        if not self.file.is_file():
            raise ConfigError(f"{self.file}: expected a text, .csv or .jsonl file, or a folder, got no such file.")
        return f"sha256:{hashlib.sha256(self.file.read_bytes()).hexdigest()}"


@dataclass(frozen=True)
class EvalData:
    """What to judge models on: text, pairs, or folders of images or sound, as for `TextData`."""

    text: Path | None = field(
        default=None,
        metadata={
            "help": "Text for perplexity and KL of language models, or cosine of sentence encoders, a line being a"
            " sentence; .jsonl of chats; pairs for encoder-decoders; or a folder of images or sound.",
            "metavar": "PATH",
        },
    )
    sts: Path | None = field(
        default=None, metadata={"help": "CSV of sentence pairs and scores: rank correlation of sentence encoders."}
    )
    samples: int = field(
        default=0, metadata={"help": "Sequences, lines, pairs or files at most.", "least": 0, "unset": "all"}
    )
    seq_length: int = field(default=256, metadata={"help": "Tokens of a sequence.", "least": 2})
    unreadable: Literal["refuse", "skip"] = field(default="refuse", metadata=UNREADABLE)
    trust_remote_code: bool = field(default=False, metadata=TRUST)

    @property
    def has_text(self) -> bool:
        """Whether there is any."""
        return self.text is not None or self.sts is not None


@dataclass(frozen=True)
class TrainData:
    """What to train and judge on."""

    file: Path = field(metadata={"help": "Text, .jsonl or .csv file to train on.", "metavar": "FILE"})
    eval_file: Path | None = field(
        default=None, metadata={"help": "Held-out examples.", "unset": "a part of the file to train on"}
    )
    eval_fraction: float = field(default=0.1, metadata={"help": "That part."})
    columns: tuple[str, ...] = field(
        default=(),
        metadata={"help": "Columns to use, texts first, label last: sentence1,sentence2,score", "metavar": "NAMES"},
    )
    task: TaskName | None = field(default=None, metadata={"help": "What to train for.", "unset": "told from the data"})
    seq_length: int = field(default=256, metadata={"help": "Tokens of an example at most.", "least": 2})
    trust_remote_code: bool = field(default=False, metadata=TRUST)

    def to_json(self) -> dict[str, object]:
        """Plain values for the file of metrics, which may be published: no paths of this machine."""
        settings = {"columns": list(self.columns), "seq_length": self.seq_length}
        return settings | ({"eval_data": True} if self.eval_file else {"eval_fraction": self.eval_fraction})


@dataclass(frozen=True)
class ScratchData:
    """What a language model learns from when it starts from nothing."""

    file: Path = field(metadata={"help": "Text, .jsonl or .csv file to learn from.", "metavar": "FILE"})
    columns: tuple[str, ...] = field(
        default=(), metadata={"help": "Of .csv and .jsonl files: the column of the text.", "metavar": "NAME"}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part, after the one to train on, that decides which weights are kept."}
    )
    test_fraction: float = field(default=0.1, metadata={"help": "Part at the end, on which the result is judged once."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder of one, or tiktoken:NAME.", "unset": "learn a byte-level BPE"}
    )
    vocabulary: int = field(default=1024, metadata={"help": "Tokens of that BPE."})
    seq_length: int = field(default=128, metadata={"help": "Tokens of an example.", "least": 2})
