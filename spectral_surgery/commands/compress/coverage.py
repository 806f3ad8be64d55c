"""What a calibration reached, and why not the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from spectral_surgery.adapters.layer import is_conv1d
from spectral_surgery.calibration.block_streaming import LazyModel
from spectral_surgery.files.compressed.plan import Plan, PlannedTensor
from spectral_surgery.hf.quantizer.fused_experts import expert_matrices


@dataclass(frozen=True)
class Calibrated:
    """What calibration left in one matrix.

    Attributes:
        output_error: relative error of the outputs of its layer, on the text.
        block: of the model that it was calibrated with; empty when the model was run as a whole.
        rows: of the tensor seen as one matrix, from and to: all, or those of one expert.
    """

    name: str
    output_error: float
    block: str
    rows: tuple[int, int]


@dataclass(frozen=True)
class Coverage:
    """What a calibration reached."""

    matrices: tuple[int, int]
    weights: tuple[int, int]
    left: dict[str, str]
    whole: bool
    layers: tuple[Calibrated, ...]

    @property
    def largest(self) -> Calibrated:
        """The layer with the largest relative error of its outputs."""
        return max(self.layers, key=lambda layer: layer.output_error)

    def to_json(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        return {
            "matrices": self.matrices[0],
            "of_matrices": self.matrices[1],
            "weights": self.weights[0],
            "of_weights": self.weights[1],
            "as_a_whole": self.whole,
            "largest_output_error": {"name": self.largest.name, "relative_error": self.largest.output_error},
            "not_calibrated": [{"name": name, "reason": reason} for name, reason in self.left.items()],
        }


def coverage_of(plan: Plan, done: Sequence[Calibrated], reasons: Mapping[str, str]) -> Coverage:
    """Count what was reached."""
    reached: set[tuple[str, int, int]] = set()  # blocks may share layers
    whole = False
    for layer in done:
        reached.add((layer.name, *layer.rows))
        whole = whole or not layer.block
    rows: Counter[str] = Counter()
    for name, start, stop in reached:
        rows[name] += stop - start
    sizes = {tensor.info.name: tensor for tensor in plan.tensors}
    full = [name for name, tensor in sizes.items() if rows[name] == tensor.rows]
    left = {name: reasons[name] for name in sizes if name not in full}
    for name in left.keys() & rows.keys():
        left[name] = f"{sizes[name].rows - rows[name]} of {sizes[name].rows} rows, of experts that no token came to"
    weights = sum(count * sizes[name].columns for name, count in rows.items())
    return Coverage((len(full), len(sizes)), (weights, plan.weights), left, whole, tuple(done))


def reasons_of(lazy: LazyModel, plan: Plan) -> dict[str, str]:
    """Why each tensor would not be calibrated, if it is not."""
    model, names, prefixes = lazy.model, lazy.names, lazy.chain.prefixes or ("",)
    owners: dict[str, tuple[str, str, nn.Module]] = {}
    for path, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            parameter = names.find(f"{path}.{leaf}")
            for piece in parameter.pieces if parameter else ():
                owners.setdefault(piece.info.name, (path, leaf, module))
    kind = type(model).__name__
    unclear = {name for stored in names.unclear.values() for name in stored}
    reasons = {}
    for tensor in plan.tensors:
        name = tensor.info.name
        if name in owners:
            reasons[name] = _reason(tensor, *owners[name], prefixes)
        elif name in unclear:
            reasons[name] = f"{kind} holds it in another form than it is stored"
        else:
            reasons[name] = f"no part of {kind}, which is what is run: a head, or for other input than text"
    return reasons


def seen_by_expert(tensor: PlannedTensor) -> bool:
    """Whether a tensor is compressed as the matrix that it is, or as those of experts below each other."""
    return len(tensor.info.shape) == 2 or tensor.columns == tensor.info.shape[-1]


def _reason(tensor: PlannedTensor, path: str, leaf: str, module: nn.Module, prefixes: tuple[str, ...]) -> str:
    if isinstance(module, nn.Embedding):
        return "an embedding, which is looked up and not multiplied by"
    linear = isinstance(module, nn.Linear) or is_conv1d(module)
    if not (leaf == "weight" if linear else leaf in expert_matrices(module)):
        return f"{leaf} of a {type(module).__name__}: no matrix of a linear layer, nor of experts of a known form"
    if not seen_by_expert(tensor):
        return "compressed as one matrix, as its name does not say that it holds those of experts"
    return "no token of the text came to it" if path.startswith(prefixes) else "outside of the list of blocks"
