"""`trainer generate`: text from an artifact or a checkpoint."""

import sys
from functools import partial
from pathlib import Path

import torch

from trainer.data.tokenizer import BOS
from trainer.errors import UserError
from trainer.generation import Decoder, generate, sample, stream_text
from trainer.loading import load_artifact
from trainer.options import Parser

MOST_CONTEXT = 2**20  # tokens; tables for their positions are made at once
EXAMPLE = """generate --artifact runs/quickstart/1/artifact.zst --prompt "Return the" --tokens 100"""


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("generate", "Write text with a trained model.", EXAMPLE)
    parser.add_argument("--artifact", "--ckpt", required=True, help="artifact or checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="text to go on from; may be given several times")
    parser.add_argument("--prompts", help="file with a prompt a line")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write for each (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable (%(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from so many of the most probable; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="draw from the most probable that add up to this (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are looked back at (%(default)s)")
    parser.add_argument("--tokenizer", help="SentencePiece model; default: tokenizer.model in the run's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If a file cannot be used or a number makes no sense.
    """
    options = make_parser().parse_args(words)
    if not (options.temperature == 0 or 1e-6 <= options.temperature < float("inf")):
        raise UserError(f"--temperature must be 0 or from 1e-6 on, not {options.temperature}")
    if not 0 < options.top_p <= 1 or min(options.top_k, options.tokens) < 0:
        raise UserError("--top_k and --tokens must not be negative, and --top_p lie in (0, 1]")
    if not 2 <= options.context <= MOST_CONTEXT:
        raise UserError(f"--context must lie between 2 and {MOST_CONTEXT:,}, not {options.context}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must lie between 0 and 2^63 - 1, not {options.seed}")
    for prompt in options.prompt:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("--prompt: is no UTF-8 text") from error
    prompts = options.prompt + (_lines(Path(options.prompts)) if options.prompts else [])
    try:
        device = torch.device(options.device)
        model, tokenizer = load_artifact(options.artifact, options.tokenizer, device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is not there
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    decoder = Decoder(model, options.context)
    for number, prompt in enumerate(prompts or [""]):
        generator = torch.Generator().manual_seed(options.seed)
        draw = partial(
            sample,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        ids = [BOS, *tokenizer.encode(prompt)]
        sys.stdout.write(("\n\n" if number else "") + prompt)
        for text in stream_text(tokenizer, ids, generate(decoder, ids, options.tokens, draw)):
            sys.stdout.write(text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read as UTF-8 text ({error})") from error
