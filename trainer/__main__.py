"""The command `trainer`: dispatch and exit codes."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from trainer import __version__
from trainer.errors import UserError

COMMANDS = {
    "fit": ("train, export, load back and score", "fit --config int5mlp_10l"),
    "validate": ("score a checkpoint or an artifact", "validate --ckpt runs/quickstart/1/artifact.zst"),
    "export": ("make the artifact again", "export --ckpt runs/quickstart/1/checkpoints/last.ckpt"),
    "generate": ("write text with a model", "generate --artifact runs/quickstart/1/artifact.zst --prompt The"),
    "report": ("draw a run, or compare several", "report runs/quickstart/1 runs/quickstart/2"),
    "submit": ("make a submission and prove it", 'submit runs/int5mlp_10l/1 --name "10 layers" ...'),
    "prepare": ("make or check the token shards", "prepare --config quickstart --verify"),
    "inspect": ("show what lies in a shard folder", "inspect data/python-documentation"),
    "recipes": ("list what --config knows", "recipes"),
    "completion": ("complete words in your shell", "completion bash >> ~/.bash_completion"),
}


def usage() -> str:
    """The help of the whole program."""
    lines = [f"  {name:<10} {what:<35} trainer {example}" for name, (what, example) in COMMANDS.items()]
    return (
        "usage: trainer COMMAND [options]      (trainer COMMAND --help lists them)\n\n"
        + "\n".join(lines)
        + "\n\nexit codes: 0 done, 1 cannot be done (one line says why), 2 bad options,\n"
        + "            130 interrupted, 143 terminated\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(usage(), end="")
        elif command == "--version":
            print(f"trainer {__version__}")
        elif command in ("fit", "validate"):
            from trainer import cli  # noqa: PLC0415 - Lightning takes seconds to import

            cli.run(command, rest)
        elif command in COMMANDS:
            import_module(f"trainer.commands.{command}").run(rest)
        else:
            near = get_close_matches(command, COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
            print(f"trainer: there is no command {command!r}; {meant}", file=sys.stderr)
            return 2
    except UserError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("trainer: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
