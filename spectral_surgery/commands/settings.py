"""Settings of single commands; light to import, since the command line makes options of the fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from spectral_surgery.text.settings import TRUST, Keep, TextData
from spectral_surgery.training.settings import DistillSettings


@dataclass(frozen=True)
class Healing:
    """Healing as the last stage of a compression."""

    data: TextData
    settings: DistillSettings = field(default_factory=DistillSettings)
    keep: Keep | None = field(
        default=None,
        metadata={
            "help": "With --sparsity and --heal, without --calibrate: keep what calibration on the text of --heal"
            " chooses, the coefficients that count most on it, or the largest.",
            "unset": "calibrated of language models, else important",
        },
    )


@dataclass(frozen=True)
class Reference:
    """What else is put into the table of models."""

    others: tuple[Path, ...] = field(default=(), metadata={"help": "More checkpoints like B."})
    baselines: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "Also judge A as baselines would leave it, with the matrices that compressed models compress: int8,"
            " int4, int3, int2, nf4, hqq4, hqq3, hqq2, gptq4, gptq3, gptq2, prune, wanda, sparsegpt, svd, or all.",
            "metavar": "NAME,...",
        },
    )
    bits: float | None = field(
        default=None,
        metadata={"help": "Bits per weight of prune, wanda, sparsegpt and svd.", "unset": "those of each compressed B"},
    )
    calibration: TextData | None = field(
        default=None, metadata={"help": "Text for baselines that need some: gptq, wanda, sparsegpt."}
    )

    @property
    def has_models(self) -> bool:
        """Whether there is anything."""
        return bool(self.others or self.baselines)


@dataclass(frozen=True)
class FitSettings:
    """How to train mixers."""

    steps: int = field(default=500, metadata={"help": "Steps of each layer alone, one batch each.", "least": 0})
    end_to_end_steps: int = field(default=0, metadata={"help": "Then steps of the whole swapped model.", "least": 0})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "Of AdamW at its largest; it rises, and falls to 0 as a cosine.", "above": 0}
    )
    end_to_end_learning_rate: float = field(
        default=3e-4, metadata={"help": "The same of the second stage.", "above": 0}
    )
    seed: int = field(default=0, metadata={"help": "Seed of random starts and of the order of the text."})


@dataclass(frozen=True)
class Running:
    """How a model is held in memory."""

    resident: Literal["auto", "int8", "int12", "int4", "int5", "coded", "streamed"] | None = field(
        default=None,
        metadata={
            "help": "How compressed weights are held: one byte, one and a half, half a byte, five bits, as stored, or"
            " in host memory and streamed to a GPU.",
            "unset": "int8 where codes fit, else int12",
        },
    )
    max_memory: int | None = field(
        default=None, metadata={"help": "Memory for compressed weights: 500MB, 2GB.", "bytes": True, "metavar": "SIZE"}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, ..."})
    dtype: str | None = field(
        default=None, metadata={"help": "Compute in float32, bfloat16, ... instead of the stored type."}
    )
    adapter: Path | None = field(default=None, metadata={"help": "Folder of an adapter to put on the model."})
    trust_remote_code: bool = field(default=False, metadata=TRUST)
