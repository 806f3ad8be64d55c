"""spectral-surgery generate."""

from __future__ import annotations

import click

from spectral_surgery.cli import output, shared
from spectral_surgery.cli.options import Command, from_options, options_of
from spectral_surgery.commands.settings import Running
from spectral_surgery.hf.settings import Sampling


@click.command("generate", cls=Command)
@shared.source_argument
@click.argument("prompt", metavar="PROMPT")
@options_of(Running, "resident", "max_memory", "device", "dtype", "adapter")
@options_of(Sampling)
@options_of(Running, "trust_remote_code")
@shared.hub_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the speed, when it is done.")
def command(source: str, prompt: str, as_json: bool) -> None:
    """Let a language model continue PROMPT; the text is streamed to stdout.

    SOURCE is a plain or a compressed model with its tokenizer. A compressed one is never decoded to its dense weights.

    \b
    Example:
      spectral-surgery generate ./model-4bit "Once upon a time" --temperature 0.8 --top-p 0.95
    """
    from spectral_surgery.commands import generate as workflow

    def emit(text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)

    path, _ = shared.hub_access().resolve(source)
    report = workflow.generate(path, prompt, from_options(Sampling), from_options(Running), emit)
    output.show(report.to_json(), [""])
    if not as_json:
        speed = report.tokens / max(report.seconds, 1e-9)
        click.echo(
            f"{report.tokens} tokens, {speed:.1f} tokens/s, weights {output.size(report.weight_bytes)}", err=True
        )
