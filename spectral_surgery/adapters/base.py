"""What an adapter is: a weight update of one linear map, kept as a few numbers and applied to activations.

Weights are [O, I]; a layer that stores them otherwise is turned at the border.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor, nn

from spectral_surgery.targets import ModuleTargets


@runtime_checkable
class Adapter(Protocol):
    """A residual on a linear map: y = x Wᵀ + adapter(x). Implemented by `nn.Module`s with float32 parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """The residual of activations.

        ``x`` is [..., I], any float dtype. Returns [..., O] in the dtype of x, computed in float32; differentiable in x
        and the parameters.
        """
        ...

    def delta_weight(self) -> Tensor:
        """The weight update itself.

        Returns [O, I] float32, differentiable in the parameters; ``forward(x) = x @ delta_weight().T``. Raises
        NotMergeableError when the residual is not linear in x.
        """
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight update, for embeddings: [..., I] float32, ``delta_weight()[ids]``, without forming it.

        Args:
            ids: [...] int64, in 0 .. O-1.

        Raises:
            NotMergeableError: as `delta_weight`.
        """
        ...


class MethodConfig(Protocol):
    """Settings of a method: a frozen dataclass; the help text of a field is its metadata["help"]."""

    def for_layer(self, name: str) -> Self:
        """The settings of one layer, patterns resolved."""
        ...


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


@dataclass(frozen=True)
class AdapterMethod(Generic[ConfigT]):
    """A row of METHODS.

    Attributes:
        config: frozen dataclass of its settings, named as PEFT names them.
        build: (settings of the layer, out_features, in_features) -> a fresh adapter, which changes nothing by default.
        peft_type: its name in adapter_config.json.
        file_names: state-dict key of the adapter -> end of the tensor's name in adapter files; a key that is not
            listed is called ``<name>_adapter.<key>``.
        resolve: (settings, shapes [O, I] of the target layers) -> settings with nothing left to be decided ("auto").
        learning_rate: that AdamW usually needs; a fifth of it is too low.
    """

    name: str
    config: type[ConfigT]
    build: Callable[[ConfigT, int, int], nn.Module]
    peft_type: str
    source: str
    file_names: Mapping[str, str] = field(default_factory=dict)
    resolve: Callable[[ConfigT, list[tuple[int, int]]], ConfigT] = lambda config, _: config
    learning_rate: float = 1e-3

    def file_name(self, key: str) -> str:
        """End of a tensor's name in adapter files."""
        return self.file_names.get(key, f"{self.name}_adapter.{key}")


@dataclass(frozen=True)
class AdapterSpec:
    """Everything that says what an adapter is, except its numbers.

    Attributes:
        task_type: PEFT's task, such as CAUSAL_LM; None when it does not matter.
    """

    method: AdapterMethod[Any]
    config: Any
    targets: ModuleTargets = field(default_factory=ModuleTargets)
    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None

    def build(self, name: str, out_features: int, in_features: int) -> nn.Module:
        """A fresh adapter for the layer called ``name``."""
        return self.method.build(self.config.for_layer(name), out_features, in_features)


@dataclass(frozen=True)
class AdapterState:
    """An adapter with its numbers, as it is stored.

    Attributes:
        layers: state dict of the adapter by dotted module name.
        extra: other trained tensors by name in the model: biases, modules_to_save.
        embeddings: layers that are embeddings, which PEFT stores otherwise.
        kernels: sides of the kernel by layer that is a convolution: the update is [O, I * kh * kw].
        parameters: names of the parameters of which one is meant, by layer that is none but holds an update of a
            parameter: PEFT's target_parameters do not say which.
        rows: (row numbers, their new values [N, I]) by embedding, or output layer, of which rows were trained.
    """

    spec: AdapterSpec
    layers: dict[str, dict[str, Tensor]]
    extra: dict[str, Tensor] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)

    @property
    def only_merged(self) -> str:
        """What a live model here has no place for, in words; empty when there is nothing."""
        lora = self.spec.method.peft_type == "LORA"
        keys = {key for tensors in self.layers.values() for key in tensors} if lora else set()
        reasons = {"DoRA": "magnitude" in keys, "lora_bias": "bias" in keys}
        reasons |= {"target_parameters": bool(self.parameters), "trainable_token_indices": bool(self.rows)}
        return ", ".join(name for name, there in reasons.items() if there)

    def build(self, name: str, out_features: int, in_features: int) -> nn.Module:
        """The adapter of one layer, with its numbers.

        Raises CheckpointError when a tensor is missing, unexpected, or of another shape than the layer's.
        """
        from spectral_surgery.errors import CheckpointError

        adapter = self.spec.build(name, out_features, in_features)
        expected = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
        shapes = {key: tuple(value.shape) for key, value in self.layers[name].items()}
        if expected != shapes:
            raise CheckpointError(
                f"{name}: expected {expected} for a layer of {out_features} x {in_features}, got {shapes} in the"
                " adapter. Use the base model it was made for."
            )
        adapter.load_state_dict(self.layers[name])
        return adapter
