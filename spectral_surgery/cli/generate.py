"""spectral-surgery generate."""

from __future__ import annotations

import re
from pathlib import Path

import click

from spectral_surgery.cli import output, shared

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)


def _bytes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Read a size such as 500MB."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise click.BadParameter(f"'{value}' is no size such as 500MB or 2GB.", ctx, parameter)
    return int(float(match[1]) * _UNITS[match[2].upper()])


@click.command("generate")
@shared.source_argument
@click.argument("prompt", metavar="PROMPT")
@click.option(
    "--resident",
    type=click.Choice(["auto", "int8", "int4", "coded", "streamed"]),
    help="How compressed weights are held: one byte, half a byte, as stored, or in host memory and streamed to a GPU"
    "  [default: int8 where codes fit]",
)
@click.option("--max-memory", callback=_bytes, metavar="SIZE", help="What compressed weights may take: 500MB, 2GB.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", help="Compute in float32, bfloat16, ... instead of the stored type.")
@click.option("--adapter", type=click.Path(path_type=Path), help="Folder of an adapter to put on the model.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="New tokens at most.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="Choose among so many; 0: all.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Nucleus sampling."
)
@click.option("--seed", default=0, show_default=True, help="Of the choices.")
@shared.trust_option
@shared.hub_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the speed, when it is done.")
def command(
    source: str,
    prompt: str,
    resident: str | None,
    max_memory: int | None,
    device: str,
    dtype: str | None,
    adapter: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Let a language model continue PROMPT; the text is streamed to stdout.

    SOURCE is a plain or a compressed model with its tokenizer. A compressed one is never decoded to its dense weights.

    \b
    Example:
      spectral-surgery generate ./model-4bit "Once upon a time" --temperature 0.8 --top-p 0.95
    """
    from spectral_surgery.commands import generate as workflow
    from spectral_surgery.hf.models import Sampling

    path, _ = shared.hub_access(quiet=as_json).resolve(source)
    report = workflow.generate(
        path,
        prompt,
        Sampling(max_tokens, temperature, top_k, top_p, seed),
        workflow.Running(resident, max_memory, device, dtype, adapter, shared.trusted()),
        (lambda _: None) if as_json else lambda text: click.echo(text, nl=False),
    )
    if as_json:
        output.print_json("generate", report.to_json())
        return
    click.echo()
    speed = report.tokens / max(report.seconds, 1e-9)
    click.echo(f"{report.tokens} tokens, {speed:.1f} tokens/s, weights {output.size(report.weight_bytes)}", err=True)
