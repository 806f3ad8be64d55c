"""Ways of quantising that are not read here, with what gives a checkpoint that is."""

from __future__ import annotations

from spectral_surgery.files.sources.base import SourceKind

_CONVERT = "compressed_tensors.entrypoints.convert"

NOT_READ = (
    SourceKind(
        "gptq",
        None,
        "Start from the unquantised checkpoint, or where GPTQModel runs: gptqmodel.nn_modules.qlinear.torch"
        '.dequantize_model(GPTQModel.load(SOURCE, backend="torch").model).save_pretrained(PLAIN).',
    ),
    SourceKind(
        "awq",
        None,
        "Start from the unquantised checkpoint, or convert it to one that is read:"
        f" {_CONVERT}.convert_checkpoint(SOURCE, OUT, {_CONVERT}.AutoAWQConverter.from_pretrained(SOURCE)).",
    ),
)
