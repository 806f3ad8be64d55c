"""All benchmark cases, one file per group."""

from __future__ import annotations

from benchmarks.case import BenchCase, by_size
from benchmarks.cases import (
    adapters,
    beyond_text,
    calibration,
    cluster,
    coding,
    encoder,
    engine,
    export,
    feedback,
    generate,
    generate_large,
    gpu,
    gpu_static,
    hub,
    lossless,
    mixers,
    rate,
    smollm2,
    sources,
    spectral_matmul,
    speech,
    speed,
    startup,
    streaming,
    text,
    vllm,
)
from spectral_surgery.registry import Table

CASES = Table(
    "bench case",
    (
        BenchCase(
            "coding", "stored bits over the entropy of the codes; decode speed of codes alone", by_size(coding.run)
        ),
        BenchCase(
            "rate", "bits and error on the linear weights of all-MiniLM-L6-v2, beside baselines", by_size(rate.run)
        ),
        BenchCase("tiles", "why dct and tile 64 are the defaults: every transform at 3 bits", by_size(rate.run_tiles)),
        BenchCase(
            "feedback", "bits of calibrated codes above the bound, inputs with a 1/f spectrum", by_size(feedback.run)
        ),
        BenchCase(
            "fp8", "error of compressing FP8 blocks, beside the bfloat16 they stand for", by_size(sources.run_fp8)
        ),
        BenchCase(
            "many_tensors",
            "headers of a DeepSeek-V3, and small tensors beside as many bytes in a hundredth of them",
            sources.run_many,
            takes=("scratch",),
        ),
        BenchCase("speed", "encode and decode of a 4096 x 4096 matrix, beside naive pipelines", by_size(speed.run)),
        BenchCase(
            "spectral_matmul",
            "compressed layers beside dense ones, 1 to 512 tokens in bfloat16",
            by_size(spectral_matmul.run),
        ),
        BenchCase(
            "generate", "text from a compressed model: tokens/s and memory beside dense bfloat16", by_size(generate.run)
        ),
        BenchCase(
            "generate_large",
            "tokens/s of a random Llama of 1.1 G parameters, beside dense bfloat16 and llama.cpp",
            generate_large.run,
            takes=("scratch",),
        ),
        BenchCase(
            "startup",
            "a fresh process until its kernels are ready: compiled once, later from disk",
            by_size(startup.run),
        ),
        BenchCase(
            "fourierft", "FourierFT and FouRA beside the bare layer, PEFT's FourierFT and LoRA", by_size(adapters.run)
        ),
        BenchCase(
            "gpu_static",
            "registers, loads and arithmetic of the GPU kernels as compiled for six chips; nothing is run",
            gpu_static.run,
            takes=("only",),
            notes=("Compiled and read, not run: ratios are what data sheets and instruction counts allow.",),
        ),
        BenchCase("gpu_products", "layers on a GPU beside dense bfloat16, 1 to 512 tokens", by_size(gpu.run_products)),
        BenchCase(
            "gpu_streaming", "layers in host memory, streamed to a GPU beside bfloat16", by_size(gpu.run_streaming)
        ),
        BenchCase("mixers", "token mixers beside attention, 128 to 65536 tokens", by_size(mixers.run), mixers.plot),
        BenchCase(
            "memory", "peak memory of compress on large sharded bfloat16 checkpoints", by_size(engine.run_memory)
        ),
        BenchCase(
            "calibrate", "moments of all layers: time, in forward passes of the same text", by_size(calibration.run)
        ),
        BenchCase(
            "text", "peak memory of calibrate and block-wise heal, for models of different depth", by_size(text.run)
        ),
        BenchCase(
            "hub", "bytes that push, pull and inspect move, with the real client and a Hub here", by_size(hub.run)
        ),
        BenchCase(
            "streaming",
            "a source that stays on the Hub: time, bytes moved and disk used, beside the same from disk",
            by_size(streaming.run),
        ),
        BenchCase(
            "lossless", "bytes of weights coded without loss, and decoding beside copying", by_size(lossless.run)
        ),
        BenchCase(
            "beyond_text",
            "a ViT on images, T5 and BART on pairs, trained here: errors of outputs, calibrated and data-free",
            by_size(beyond_text.run),
        ),
        BenchCase("workers", "two worker processes against one, with equal bytes", by_size(engine.run_workers)),
        BenchCase(
            "ray",
            "two nodes of a cluster of Ray beside one, with equal bytes; 10^12 weights on 16 nodes, on paper",
            cluster.run,
            takes=("scratch",),
            notes=("What is on paper is computed from the rates above it, and was not run.",),
        ),
        BenchCase(
            "language_model",
            "SmolLM2-135M-Instruct compressed: size, perplexity and KL, beside other formats",
            smollm2.run,
            smollm2.plot,
            smollm2.TAKES,
            smollm2.NOTES,
        ),
        BenchCase(
            "export",
            "SmolLM2-135M-Instruct of 4 bits as compressed-tensors and GGUF: errors and perplexity",
            export.run,
            takes=export.TAKES,
            notes=export.NOTES,
        ),
        BenchCase(
            "vllm",
            "a compressed Llama and its exports in vLLM, where that is installed, beside transformers",
            vllm.run,
            takes=vllm.TAKES,
            notes=vllm.NOTES,
        ),
        BenchCase(
            "encoder",
            "all-MiniLM-L6-v2 and all-mpnet-base-v2 compressed: size, cosine and STS-B",
            encoder.run,
            takes=encoder.TAKES,
            notes=encoder.NOTES,
        ),
        BenchCase(
            "speech",
            "Whisper base compressed: size, error and loss on sentences that espeak-ng speaks",
            speech.run,
            takes=speech.TAKES,
            notes=speech.NOTES,
        ),
    ),
)
