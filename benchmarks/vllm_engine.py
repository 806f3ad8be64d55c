"""Log-probabilities by vLLM, in a process of its engine alone.

vLLM 0.32 cannot start an engine where llvmlite, on which our kernels rest, has been imported. It may come later.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_surgery.errors import SpectralSurgeryError

PROMPTS, NEW = (40, 7, 1), 8  # lengths of prompts of random tokens, and tokens written after each
_TOKENS = 500  # prompts have none above
_LAST = 60  # words of an error

Written = list[tuple[list[int], Tensor]]  # all tokens of a sequence, and log-probabilities after the first of them


class NotRunError(SpectralSurgeryError):
    """vLLM does not run such a folder here."""


def in_vllm(folder: Path, *, load_format: str, dtype: torch.dtype, compiled: bool, scratch: Path) -> Written:
    """Run a model in vLLM: [tokens - 1, vocabulary] for each prompt and what is written after it, most likely first.

    Raises NotRunError with the last lines of vLLM when it fails.
    """
    file = scratch / "vllm.safetensors"
    words = [str(folder), load_format, str(dtype).removeprefix("torch."), str(int(compiled)), str(file)]
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process
    done = subprocess.run(  # noqa: S603 - of this file
        [sys.executable, "-m", "benchmarks.vllm_engine", *words],
        env=variables,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotRunError(f"vLLM: {' '.join(done.stderr.split()[-_LAST:])}")
    found = load_file(file)
    return [(found[f"tokens.{n}"].tolist(), found[f"numbers.{n}"]) for n in range(len(PROMPTS))]


def _main(words: Sequence[str]) -> None:
    from vllm import LLM, SamplingParams

    folder, load_format, dtype, compiled, file = words
    engine: Any = LLM(
        folder,
        load_format=load_format,
        dtype=dtype,
        enforce_eager=compiled == "0",
        max_model_len=128,
        max_num_seqs=4,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=1 << 26,
    )
    seeds = {count: torch.Generator().manual_seed(count) for count in PROMPTS}
    prompts = [torch.randint(3, _TOKENS, (count,), generator=seeds[count]).tolist() for count in PROMPTS]
    settings = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=-1, logprobs=-1, detokenize=False, ignore_eos=True
    )
    tensors = {}
    for number, one in enumerate(engine.generate([{"prompt_token_ids": ids} for ids in prompts], settings)):
        steps = [*(step for step in one.prompt_logprobs if step is not None), *one.outputs[0].logprobs]
        numbers = torch.tensor([[step[token].logprob for token in sorted(step)] for step in steps])
        tensors[f"numbers.{number}"] = numbers.double()
        tensors[f"tokens.{number}"] = torch.tensor([*one.prompt_token_ids, *one.outputs[0].token_ids])
    save_file(tensors, file)


if __name__ == "__main__":
    _main(sys.argv[1:])
