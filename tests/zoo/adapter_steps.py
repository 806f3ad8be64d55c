"""Steps of the sweep about adapters: inject, merge, unmerge, and what PEFT makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.zoo.compare import differing, distance, more, tensors
from tests.zoo.outcome import NotApplicable, Numbers, command, require
from tests.zoo.subject import EXACT, MERGED, Subject

OPTIONS = ("-o", "n_frequency=50", "-o", "init_weights=false", "-o", "scaling=20")
LIVE = "live differs"  # by so much, from what PEFT itself merges
SEEN = 1e-3  # relative change of the outputs that an adapter must make to show anything, in float32


def adapter(subject: Subject) -> Path:
    return subject.folder / "adapter"


def inject(subject: Subject) -> Numbers:
    """A FourierFT adapter for all linear layers, from the headers."""
    method = ("--method", "fourierft", "--target-modules", "all-linear")
    report, _ = command("inject", subject.source, adapter(subject), *method, *OPTIONS)
    subject.found["layers"] = len(report["layers"])
    require(subject.found["layers"] > 0, "exit code 0, and an adapter of no layer")
    return {"layers": subject.found["layers"]}


def merge(subject: Subject) -> None:
    """The adapter is merged from files, and the result loads as the original does."""
    command("merge", subject.source, adapter(subject), subject.folder / "merged")
    model, keys = subject.load(subject.folder / "merged", torch.float32)
    others = more(keys, subject.keys)
    require(not others, f"the merged model loads with {others}")
    subject.found["merged"] = subject.outputs(model)


def unmerge(subject: Subject) -> None:
    """The original comes back bit for bit."""
    command("unmerge", subject.folder / "merged", subject.folder / "unmerged")
    difference = differing(subject.weights, tensors(subject.folder / "unmerged"))
    require(not difference, f"other {difference}")


def peft(subject: Subject) -> Numbers:
    """PEFT puts the adapter on every layer of it, and has the outputs of the merged model: live, or merged by itself.

    PEFT's live model has other outputs than what it merges where layers share a weight, or where a model reads a weight
    without running the layer.
    """
    base, _ = subject.load(subject.source, torch.float32)
    before = subject.outputs(base)
    live = plain_with_adapter(subject, base)
    used, wanted = adapted(live), subject.found["layers"]
    require(used == wanted, f"PEFT uses {used} of {wanted} layers of the adapter")
    found = subject.outputs(live, base)
    moved = distance(before, found)[0]
    require(moved > 0, "the adapter changes nothing")
    if "merged" not in subject.found:
        return {"layers": used, "moved": moved}
    error, where = distance(found, subject.found["merged"])
    allowed = MERGED[subject.entry.dtype]
    if error > allowed:
        merged = subject.outputs(live.merge_and_unload(), base)
        again, where = distance(merged, subject.found["merged"])
        require(
            again <= allowed, f"what PEFT merges differs by {again:.2g}, and its live model by {error:.2g}, in {where}"
        )
        return {"layers": used, "moved": moved, LIVE: error}
    require(error <= allowed, f"outputs of PEFT and of the merged model differ by {error:.2g} in {where}")
    if not subject.half and moved > SEEN:
        require(error < moved / 4, f"outputs differ by {error:.2g} where the adapter changes {moved:.2g}")
    return {"layers": used, "moved": moved, "error": error}


def adapted(model: Any) -> int:
    """Layers on which PEFT has put FourierFT."""
    return sum(1 for module in model.modules() if hasattr(module, "fourierft_spectrum"))


def peft_compressed(subject: Subject) -> Numbers:
    """PEFT on the compressed model has the outputs of PEFT on the decompressed one."""
    base, plain = subject.pair_in_float32()
    wanted = subject.outputs(plain_with_adapter(subject, plain), plain)
    error, where = distance(wanted, subject.outputs(with_adapter(subject, base), base))
    require(error <= EXACT, f"outputs differ by {error:.2g} in {where}")
    return {"error": error}


def plain_with_adapter(subject: Subject, plain: Any) -> Any:
    """The same on a plain model, without anything of ours.

    Raises:
        NotApplicable: when PEFT asks for input embeddings, to see what is tied to them, and the class has none.
    """
    try:
        return with_adapter(subject, plain)
    except (NotImplementedError, AttributeError) as error:
        if "get_input_embeddings" not in str(error) and "'Parameter' object has no attribute" not in str(error):
            raise
        raise NotApplicable("PEFT asks for input embeddings, which the class has not") from error


def with_adapter(subject: Subject, base: Any) -> Any:
    """PEFT's model, in eval mode."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter(subject))).eval()
