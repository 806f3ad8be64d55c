"""Train an adapter on a text, push it, and load it with PEFT by the name of its repository.

Run: python examples/train_push_load.py MODEL TEXT OUTPUT_FOLDER [REPO]

MODEL is a folder or org/name. Without REPO nothing is sent anywhere: the push is a dry run, and PEFT loads the folder
that would have been pushed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spectral_surgery import METHODS, AdapterSpec, ModuleTargets, TrainData, TrainSettings, push, resolve, train


def main(model: str, text: Path, out: Path, repository: str | None) -> None:
    method = METHODS["fourierft"]
    config = method.config(n_frequency=64, scaling=150.0)
    spec = AdapterSpec(method, config, ModuleTargets(("q_proj", "v_proj")), base_model=model)
    settings = TrainSettings(learning_rate=3e-2, head_learning_rate=1e-3, steps=20, batch_size=4, eval_every=10)
    report = train(resolve(model), out, TrainData(text, seq_length=64), spec, settings)
    print(f"trained: loss {report.before['loss']:.3f} -> {report.after['loss']:.3f}, {report.adapter_bytes} bytes")

    pushed = push(out, repository or "org/name", dry_run=repository is None)
    print(f"push: {len(pushed.files)} files; {pushed.url or 'not sent, no REPO was given'}")

    base = AutoModelForCausalLM.from_pretrained(model).eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = PeftModel.from_pretrained(base, repository or str(out)).eval()(tokens).logits
    print(f"loaded with PEFT: it changes logits by {float((after - before).norm() / before.norm()):.2%}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
