"""How PEFT stores LoRA: other names and shapes for embeddings and convolutions, and what some variants add.

Here A is [R, I] and B [O, R] whatever the module. PEFT has A [R, O] and B [I, R] for an embedding of O rows, A [R, C,
kh, kw] and B [O, R, 1, 1] for a convolution, and the magnitude of DoRA in the shape that its norm comes out in.
Source: PEFT 0.21.2, `tuners/lora/layer.py` and `tuners/trainable_tokens/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.errors import CheckpointError
from spectral_surgery.files.header import named

_ROWS = ".token_adapter.trainable_tokens_delta"
_INPUT = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "shared", "embed_in")
Layers = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Plain:
    """Layers of an adapter, every one as a matrix.

    ``layers``: tensors by layer and key: A [R, I], B [O, R], bias [O], magnitude [O], or [I] of an embedding.
    """

    layers: Layers
    embeddings: frozenset[str] = frozenset()
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)


def as_matrices(stored: Mapping[str, Mapping[str, Tensor]]) -> Plain:
    """Give every layer the shapes that a linear layer has."""
    layers: Layers = {}
    embeddings, kernels = set(), {}
    for layer, tensors in stored.items():
        factors = dict(tensors)
        if "embedding_A" in factors and "embedding_B" in factors:
            a, b = factors.pop("embedding_A"), factors.pop("embedding_B")
            factors |= {"A": b.T.contiguous(), "B": a.T.contiguous()}
            embeddings.add(layer)
        elif "A" in factors and factors["A"].dim() > 2:
            kernels[layer] = tuple(factors["A"].shape[2:])
            factors |= {key: factors[key].flatten(1) for key in ("A", "B") if key in factors}
        if "magnitude" in factors:
            factors["magnitude"] = factors["magnitude"].flatten()
        layers[layer] = factors
    return Plain(layers, frozenset(embeddings), kernels)


def as_stored(state: AdapterState) -> Layers:
    """The reverse of `as_matrices`."""
    layers: Layers = {}
    for layer, tensors in state.layers.items():
        factors, kernel = dict(tensors), state.kernels.get(layer)
        if layer in state.embeddings:
            factors |= {"embedding_A": factors.pop("B").T.contiguous(), "embedding_B": factors.pop("A").T.contiguous()}
        elif kernel is not None:
            ones = (1,) * len(kernel)
            factors["A"] = factors["A"].reshape(len(factors["A"]), -1, *kernel)
            factors["B"] = factors["B"].reshape(*factors["B"].shape, *ones)
            if "magnitude" in factors:
                factors["magnitude"] = factors["magnitude"].reshape(1, -1, *ones)
        layers[layer] = factors
    return layers


def misfits(plain: Plain, config: Mapping[str, object]) -> list[str]:
    """Tensors that are there, or are not, against what adapter_config.json says, in words."""
    problems = []
    for layer, factors in plain.layers.items():
        problems += [f"{layer}.lora_{key} is unexpected" for key in factors if key.startswith("embedding_")]
        for key, name, said in (
            ("magnitude", "lora_magnitude_vector", "use_dora"),
            ("bias", "lora_B.bias", "lora_bias"),
        ):
            if (key in factors) != bool(config.get(said)):
                problems.append(f"{layer}.{name} is {'unexpected' if key in factors else 'missing'}: {said} says so")
    return problems


def features(state: AdapterState) -> dict[str, object]:
    """What adapter_config.json says of it beyond the settings."""
    keys = {key for factors in state.layers.values() for key in factors}
    return {"lora_bias": "bias" in keys, "use_dora": "magnitude" in keys}


def trained_rows(
    tensors: Mapping[str, Tensor], config: Mapping[str, object], where: str
) -> dict[str, tuple[tuple[int, ...], Tensor]]:
    """Rows of embeddings that were trained, PEFT's trainable_token_indices.

    Raises CheckpointError when numbers and rows do not belong together.
    """
    asked = config.get("trainable_token_indices")
    found: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.endswith(_ROWS):
            continue
        module = name.removesuffix(_ROWS)
        numbers = asked
        if isinstance(asked, dict):
            numbers = next((indices for end, indices in asked.items() if f".{module}".endswith(f".{end}")), None)
        rows = tuple(n for n in numbers if type(n) is int and n >= 0) if isinstance(numbers, list) else ()
        if tensor.dim() != 2 or numbers != list(rows) or not len(rows) == len(tensor) == len({*rows}):
            raise CheckpointError(
                f"{where}: expected a row for each of trainable_token_indices, got {named([asked])}, and shape"
                f" {list(tensor.shape)} of {name}. Save the adapter again, or fetch it again."
            )
        found[module] = (rows, tensor)
    return found


def is_rows(name: str) -> bool:
    """Whether a tensor holds trained rows of an embedding."""
    return name.endswith(_ROWS)


def is_base_copy(name: str, layers: Mapping[str, object]) -> bool:
    """Whether PEFT stored a weight of the base beside its adapter, or an embedding whole because it was resized."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return False
    if module.endswith(".base_layer"):
        known = module.removesuffix(".base_layer")
        return leaf == "weight" and (known in layers or known.endswith(_ROWS.rpartition(".")[0]))
    return module.rpartition(".")[2] in (*_INPUT, "lm_head", "embed_out", "output_embeddings", "output_projection")
