"""Compressed folders in transformers: after `import spectral_surgery`, every from_pretrained loads them as they are.

No dense copy of a compressed layer ever exists. `register` runs when transformers imports its list of quantisers; how
weights come in is in `fill_weights`, and how they get out in `saving`.
Source: transformers 5.24, `quantizers/base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from spectral_surgery.files.compressed.checkpoint import CompressedCheckpoint, open_compressed
from spectral_surgery.files.compressed.manifest import FILE_NAME, FORMAT_VERSION, QUANT_METHOD, check_version
from spectral_surgery.files.compressed.settings import AUTO
from spectral_surgery.files.remote_code import forget_shim
from spectral_surgery.hf import swapped_models
from spectral_surgery.hf.quant_method import LoadsFolders, QuantMethod
from spectral_surgery.hf.quantizer import fill_weights as loading
from spectral_surgery.hf.quantizer import loading_plan as planning
from spectral_surgery.hf.quantizer import saving
from spectral_surgery.hf.quantizer.fill_weights import UNREAD, Loading
from spectral_surgery.hf.quantizer.loading_plan import MESSENGER
from spectral_surgery.hf.quantizer.model_methods import bind_methods, cast, unbind_methods


def register() -> None:
    """Make transformers know compressed and swapped folders; once more changes nothing."""
    for method in (METHOD, swapped_models.METHOD):
        method.register()


class Settings:
    """How a folder was compressed, and in which form its weights are held in memory.

    ``resident``: form of all weights, or form by stored name; it is not saved.
    """

    def __init__(self, **settings: Any) -> None:
        check_version(settings.get("format_version", FORMAT_VERSION), "config.json")
        self.__dict__.update(settings)
        self.quant_method = QUANT_METHOD
        self.resident: str | Mapping[str, str] = settings.get("resident", AUTO)

    def to_dict(self) -> dict[str, Any]:
        """What config.json should say."""
        return {name: value for name, value in vars(self).items() if name != "resident"}


class Operation:
    """The step of transformers' loading in which a weight takes the place of its messenger."""

    def __init__(self, load: Loading, *, whole: bool, last: bool = False) -> None:
        """Put it into a converter.

        Args:
            whole: nothing comes after it, so that results go by the name of the parameter.
            last: others have come before it; what is already in its place is not set again.
        """
        self.load = load
        self.whole = whole
        self.last = last

    def __deepcopy__(self, memo: object) -> Operation:
        """Itself: transformers copies a converter for every parameter."""
        return self

    def convert(self, input_dict: dict[str, Any], *_: Any, **context: Any) -> dict[str, Any]:
        """See ConversionOps of transformers."""
        target, missing = context["full_layer_name"], context["missing_keys"]
        if self.load.plan is None or target not in self.load.plan.sources:
            return input_dict
        if self.last:
            return input_dict if target in self.load.plan.dense else {}
        read = {key: value if isinstance(value, list) else [value] for key, value in input_dict.items()}
        if self.whole:
            read = {"": next(iter(read.values()))}
        result = self.load.fill(context["model"], target, read, missing)
        if self.whole and result:
            return {target: result[""]}
        if not self.whole and not result:  # for transformers to stack and concatenate
            return {key: [torch.empty(0, 0)] * len(value) for key, value in read.items()}
        return result


@cache
def operation_class() -> type:
    """`Operation` as transformers wants it."""
    from transformers.core_model_loading import ConversionOps

    return type("SpectralLoad", (Operation, ConversionOps), {})


class Quantizer(LoadsFolders):
    """What transformers asks while it loads and saves compressed models; see its HfQuantizer."""

    made_by = "compress"
    load: Loading | None = None
    outline: Any = None  # the model while it has no weights: transformers before 5.20 does not say it again
    held_dense: Mapping[str, str] = MappingProxyType({})  # parameter -> class of its module
    quantization_config: Settings

    def _process_model_before_weight_loading(self, model: Any, **context: Any) -> Any:
        checkpoint = _open(Path(context["checkpoint_files"][0]).parent, model.config)
        resident = self.quantization_config.resident
        forms = loading.residents_for(checkpoint, resident) if isinstance(resident, str) else dict(resident)
        self.load, self.outline = Loading(checkpoint, forms), model
        forget_shim(model.config)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), UNREAD}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Renamings and converters for this model."""
        if self.load is None or self.load.plan is not None:
            return weight_conversions
        outline, self.outline = self.outline, None
        return _conversions(self.load, weight_conversions, outline if model is None else model)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Of a stored tensor: what its parameter has, for messengers too, also where they are whole numbers."""
        floating = param.get_dtype().startswith(("F", "BF")) if hasattr(param, "get_dtype") else True
        ours = any(isinstance(operation, Operation) for operation in getattr(converter, "operations", ()))
        return dtype if floating or ours else None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight that a parameter will take, for the map of devices."""
        del model
        return param.element_size() if self.load is None else loading.bytes_per_weight(self.load, param_name, param)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.load is not None and self.load.plan is not None:
            self.held_dense = _settle(self.load, self.load.plan, model)
            bind_methods(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes."""
        if self.load is None or self.load.plan is None:
            return None, {}
        return saving.compressed_state(model, self.load, self.load.plan)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # configurations have its name
        if self.load is not None:
            if dtype is not None:
                cast(model, dtype)
            saving.dequantize(model, self.load)
            unbind_methods(model)
        return model


METHOD = QuantMethod(QUANT_METHOD, "SpectralSurgery", Settings, Quantizer)
__getattr__ = METHOD.attribute


def _open(folder: Path, config: Any) -> CompressedCheckpoint:
    """The folder of the files; the manifest is fetched where only weights were."""
    name = str(getattr(config, "name_or_path", ""))
    if not (folder / FILE_NAME).exists() and name and not Path(name).exists():
        from transformers.utils.hub import cached_file

        revision = getattr(config, "_commit_hash", None)
        cached_file(name, FILE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    return open_compressed(folder)


def _conversions(load: Loading, conversions: Sequence[Any], model: Any) -> list[Any]:
    """The conversions of transformers, with ours where something compressed passes."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    plan = load.plan = planning.make_plan(model, load.checkpoint, conversions)
    planning.check_used(load.checkpoint, plan)
    load.begin()
    operation = operation_class()
    converted = [
        (name, pattern) for by in plan.sources.values() for pattern, names in by.items() if pattern for name in names
    ]
    compressed = {*load.checkpoint.manifest.tensors, *load.checkpoint.manifest.lossless}
    names = [name for name, _ in converted if name in compressed]
    patterns = {pattern for _, pattern in converted}
    ours: list[Any] = []
    for entry in conversions:
        if isinstance(entry, WeightConverter) and patterns & set(entry.source_patterns):
            entry.operations.insert(0, operation(load, whole=False))
            entry.operations.append(operation(load, whole=False, last=True))
        ours.append(entry)
    if names:
        others = sorted(compressed - set(names))
        load.renaming = WeightRenaming(planning.stripping(names, others, sorted(patterns)), r"\1")
        ours.insert(0, load.renaming)
    ours.append(WeightConverter(rf"\.{MESSENGER}", "", [operation(load, whole=True)]))
    loading.untie(model, load, plan)
    return ours


def _settle(load: Loading, plan: planning.Plan, model: Any) -> dict[str, str]:
    """Freeze what was decoded, say so, and keep the conversions: saving is ours alone. Errors surface here."""
    from transformers.utils import logging

    if load.prefetched is not None:
        load.prefetched.close()
        load.prefetched = None
    if load.error is not None:
        raise load.error
    ours = operation_class()
    for entry in model._weight_conversions:
        operations = getattr(entry, "operations", None)
        if operations is not None:
            operations[:] = [operation for operation in operations if not isinstance(operation, ours)]
        if operations != [] and entry is not load.renaming:
            load.conversions.append(entry)
    model._weight_conversions = []
    dense = planning.held_dense(model, plan)
    for name in dense:
        model.get_parameter_or_buffer(name).requires_grad_(False)
    if dense:
        logging.get_logger("transformers.spectral_surgery").warning(
            planning.said_of_dense(load.checkpoint, plan, dense)
        )
    return dense
