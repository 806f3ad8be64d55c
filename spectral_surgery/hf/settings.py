"""How a model continues a text; light to import, since the command line makes options of the fields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = field(default=128, metadata={"help": "New tokens at most.", "least": 1})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token.", "least": 0})
    top_k: int = field(default=0, metadata={"help": "Choose among the likeliest tokens; 0 for all.", "least": 0})
    top_p: float = field(
        default=1.0, metadata={"help": "Choose among the likeliest tokens of this probability.", "above": 0, "most": 1}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choices."})
