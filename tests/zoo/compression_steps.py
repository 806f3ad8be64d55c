"""Steps of the sweep that compress a model and use it compressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.layers import SpectralWeight
from tests.zoo.compare import differing, distance, more, same_bits, same_values, tensors
from tests.zoo.outcome import NotApplicable, Numbers, command, require, wrong
from tests.zoo.subject import EXACT, Subject

BITS = 4
SMALLEST = 512  # weights of a matrix that is compressed
NEW_TOKENS = 8
OTHER = "saved as another"  # outputs differ by so much once saved and loaded, and those of the plain model alike


def inspect(subject: Subject) -> None:
    """Headers are read."""
    command("inspect", subject.source)


def compress(subject: Subject) -> Numbers:
    """At 4 bits a weight; every large tensor is compressed or named with a reason."""
    report, _ = command(
        "compress", subject.source, subject.compressed, "--bits", str(BITS), "--min-weights", str(SMALLEST)
    )
    done = {own["name"]: own for own in report["tensors"]}
    skipped = {own["name"] for own in report["skipped"]}
    large = {name: x.numel() for name, x in subject.weights.items() if x.ndim >= 2 and x.is_floating_point()}
    unsaid = [name for name in large if name not in done and name not in skipped and name not in report["tied"]]
    require(not unsaid, f"neither compressed nor named as skipped: {unsaid[:4]}")
    require(report["bits_per_weight"] <= BITS + 0.01, f"{report['bits_per_weight']:.3f} bits a weight for {BITS}")
    subject.found["errors"] = {name: own["relative_error"] for name, own in done.items()}
    share = sum(large.get(name, 0) for name in done) / max(sum(large.values()), 1)
    return {"bits": round(report["bits_per_weight"], 3), "compressed": round(share, 3), "tensors": len(done)}


def decompress(subject: Subject) -> Numbers:
    """The same names, shapes and dtypes; errors as reported; what was not compressed bit for bit; loads as before."""
    command("decompress", subject.compressed, subject.plain, "--verify")
    plain, weights, errors = tensors(subject.plain), subject.weights, subject.found["errors"]
    require(plain.keys() == weights.keys(), f"names differ: {sorted(plain.keys() ^ weights.keys())[:4]}")
    for name, tensor in plain.items():
        if name in errors:
            _check_decoded(name, weights[name], tensor, errors[name])
        else:
            require(same_bits(weights[name], tensor), f"{name} was not compressed, but has other bits")
    model, keys = subject.load(subject.plain)
    subject.found["plain"], subject.found["wanted"] = model, subject.outputs(model)
    others = more(keys, subject.keys)
    require(not others, f"loads with {others}")
    return {"lost": round(distance(subject.first, subject.found["wanted"])[0], 3)}


def _check_decoded(name: str, weight: Tensor, decoded: Tensor, error: float) -> None:
    require(weight.shape == decoded.shape and weight.dtype == decoded.dtype, f"{name} has another shape or dtype")
    got = float((weight.float() - decoded.float()).norm()) / max(float(weight.float().norm()), 1e-12)
    allowed = 1.01 * error + (4e-3 if weight.dtype == torch.bfloat16 else 1e-5)
    require(got <= allowed, f"{name}: relative error {got:.4f} where {error:.4f} was reported")


def load_compressed(subject: Subject) -> Numbers:
    """from_pretrained of the compressed folder gives the outputs of the decompressed model."""
    model, keys = subject.load(subject.compressed)
    subject.found["compressed"] = model
    others = more(keys, subject.keys)
    require(not others, f"loads with {others}")
    subject.found["outputs"] = subject.outputs(model)
    error, where = distance(subject.found["wanted"], subject.found["outputs"])
    if error > subject.tolerance and subject.half:
        error, where = _in_float32(subject)
    require(error <= subject.tolerance, f"outputs differ by {error:.2g} in {where}")
    kind, wanted = getattr(model, "dtype", None), subject.found["plain"].dtype
    require(kind == wanted, f"model.dtype is {kind}, {wanted} for the decompressed model")
    return {"error": error, "share": round(min(resident_share(subject.compressed, model), 1.0), 3)}


def _in_float32(subject: Subject) -> tuple[float, str]:
    """The same where nothing is rounded on the way; a difference of bfloat16 may come from the order of sums."""
    ours, plain = subject.pair_in_float32()
    error, where = distance(subject.outputs(plain), subject.outputs(ours))
    return (error, where) if error > EXACT else (0.0, "")


def resident_share(folder: Path, model: Any) -> float:
    """Of the weights that are compressed in the folder, those that are spectra in the model."""
    tensors_of = json.loads((folder / "spectral_surgery.json").read_text())["tensors"]
    stored = sum(torch.Size(own["shape"]).numel() for own in tensors_of.values())
    held = {id(own): own.shape[0] * own.shape[1] for own in model.modules() if isinstance(own, SpectralWeight)}
    return sum(held.values()) / max(stored, 1)


def generate(subject: Subject) -> None:
    """Greedy tokens of the compressed model are those of the decompressed one."""
    compressed, plain = subject.found["compressed"], subject.found["plain"]
    if not hasattr(plain, "generate") or not plain.can_generate():
        raise NotApplicable("the class does not generate")
    try:
        wanted = _tokens(subject, plain)
    except Exception as error:
        raise NotApplicable(f"the plain model cannot generate from these inputs: {type(error).__name__}") from error
    got = _tokens(subject, compressed)
    if not _same(wanted, got) and subject.half:
        got, wanted = (_tokens(subject, model) for model in subject.pair_in_float32())
    require(_same(wanted, got), f"tokens {got.flatten()[-8:].tolist()} for {wanted.flatten()[-8:].tolist()}")


def _same(wanted: Tensor, got: Tensor) -> bool:
    """Equal tokens; spectrograms, which some models generate, as near as outputs have to be."""
    if not wanted.is_floating_point():
        return torch.equal(wanted, got)
    return distance({"generated": wanted}, {"generated": got})[0] <= EXACT


def _tokens(subject: Subject, model: Any) -> Tensor:
    inputs = {n: x for n, x in subject.entry.make_inputs(model, 3).items() if not n.startswith("decoder_")}
    torch.manual_seed(5)
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)
    found = made if isinstance(made, Tensor) else getattr(made, "sequences", None)
    if not isinstance(found, Tensor):
        raise NotApplicable("generate returns no tokens")
    return found


def resave(subject: Subject) -> Numbers:
    """save_pretrained of the compressed model: loads to equal outputs, and decompresses to the same bits.

    Where transformers saves the plain model as another one, the compressed model has to become the same other one.
    """
    _require_saving(subject)
    folder, plain = subject.folder / "again", subject.folder / "plain_again"
    subject.found["compressed"].save_pretrained(folder)
    model, keys = subject.load(folder)
    others = more(keys, subject.keys)
    require(not others, f"loads with {others}")
    found, wanted, numbers = subject.outputs(model), tensors(subject.plain), {}
    error, where = distance(subject.found["outputs"], found)
    limit = 1e-3 if subject.half else 1e-6
    if error > limit and subject.saved_error > subject.tolerance:
        numbers, limit = {OTHER: error}, subject.tolerance
        outputs, wanted = subject.saved_plain()
        error, where = distance(outputs, found)
    require(error <= limit, f"outputs differ by {error:.2g} in {where}")
    command("decompress", folder, plain, "--verify")
    difference = differing(wanted, tensors(plain), same_values)
    require(not difference, f"decompressed from what was saved: other {difference}")
    return numbers


def _require_saving(subject: Subject) -> None:
    """Raises NotApplicable where transformers loses something of the plain model too."""
    if subject.lost:
        raise NotApplicable(subject.lost)


def dequantize(subject: Subject) -> Numbers:
    """model.dequantize() has the outputs of the decompressed model, is saved as a plain one and loads again."""
    folder = subject.folder / "dequantized"
    model = subject.found.pop("compressed")  # the last step that uses it
    model.dequantize()
    error, where = distance(subject.found["wanted"], subject.outputs(model))
    require(error <= subject.tolerance, f"outputs differ by {error:.2g} in {where}")
    _require_saving(subject)
    model.save_pretrained(folder)
    again, keys = subject.load(folder)
    others = more(keys, subject.keys)
    require(not others, f"the saved one loads with {others}")
    left = (json.loads((folder / "config.json").read_text()).get("quantization_config") or {}).get("quant_method")
    if left:
        wrong(f"config.json still says quant_method {left}")
    found, numbers = subject.outputs(again), {}
    error, where = distance(subject.found["wanted"], found)
    if error > subject.tolerance and subject.saved_error > subject.tolerance:
        numbers = {OTHER: error}
        error, where = distance(subject.saved_plain()[0], found)
    require(error <= subject.tolerance, f"outputs of the saved one differ by {error:.2g} in {where}")
    return numbers
