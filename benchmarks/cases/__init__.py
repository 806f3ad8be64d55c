"""All benchmark cases, one file per group."""

from __future__ import annotations

from benchmarks.case import BenchCase
from benchmarks.cases import (
    adapters,
    calibration,
    coding,
    engine,
    generate,
    hub,
    mixers,
    rate,
    spectral_matmul,
    speed,
    text,
)
from spectral_surgery.registry import Table

CASES = Table(
    "bench case",
    (
        BenchCase("coding", "stored bits over the entropy of the codes; decode speed of codes alone", coding.run),
        BenchCase("rate", "bits and error on the linear weights of all-MiniLM-L6-v2, beside baselines", rate.run),
        BenchCase("tiles", "why dct and tile 64 are the defaults: every transform at 3 bits", rate.run_tiles),
        BenchCase("speed", "encode and decode of a 4096 x 4096 matrix, beside naive pipelines", speed.run),
        BenchCase(
            "spectral_matmul", "compressed layers beside dense ones, 1 to 512 tokens in bfloat16", spectral_matmul.run
        ),
        BenchCase("generate", "text from a compressed model: tokens/s and memory beside dense bfloat16", generate.run),
        BenchCase("fourierft", "FourierFT beside the bare layer, PEFT's FourierFT and LoRA", adapters.run),
        BenchCase("mixers", "token mixers beside attention, 128 to 65536 tokens", mixers.run, mixers.plot),
        BenchCase("memory", "peak memory of compress on large sharded bfloat16 checkpoints", engine.run_memory),
        BenchCase("calibrate", "moments of all layers: time, in forward passes of the same text", calibration.run),
        BenchCase("text", "peak memory of calibrate and block-wise heal, for models of different depth", text.run),
        BenchCase("hub", "bytes that push, pull and inspect move, with the real client and a Hub here", hub.run),
        BenchCase("workers", "two worker processes against one, with equal bytes", engine.run_workers),
    ),
)
