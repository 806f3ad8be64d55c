"""The tensors that belong to the parameters an adapter names: shapes checked, ties kept or undone as PEFT does it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.adapters.base import AdapterState
from spectral_surgery.commands.merge.parameter_layers import is_transposed, name_parameters
from spectral_surgery.commands.merge.plan import MergePlan, Patch, Target
from spectral_surgery.errors import ConfigError, NotMergeableError, SpectralSurgeryError
from spectral_surgery.files.index import CheckpointIndex
from spectral_surgery.files.merge_record import Source
from spectral_surgery.hf.base_model import base_model
from spectral_surgery.hf.tensor_names import Piece, StoredParameter
from spectral_surgery.live.heads import word_table

_DTYPES = ("F32", "BF16", "F16")
OUTPUT = "the output layer"  # that is tied, and whose name nobody knows
_EMBEDDING = re.compile(r"(embed|wte|shared)[^.]*\.weight$", re.IGNORECASE)
_VOCABULARY = re.compile(r"(embed|wte|shared|lm_head|decoder|output|head)", re.IGNORECASE)  # has a row for each token


class Finder:
    """Finds what a merge changes. ``wrong``: what does not fit, in words."""

    def __init__(self, index: CheckpointIndex, states: tuple[AdapterState, ...], weights: tuple[float, ...]) -> None:
        """Name the layers of adapters as the parameters they change."""
        self.base = base_model(index)
        self.wrong: list[str] = []
        named = []
        for state in states:
            renamed, problems = name_parameters(state, self.base)
            named.append(renamed)
            self.wrong += problems
        self._states, self._weights = tuple(named), weights
        self._found: dict[str, Target] = {}
        self._whole: dict[str, Tensor] = {}  # parameters that are replaced
        self._apart: set[str] = set()  # tied parameters that become separate tensors
        self._resized: dict[str, tuple[int, int]] = {}

    def plan(self) -> MergePlan:
        """Everything found; not to be used when something is wrong."""
        for state in self._states:
            self._collect(state)
        self._undo_ties()
        for name, tensor in self._whole.items():
            self._replace(name, tensor)
        self._keep_apart()
        for number, state in enumerate(self._states):
            if any("magnitude" in tensors for tensors in state.layers.values()) and self._weights[number] != 1:
                raise ConfigError(
                    "--weights: expected 1 for an adapter with DoRA, whose magnitudes are those of the whole update,"
                    f" got {self._weights[number]:g}."
                )
            for layer in state.layers:
                self._update(number, state, layer)
            for module, (numbers, values) in state.rows.items():
                self._replace_rows(self.base.named(f"{module}.weight"), numbers, values)
        stored = self.base.index.tensors
        aliases = {a: n for a, n in self._stored_ties().items() if not {a, n} & self._apart_stored()}
        touched = [name for name in self._touched() if name not in self._apart]
        tied = {a: group[0] for name in touched for group in [self.base.tied_with(name)] for a in group[1:]}
        if self.base.hides_ties and any(_EMBEDDING.search(name) for name in touched):
            tied[OUTPUT] = next(name for name in touched if _EMBEDDING.search(name))
        self._check_vocabulary()
        return MergePlan(
            self.base.index,
            self._states,
            self._weights,
            self._found,
            {alias: name for alias, name in aliases.items() if alias in stored},
            tied,
            tuple(sorted(self._apart)),
            self._resized,
            self._config(),
        )

    def _collect(self, state: AdapterState) -> None:
        """Parameters that an adapter has whole."""
        for full, tensor in state.extra.items():
            name = full.replace(".token_adapter", "").replace(".base_layer.", ".")
            parameter = self.base.named(name)
            stored = self.base.names.find(parameter)
            copy = full.endswith(".base_layer.weight")
            if copy and _equal(stored, tensor):
                continue  # PEFT's copy of the base, beside an update
            if parameter in self._whole and not (copy and torch.equal(self._whole[parameter], tensor)):
                self.wrong.append(f"{parameter} is replaced by two adapters, which must be merged one after the other")
            if self.base.hides_ties and _EMBEDDING.search(parameter):
                self.wrong.append(
                    f"{parameter} is tied to an output layer that is not stored, and transformers does not know this"
                    " model,"
                    " so the output layer cannot be kept as PEFT keeps it"
                )
            self._whole[parameter] = tensor

    def _undo_ties(self) -> None:
        """Parameters that were one come apart when an adapter brings one of them, or different ones, as in PEFT."""
        for group in {self.base.tied_with(name) for name in self._whole} - {()}:
            first, *others = (self._whole.get(tied) for tied in group)
            if first is not None and all(value is not None and torch.equal(value, first) for value in others):
                for tied in group[1:]:
                    del self._whole[tied]
            else:
                self._apart.update(group)
        if self._apart:  # a configuration says it for all
            self._apart.update(self.base.ties, self.base.ties.values())

    def _find(self, name: str) -> StoredParameter | None:
        return self.base.names.find(name) if name in self._apart else self.base.find(name)

    def _targets(self, name: str, found: StoredParameter) -> list[tuple[str, Piece]]:
        """Names under which the pieces of a parameter are written."""
        if name in self._apart and not self.base.is_stored(name):
            return [(name, found.pieces[0])]
        return [(self._stored_ties().get(piece.info.name, piece.info.name), piece) for piece in found.pieces]

    def _stored_ties(self) -> dict[str, str]:
        """Second name -> first name of tied parameters that are both stored."""
        pairs = {}
        for alias, name in self.base.ties.items():
            second, root = self.base.names.find(alias), self.base.names.find(name)
            if second and root and second.pieces[0].info != root.pieces[0].info and alias not in self._apart:
                pairs[second.pieces[0].info.name] = root.pieces[0].info.name
        return pairs

    def _apart_stored(self) -> set[str]:
        separate = [self.base.names.find(name) for name in self._apart]
        return {parameter.pieces[0].info.name for parameter in separate if parameter}

    def _replace(self, name: str, tensor: Tensor) -> None:
        stored = self._find(name)
        if stored is None:
            self._found[name] = Target(None, replaced=(Patch(tensor),))
            return
        if stored.shape != tuple(tensor.shape) and not self._resize(name, stored, tensor):
            self.wrong.append(f"{name} is {list(stored.shape)}, in the adapter {list(tensor.shape)}")
            return
        for key, piece in self._targets(name, stored):
            patch = Patch(tensor) if stored.whole is not None else Patch(tensor, piece.spans, piece.transposed)
            target = self._found.get(key, Target(piece.info))
            self._found[key] = replace(target, replaced=(*target.replaced, patch))

    def _keep_apart(self) -> None:
        """Parameters that are stored under the name of another one, and come apart, get separate tensors."""
        for name in self._apart:
            stored = self.base.names.find(name)
            if stored and not self.base.is_stored(name):
                self._found.setdefault(name, Target(stored.pieces[0].info))

    def _resize(self, name: str, found: StoredParameter, tensor: Tensor) -> bool:
        """Whether an embedding, or an output layer, has another number of tokens in the adapter."""
        rows = (found.shape[0], tensor.shape[0])
        tokens = found.shape[0] in _sizes(self.base.index.config) and _VOCABULARY.search(name) is not None
        if not tokens or found.whole is None or found.shape[1:] != tuple(tensor.shape[1:]):
            return False
        self._resized[name] = rows
        return True

    def _update(self, number: int, state: AdapterState, layer: str) -> None:
        name = self.base.named(layer if layer in state.parameters else f"{layer}.weight")
        group = self.base.tied_with(name) if state.spec.targets.ensure_weight_tying else ()
        if group and name != group[0] and name not in self._apart and group[0].removesuffix(".weight") in state.layers:
            return  # the same update as that of the embedding
        stored = self._find(name)
        if stored is None:
            self.wrong.append(f"{name} is not in the base")
            return
        turned = is_transposed(state, layer, self.base) if layer in state.parameters else None
        transposed = self.base.is_transposed(state, layer, stored.shape) if turned is None else turned
        shape = self._resized_shape(name, stored)
        source = Source(number, layer, shape, transposed=transposed).resolved(shape)
        problem = self._misfit(stored, state, source)
        if problem:
            self.wrong.append(problem)
            return
        self._add(name, stored, source)
        if "bias" in state.layers[layer] and "A" in state.layers[layer] and state.spec.method.peft_type == "LORA":
            self._update_bias(source)

    def _update_bias(self, source: Source) -> None:
        name = f"{source.layer}.bias"
        stored = self._find(name)
        if stored is None:
            raise NotMergeableError(
                f"{source.layer}: expected a base with biases for an adapter that has them (lora_bias), got one"
                " without. Keep the adapter beside the model."
            )
        self._add(name, stored, Source(source.number, source.layer, stored.shape))

    def _add(self, name: str, found: StoredParameter, source: Source) -> None:
        for key, piece in self._targets(name, found):
            target = self._found.get(key, Target(piece.info))
            spans = source.spans if found.whole is not None else piece.spans
            part = Source(source.number, source.layer, source.shape, spans, source.transposed, piece.transposed)
            part = _short(part, target.shape)
            self._found[key] = replace(target, sources=(*target.sources, part))

    def _replace_rows(self, name: str, numbers: tuple[int, ...], values: Tensor) -> None:
        stored = self._find(name)
        shape = self._resized_shape(name, stored) if stored else ()
        if stored is None or stored.whole is None or len(shape) != 2:
            self.wrong.append(f"{name} is not in the base as a matrix")
        elif max(numbers) >= shape[0] or values.shape[1] != shape[1]:
            rows = f"{len(numbers)} rows up to {max(numbers)} of {values.shape[1]}"
            self.wrong.append(f"{name} is {list(shape)}, in the adapter {rows}")
        else:
            patch = Patch(values, tuple((row, number, 1) for row, number in enumerate(numbers)))
            for key, piece in self._targets(name, stored):
                target = self._found.get(key, Target(piece.info))
                self._found[key] = replace(target, rows=(*target.rows, patch))

    def _misfit(self, found: StoredParameter, state: AdapterState, source: Source) -> str:
        infos = [piece.info for piece in found.pieces]
        strange = next((info for info in infos if info.dtype not in _DTYPES), None)
        if strange is not None:
            return f"{strange.name} is {strange.dtype}, expected {', '.join(_DTYPES)}"
        if len(source.shape) < 2:
            return f"{infos[0].name} is {list(source.shape)}, no matrix"
        if source.layer in state.parameters:
            return ""
        if state.spec.method.peft_type == "LORA":
            return _lora_misfit(state, source)
        try:
            state.build(source.layer, *source.out_in)
        except NotMergeableError:
            raise
        except SpectralSurgeryError as error:
            return str(error)
        return ""

    def _resized_shape(self, name: str, found: StoredParameter) -> tuple[int, ...]:
        group = self.base.tied_with(name) or (found.name,)
        rows = next((self._resized[other][1] for other in (name, *group) if other in self._resized), None)
        return found.shape if rows is None else (rows, *found.shape[1:])

    def _touched(self) -> list[str]:
        states = self._states
        layers = [
            layer if layer in state.parameters else f"{layer}.weight" for state in states for layer in state.layers
        ]
        rows = [f"{module}.weight" for state in states for module in state.rows]
        return [*map(self.base.named, [*layers, *rows]), *self._whole]

    def _check_vocabulary(self) -> None:
        """Embedding and output layer must have as many rows as each other."""
        if not self._resized or self.base.model is None:
            return
        for module in (word_table(self.base.model), self.base.model.get_output_embeddings()):
            names = [
                name
                for name, candidate in self.base.model.named_modules()
                if candidate is module and module is not None
            ]
            parameter = f"{names[0]}.weight" if names else ""
            stored = self.base.find(parameter) if names else None
            if stored and self._resized_shape(parameter, stored) == stored.shape:
                resized = ", ".join(self._resized)
                self.wrong.append(f"{resized} has another number of rows, and {parameter} is not in the adapter")

    def _config(self) -> dict[str, object]:
        config: dict[str, Any] = dict(self.base.index.config)
        for before, after in self._resized.values():
            config = _with(config, "vocab_size", before, after)
        if self._apart:
            config = {**_with(config, "tie_word_embeddings", True, False), "tie_word_embeddings": False}
        return config


def _lora_misfit(state: AdapterState, source: Source) -> str:
    out, inside = source.out_in
    tensors, rank = state.layers[source.layer], state.spec.config.for_layer(source.layer).r
    expected = {"A": (rank, inside), "B": (out, rank), "bias": (out,)}
    expected["magnitude"] = (inside if source.layer in state.embeddings else out,)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wanted = {key: expected[key] for key in shapes if key in expected}
    if shapes == wanted and {"A", "B"} <= shapes.keys():
        return ""
    return f"{source.layer}: expected {wanted} for a layer of {out} x {inside}, got {shapes} in the adapter"


def _short(source: Source, shape: tuple[int, ...]) -> Source:
    """Without what the stored tensor says already."""
    whole = Source(source.number, source.layer, (), (), source.transposed, source.turned)
    return whole if whole.resolved(shape) == source else source


def _equal(found: StoredParameter | None, tensor: Tensor) -> bool:
    if found is None or found.shape != tuple(tensor.shape):
        return False
    base = found.read()
    return torch.equal(tensor.to(base.dtype), base)


def _sizes(config: Mapping[str, Any]) -> set[int]:
    """All vocabularies of a configuration."""
    sizes = {value for key, value in config.items() if key == "vocab_size" and isinstance(value, int)}
    inner = [_sizes(value) for value in config.values() if isinstance(value, dict)]
    return sizes.union(*inner)


def _with(config: Mapping[str, Any], key: str, old: object, new: object) -> dict[str, Any]:
    """A configuration with another value, wherever it has the old one."""
    return {
        name: _with(value, key, old, new) if isinstance(value, dict) else new if name == key and value == old else value
        for name, value in config.items()
    }
