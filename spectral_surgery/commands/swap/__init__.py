"""swap: mixers in place of the attention of some layers of a checkpoint, trained to do what it did."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from spectral_surgery.cards import card as cards
from spectral_surgery.cards.checkpoints import swapped_card
from spectral_surgery.commands.settings import FitSettings
from spectral_surgery.commands.swap.fit_layers import LayerFit, SwappedPair, distill
from spectral_surgery.errors import ConfigError
from spectral_surgery.files.atomic import partial_folder, publishing
from spectral_surgery.files.header import FLOATS
from spectral_surgery.files.index import CheckpointIndex, read_index
from spectral_surgery.files.peft.task import is_causal
from spectral_surgery.files.reader import DTYPES
from spectral_surgery.files.sidecar_files import check_apart, copy_companions
from spectral_surgery.files.storage import Checkpoint
from spectral_surgery.files.swap_record import SwapRecord
from spectral_surgery.hf.models import load_any, load_tokenizer, outline_model, save_weights
from spectral_surgery.inputs.model_input import equal_shapes
from spectral_surgery.inputs.training import train_and_held_out
from spectral_surgery.live.families import FAMILIES
from spectral_surgery.live.swap import SwapSpec, resolved, shared_copy, swap_attention
from spectral_surgery.mixers import require_causal
from spectral_surgery.progress import Progress, silent
from spectral_surgery.text.examples import read_examples
from spectral_surgery.text.scores import score
from spectral_surgery.text.settings import EvalData, TextData

METRICS_FILE = "swap.json"
_SAMPLES, _SEQ_LENGTH = 20000, 256  # usual
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class SwapPlan:
    """What a swap would do."""

    index: CheckpointIndex
    record: SwapRecord
    causal: bool
    parameters: tuple[int, int]

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "mixer": self.record.mixer,
            "settings": dict(self.record.settings),
            "layers": list(self.record.layers),
            "causal": self.causal,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
        }


@dataclass(frozen=True)
class SwapReport:
    """What a swap did.

    Attributes:
        fits: how well each new layer gives the outputs of the attention it replaces; empty without distillation.
        measures: of the original (``_a``) and of the result (``_b``), by name; empty without text to judge on.
    """

    plan: SwapPlan
    fits: tuple[LayerFit, ...]
    training: FitSettings | None
    measures: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json`` and the file of metrics."""
        return self.plan.to_json() | {
            "leak": 0.0 if self.plan.causal else None,
            "training": asdict(self.training) if self.training else None,
            "layer_errors": [asdict(fit) for fit in self.fits],
            "measures": self.measures,
            "seconds": self.seconds,
        }


def plan_swap(source: Checkpoint, spec: SwapSpec, *, trust_remote_code: bool = False) -> SwapPlan:
    """Check a swap and settle its settings; only headers and the configuration are read.

    Raises CheckpointError when the source is damaged, quantised, compressed or swapped.
    """
    index = read_index(source)
    index.require_plain()
    family = FAMILIES[str(index.config.get("model_type"))]
    model = outline_model(index.root, trust_remote_code=trust_remote_code)
    spec, before = resolved(model, spec), _count(model)
    with torch.device("meta"):
        swap_attention(model, spec.mixer, spec.layers, spec.settings)
    record = SwapRecord(spec.mixer, spec.layers, dict(spec.settings))
    return SwapPlan(index, record, family.causal(model.config), (before, _count(model)))


def swap(
    source: Path,
    out: Path,
    spec: SwapSpec,
    *,
    data: TextData | None = None,
    training: FitSettings | None = None,
    judged_on: EvalData | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> SwapReport:
    """Write a checkpoint with mixers in place of some of its attentions.

    After `import spectral_surgery`, ``from_pretrained`` rebuilds it; all other weights keep their bits.

    Args:
        data: text to train the mixers on; None leaves them as they start.
        training: how; None for the defaults.
        judged_on: text to judge original and result on.
        seed: of what mixers start from at random.
        trust_remote_code: run the code that a model brings along; or say so in data.

    Raises:
        TargetError: when attention is not dense.
    """
    started = time.perf_counter()
    trust_remote_code = trust_remote_code or (data is not None and data.trust_remote_code)
    check_apart(source, out)
    partial_folder(out, overwrite=overwrite)
    plan = plan_swap(source, spec, trust_remote_code=trust_remote_code)
    judged_on = judged_on or EvalData()
    _check_text(plan, data, judged_on)
    pair = _pair(plan, seed, trust_remote_code=trust_remote_code)
    reads = data or judged_on.text or judged_on.sts
    tokenizer = load_tokenizer(plan.index.root, trust_remote_code=trust_remote_code) if reads else None
    fits: list[LayerFit] = []
    if data is not None:
        training = training or FitSettings(seed=seed)
        read = replace(data, samples=data.samples or _SAMPLES)
        where = read, plan.index.root, plan.index.config
        parts = train_and_held_out(*where, pair.teacher, _SEQ_LENGTH, causal=plan.causal)
        batches, held_out = (list(equal_shapes(part, _BATCH_TOKENS)) for part in parts)
        fits = distill(pair, batches, held_out, training, progress)
    dtype = _stored_dtype(plan.index)
    for layer in pair.swapped.values():  # judged as they will be read
        layer.to(dtype).float()
    measures = _measured(pair, tokenizer, judged_on, plan)
    report = SwapReport(plan, tuple(fits), training if data else None, measures, time.perf_counter() - started)
    _write(out, pair.student, report, dtype, overwrite=overwrite)
    return report


def _check_text(plan: SwapPlan, data: TextData | None, judged_on: EvalData) -> None:
    """Refuse text that cannot be read or does not fit, before hours of work."""
    files = {"--distill": data.file if data else None, "--text": judged_on.text, "--sts": judged_on.sts}
    named = [option for option, file in files.items() if file is not None]
    kind = str(plan.index.config.get("model_type"))
    if named and FAMILIES[kind].vision:
        raise ConfigError(f"{named[0]}: expected a model of text with it, got {kind}, which takes images.")
    if judged_on.sts is not None and plan.causal:
        raise ConfigError(f"--sts: expected a sentence encoder with it, got {kind}, which predicts tokens. Use --text.")
    for file in files.values():
        if file is not None:
            read_examples(file)


def _pair(plan: SwapPlan, seed: int, *, trust_remote_code: bool) -> SwappedPair:
    """The model before and after, which share what is not swapped."""
    model = load_any(plan.index.root, dtype=torch.float32, trust_remote_code=trust_remote_code)
    student = shared_copy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swapped = swap_attention(student, plan.record.mixer, plan.record.layers, plan.record.settings)
    if plan.causal:
        first = next(iter(swapped.values())).projected
        require_causal(first, first.width, plan.record.mixer)
    return SwappedPair(model, student, swapped)


def _measured(pair: SwappedPair, tokenizer: Any, data: EvalData, plan: SwapPlan) -> dict[str, float]:
    if data.text is None and data.sts is None:
        return {}
    causal = is_causal(plan.index.config)
    models = [cast(Any, pair.teacher), cast(Any, pair.student)]
    return score(models if causal else [model.base_model for model in models], tokenizer, data, causal=causal)


def _write(out: Path, student: Any, report: SwapReport, dtype: torch.dtype, *, overwrite: bool) -> None:
    index = report.plan.index
    config = {**index.config, "quantization_config": report.plan.record.to_json()}
    with publishing(out, overwrite=overwrite) as folder:
        save_weights(student, folder, dtype)
        copy_companions(index, folder, config)
        (folder / METRICS_FILE).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        cards.write_derived(folder, swapped_card(index, report.to_json()))


def _stored_dtype(index: CheckpointIndex) -> torch.dtype:
    """The dtype that from_pretrained chooses: of config.json, else of the first floating tensor."""
    named = index.config.get("dtype") or index.config.get("torch_dtype")
    names = {str(DTYPES[code]).removeprefix("torch."): DTYPES[code] for code in FLOATS}
    if isinstance(named, str) and named in names:
        return names[named]
    return next((DTYPES[info.dtype] for info in index.tensors.values() if info.dtype in FLOATS), torch.float32)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
