"""What the cards of our results say, from the files themselves."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.metadata import version
from typing import Any

from spectral_surgery.cards.card import COMPRESSED, Facts, as_repository
from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint
from spectral_surgery.files.compressed.difference import base_name
from spectral_surgery.files.compressed.manifest import SUFFIXES, Manifest
from spectral_surgery.files.compressed.plan import CompressOptions
from spectral_surgery.files.header import DTYPE_BITS
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.merge_record import MergeRecord
from spectral_surgery.files.peft.task import class_for, task_of

HERE = "THIS_FOLDER"  # until it has a place on the Hub
_TARGETS = {"density": "sparsity", "bits": "bits", "max_error": "max-error"}
_LIBRARIES = ("torch", "zstandard")
AUTO = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", "SEQ_2_SEQ_LM": "ForSeq2SeqLM"}

_LOAD_COMPRESSED = """\
```bash
pip install spectral-surgery
spectral-surgery decompress {here} ./plain{base}
```

`./plain` is an ordinary checkpoint for every other tool."""

_LOAD_DIRECTLY = """With transformers, compressed in memory too:

```python
import spectral_surgery  # teaches transformers the format
from transformers import AutoModel{task}

model = AutoModel{task}.from_pretrained("{here}")
```

Without the import, `trust_remote_code=True` does the same, unless the model brings code of its own. Without both,
transformers warns that it does not know the format `spectral_surgery`, and starts from random weights.

To get the plain checkpoint back:
"""

_LOAD_SWAPPED = """\
```python
import spectral_surgery  # teaches transformers to rebuild the new layers
from transformers import AutoModel

model = AutoModel.from_pretrained("{here}")
```

Without that import transformers warns, and gives the replaced layers random attention. With
`trust_remote_code=True` the import is done by a file in this folder."""

_LOAD_PLAIN = "As the model it was made from, by its name or folder: this is an ordinary safetensors checkpoint."


def compressed_facts(checkpoint: CompressedCheckpoint, origin: str | None) -> Facts:
    """Facts about a compressed checkpoint.

    Args:
        checkpoint: which one.
        origin: repository it was made from; None asks its configuration.

    Returns:
        Totals, the table of its tensors, and the command that makes the same bytes.
    """
    manifest, index = checkpoint.manifest, checkpoint.index
    origin = origin or as_repository(index.config.get("_name_or_path"))
    total = manifest.report
    stored = {f"{name}.{suffix}" for name in manifest.tensors for suffix in SUFFIXES}
    copied = [info for name, info in index.tensors.items() if name not in stored]
    original = sum(r.report.weights * DTYPE_BITS[r.dtype] // 8 for r in manifest.tensors.values())
    calibration = manifest.options.get("calibration")
    before = base_name(manifest.options)
    of = "differences" if before else "weights"
    what = f"The difference of {linked(origin)} to {before}" if before else linked(origin)
    rows = [
        {
            "tensor": f"`{name}`",
            "shape": " x ".join(map(str, record.shape)),
            "bits per weight": record.report.bits_per_weight,
            "relative error": record.report.relative_error,
            "bytes": record.report.stored_bytes,
        }
        for name, record in manifest.tensors.items()
    ]
    totals = {
        "compressed": f"{len(rows)} tensors, {total.weights:,} weights, {original:,} -> {total.stored_bytes:,} bytes",
        "bits per weight": f"{total.bits_per_weight:.4g}, every stored byte counted",
        "relative error": f"{total.relative_error:.4g}, the norm of the error over that of the {of}",
        "density": f"{total.density:.4g}, the fraction of coefficients kept",
        "copied bit for bit": f"{len(copied)} tensors, {sum(info.nbytes for info in copied):,} bytes",
    }
    if calibration:
        totals["codes chosen by"] = str(calibration)
    if manifest.options.get("importance"):
        totals["coefficients kept for their importance on"] = str(manifest.options["importance"])
    if manifest.options.get("healing"):
        totals["kept coefficients trained on"] = str(manifest.options["healing"])
    return Facts(
        f"{short_name(origin)}, compressed in the frequency domain",
        f"{what} as entropy-coded spectra, made by spectral-surgery.",
        compress_command(manifest.options, origin),
        _usage(index, before),
        sorted(rows, key=lambda row: -int(str(row["bytes"]))),
        totals,
        origin,
        "quantized",
        _library(index),
        (COMPRESSED,),
        _versions(),
    )


def decompressed_facts(
    manifest: Manifest, index: CheckpointIndex, dtype: str | None, origin: str | None = None
) -> Facts:
    """Facts about a plain checkpoint made from a compressed one.

    Args:
        manifest: of the compressed one.
        index: headers of the compressed one.
        dtype: floating tensors were stored in it, if given.
        origin: repository of the compressed one, if it has one.
    """
    before = base_name(manifest.options)
    command = ["spectral-surgery", "decompress", origin or "COMPRESSED", "OUT"]
    command += [*(["--dtype", dtype] if dtype else []), *(["--base", before] if before else [])]
    total = manifest.report
    totals = {
        "tensors decoded": f"{len(manifest.tensors)}, {total.weights:,} weights",
        "relative error": f"{total.relative_error:.4g} of them, from compressing; the others have their original bits",
    }
    return Facts(
        "Decompressed checkpoint",
        "A plain checkpoint decoded from entropy-coded spectra by spectral-surgery.",
        shlex.join(command),
        _LOAD_PLAIN,
        totals=totals,
        relation="quantized",
        library_name=_library(index),
        versions=_versions(),
    )


def merged_facts(record: MergeRecord, index: CheckpointIndex, origin: str | None = None) -> Facts:
    """Facts about a checkpoint with adapters merged into it.

    Args:
        record: of the merge.
        index: headers of the result.
        origin: repository of the base; None asks the configuration.
    """
    base = origin or as_repository(index.config.get("_name_or_path"))
    adapters = [f"ADAPTER_{number + 1}" for number in range(len(record.weights))]
    weights = ["--weights", ",".join(f"{weight:g}" for weight in record.weights)]
    command = ["spectral-surgery", "merge", base or "BASE", *adapters, "OUT"]
    changed = [index.tensors[name] for name in record.tensors if name in index.tensors]
    totals = {
        "adapters": f"{len(adapters)}, with factors {', '.join(f'{weight:g}' for weight in record.weights)}",
        "changed": f"{len(changed)} of {len(index.tensors)} tensors, {sum(info.nbytes for info in changed):,} of "
        f"{index.nbytes:,} bytes",
        "undo": "`spectral-surgery unmerge` gives back the base, bit for bit",
    }
    return Facts(
        f"{short_name(base)}, with adapters merged",
        f"{linked(base)} with {len(adapters)} adapters added to its weights in float32, each sum rounded once.",
        shlex.join(command + (weights if set(record.weights) != {1.0} else [])),
        _LOAD_PLAIN,
        totals=totals,
        base_model=base,
        relation="merge",
        library_name=_library(index),
        tags=("merge",),
    )


def swapped_facts(index: CheckpointIndex, report: Mapping[str, Any]) -> Facts:
    """Facts about a checkpoint with mixers in place of attention.

    Args:
        index: headers of the original.
        report: `SwapReport.to_json`.
    """
    base = as_repository(index.config.get("_name_or_path"))
    layers, training = ",".join(map(str, report["layers"])), report["training"]
    words = ["spectral-surgery", "swap", base or "SOURCE", "OUT", "--mixer", str(report["mixer"]), "--layers", layers]
    for name, value in report["settings"].items():
        words += ["-o", f"{name}={value}"]
    if training:
        words += ["--distill", "TEXT", "--steps", str(training["steps"])]
        words += ["--end-to-end-steps", str(training["end_to_end_steps"])]
        words += ["--learning-rate", str(training["learning_rate"]), "--seed", str(training["seed"])]
    totals = {
        "layers": f"{layers}, now {report['mixer']}",
        "parameters": f"{report['parameters']['before']:,} -> {report['parameters']['after']:,}",
    }
    if report["causal"]:
        totals["causal"] = "replacing later tokens changes no earlier output of a new layer, bit for bit"
    for name, value in report["measures"].items():
        of = {"a": " of the original", "b": " of this model"}.get(name.rpartition("_")[2], "")
        totals[f"{name.removesuffix('_a').removesuffix('_b')}{of}"] = f"{value:.4f}"
    rows = [
        {"layer": fit["layer"], "relative error of its outputs": fit["after"], "before training": fit["before"]}
        for fit in report["layer_errors"]
    ]
    return Facts(
        f"{short_name(base)}, with a spectral mixer for attention",
        f"{linked(base)} with the attention of layer {layers} replaced by the token mixer"
        f" {report['mixer']}. All other weights are those of the original.",
        shlex.join(words),
        _LOAD_SWAPPED.format(here=HERE),
        rows,
        totals,
        base,
        "finetune",
        _library(index),
        ("swapped",),
        {"torch": version("torch")},
    )


def plain_facts(index: CheckpointIndex) -> Facts:
    """Facts about any other checkpoint, such as a merged one."""
    rows = sorted({info.dtype for info in index.tensors.values()})
    totals = {
        "tensors": f"{len(index.tensors)}, {sum(info.numel for info in index.tensors.values()):,} parameters, "
        f"{index.nbytes:,} bytes, {', '.join(rows)}"
    }
    return Facts(
        "Checkpoint",
        "A checkpoint pushed by spectral-surgery.",
        "",
        _LOAD_PLAIN,
        totals=totals,
        base_model=as_repository(index.config.get("_name_or_path")),
        library_name=_library(index),
    )


def compress_command(options: Mapping[str, object], origin: str | None) -> str:
    """The command that makes the same bytes: what the manifest says, without paths of anybody's machine."""
    words = ["spectral-surgery", "compress", origin or "SOURCE", "OUT"]
    defaults = {f.name: f.default for f in fields(CompressOptions) if f.default is not MISSING}
    if options.get("calibration") or options.get("importance"):
        del defaults["allocation"]  # what it is without the option depends on the others
    told = {
        "calibration": ["--calibrate", "TEXT"],  # told by its checksum, not by its path
        "healing": ["--heal", "TEXT"],
        "importance": ["--keep", "important"],
        "base": ["--base", base_name(options) or ""],
    }
    for key, value in options.items():
        if key == "target" and isinstance(value, Mapping):
            words += [f"--{_TARGETS.get(str(value['kind']), value['kind'])}", str(value["value"]).removesuffix(".0")]
        elif key in told:
            words += told[key] if value else []
        elif isinstance(value, list | tuple):
            words += [word for item in value for word in (f"--{key}", str(item))]
        elif value is True:
            words.append(f"--{key.replace('_', '-')}")
        elif value != defaults.get(key):
            words += [f"--{key.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _usage(index: CheckpointIndex, base: str | None) -> str:
    back = _LOAD_COMPRESSED.format(here=HERE, base=f" --base {base}" if base else "")
    if base or _library(index) is None:
        return back  # differences are no model, and other libraries do not ask us
    task = AUTO.get(task_of(index.config) or "", "")
    if class_for(index.config, f"AutoModel{task}") != f"AutoModel{task}":  # it sees before it writes, or only encodes
        task = "ForImageTextToText" if task else task
    return _LOAD_DIRECTLY.format(here=HERE, task=task) + "\n" + back


def _library(index: CheckpointIndex) -> str | None:
    return "transformers" if "model_type" in index.config else None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _LIBRARIES}


def short_name(origin: str | None) -> str:
    """A repository without its owner, for headings."""
    return origin.rpartition("/")[2] if origin else "A checkpoint"


def linked(origin: str | None) -> str:
    """A repository as a link in Markdown."""
    return f"[{origin}](https://huggingface.co/{origin})" if origin else "a checkpoint"
