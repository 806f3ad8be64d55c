"""How to train, and how large a new model is; light to import, since the command line makes options of the fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from spectral_surgery.errors import ConfigError

_STEPS = 400  # of a distillation that has no time limit
# Learning rates: what was only rounded or cut off moves far; what was fitted to text is lost by steps as large. Loss of
# a model of 135 M parameters after 12 steps, over that of the same text before them: 0.85 at 0.002, 1.2 at 0.005.
_ROUGH, _FINE = 0.03, 0.002


@dataclass(frozen=True)
class DistillSettings:
    """How to distil.

    The learning rate rises over the warmup steps, and then falls as a cosine of the steps, or of the time, to a
    twentieth. With minutes, training ends with the step and the evaluation that fit, as long as the last few took.
    """

    steps: int | None = field(default=None, metadata={"help": "Optimizer steps.", "least": 1, "unset": str(_STEPS)})
    minutes: float = field(
        default=0.0,
        metadata={
            "help": "Time budget in minutes, from reading to the result, instead of steps.",
            "above": 0,
            "unset": "",
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Of Adam, in units of a weight's coefficients.",
            "flags": ("--lr",),
            "unset": f"{_ROUGH:g}, or {_FINE:g} of coefficients that text chose",
        },
    )
    warmup_steps: int = field(default=20, metadata={"help": "Steps over which the learning rate rises."})
    eval_every: int = field(default=50, metadata={"help": "Steps between evaluations on held-out text.", "least": 1})
    patience: int = field(
        default=4, metadata={"help": "Evaluations without improvement before stopping; 0 for never.", "least": 0}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16.", "unset": "where products of it are fast"}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the batches."})

    def __post_init__(self) -> None:
        """Settle the steps, 0 where time is what counts, and refuse what cannot be meant.

        Raises ConfigError when the learning rate is not positive, or there are not either steps or minutes.
        """
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate: expected a positive number, got {self.learning_rate}.")
        if self.steps and self.minutes > 0:
            raise ConfigError(f"--steps: expected it or --minutes, got both: {self.steps} and {self.minutes:g}.")
        if self.steps is None:
            object.__setattr__(self, "steps", 0 if self.minutes > 0 else _STEPS)
        elif self.steps < 1 and not self.minutes > 0:
            raise ConfigError(f"--steps: expected 1 or more, or --minutes, got {self.steps}.")

    def rate(self, *, fitted: bool) -> float:
        """The learning rate, of coefficients that were fitted to text before or not."""
        return self.learning_rate or (_FINE if fitted else _ROUGH)


@dataclass(frozen=True)
class TrainSettings:
    """How to train; names as in transformers where it has them."""

    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak of the schedule.", "flags": ("--lr",), "unset": "what is usual for the method"},
    )
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Of heads and biases trained with an adapter."})
    epochs: float = field(default=3, metadata={"help": "Passes over the data."})
    steps: int = field(default=0, metadata={"help": "Optimizer steps, instead of epochs.", "least": 0, "unset": ""})
    batch_size: int = field(default=32, metadata={"help": "Examples of a step, over all processes.", "least": 1})
    gradient_accumulation: int = field(
        default=1, metadata={"help": "Batches of a process whose gradients make one step.", "least": 1}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    warmup_ratio: float = field(
        default=0.06, metadata={"help": "Part of the steps over which the learning rate rises.", "least": 0, "most": 1}
    )
    scheduler: str = field(default="linear", metadata={"help": "linear, cosine, constant, ..."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    eval_every: int = field(
        default=0, metadata={"help": "Steps between evaluations.", "least": 0, "unset": "once per epoch"}
    )
    patience: int = field(
        default=0, metadata={"help": "Evaluations without improvement before stopping.", "least": 0, "unset": "never"}
    )
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu or cuda.", "unset": "what is there"})


SCRATCH_RATE = 3e-3
FROM_SCRATCH = TrainSettings(learning_rate=SCRATCH_RATE, weight_decay=0.01, scheduler="cosine")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of an FFTNet, by the names of its configuration."""

    d_model: int = field(default=128, metadata={"help": "Width.", "least": 1})
    num_layers: int = field(default=4, metadata={"help": "Blocks.", "least": 1})
    num_heads: int = field(default=16, metadata={"help": "Groups of channels that share a filter.", "least": 1})
    mlp_hidden_dim: int = field(default=32, metadata={"help": "Width of the MLP that adapts the filters.", "least": 1})
    ff_hidden_dim: int | None = field(
        default=None, metadata={"help": "Width of the MLP of a block.", "least": 1, "unset": "4 times the width"}
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Prompt and answer at most, in tokens.", "least": 2, "unset": "tokens of an example"},
    )
    kernel_length: int | None = field(
        default=None, metadata={"help": "Tokens seen in a layer.", "least": 2, "unset": "tokens of an example"}
    )
    chunk: int = field(default=32, metadata={"help": "Tokens after which the filters adapt to the text.", "least": 1})
    dropout: float = field(default=0.1, metadata={"help": "Dropout in training.", "least": 0, "below": 1})
    layer_norm: bool = field(default=True, metadata={"help": "Whether there are norms."})
    sinusoidal_positions: bool = field(default=True, metadata={"help": "Add sinusoids to embeddings."})
    init_std: float = field(default=0.02, metadata={"help": "Spread of the filters at the start.", "least": 0})
