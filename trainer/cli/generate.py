"""`trainer generate`: text from an artifact or a checkpoint."""

import sys
from pathlib import Path

import torch

from trainer.cli.parser import CommandParser
from trainer.device import default_device
from trainer.errors import UserError
from trainer.generation import SamplingConfig, check_prompt, continue_text
from trainer.loading import load_artifact


def generate(
    artifact: str,
    prompt: list[str],
    prompts: str | None = None,
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    context: int = 2048,
    tokenizer: str | None = None,
    device: str = "auto",
) -> None:
    """Write text with a trained model.

    Args:
        artifact: Artifact or checkpoint.
        prompt: Text to continue; may be given several times.
        prompts: File with one prompt per line.
        tokens: Most tokens to generate for each prompt (at least 0).
        temperature: Divides the logits (0, or at least 1e-6); 0 always takes the most probable token.
        top_k: Draw from this many of the most probable tokens (at least 1); null: from all.
        top_p: Draw from the most probable tokens whose probabilities add up to this (above 0, at most 1).
        seed: Seed of the draws (0 to 2^63 - 1).
        context: Most tokens of context (2 to 1,048,576).
        tokenizer: SentencePiece model; default: tokenizer.model in the run's folder.
        device: Device to run on; auto: cuda if there is one, else cpu.

    Raises:
        UserError: If a file cannot be used or a number is out of range.
    """
    try:
        config = SamplingConfig(tokens, temperature, top_k, top_p, seed, context)
        for text in prompt:
            check_prompt(text)
    except UserError as error:
        raise UserError(f"--{error}") from error
    texts = prompt + (_lines(Path(prompts)) if prompts else [])
    device = default_device().type if device == "auto" else device
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        model, processor = load_artifact(artifact, tokenizer, torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch's message for a device that does not exist
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    for number, text in enumerate(texts or [""]):
        sys.stdout.write(("\n\n" if number else "") + text)
        for addition in continue_text(model, processor, text, config):
            sys.stdout.write(addition)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as UTF-8 text ({error})") from error


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(
        generate,
        'generate --artifact runs/quickstart/1/artifact.zst --prompt "Return the" --tokens 100',
        artifact={"flags": ["--artifact", "--ckpt"], "required": True},  # an alias
        prompt={"action": "append", "default": []},  # jsonargparse's lists would need brackets
    )
