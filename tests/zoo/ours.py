"""Models that transformers does not have: of this project, and with code of their own."""

from __future__ import annotations

from typing import Any

from tests.zoo.entry import CAUSAL, MASKED, Entry
from tests.zoo.inputs import masked_text, text
from tests.zoo.settings import TOKENS, Settings

FFTNET: Settings = TOKENS | {"d_model": 64, "num_layers": 2, "num_heads": 4, "ff_hidden_dim": 128, "max_seq_length": 64}


def _own_code() -> Any:
    from tests.zoo.own_code import TinyConfig, TinyForCausalLM

    return TinyForCausalLM(TinyConfig(architectures=["TinyForCausalLM"]))


OURS = (
    Entry("fftnet", CAUSAL, text, FFTNET),
    Entry("fftnet-masked", MASKED, masked_text, FFTNET, model_type="fftnet"),
    Entry("own-code", CAUSAL, text, model_type="zoo_own_code", own_code=_own_code),
)
