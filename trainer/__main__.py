"""The command `trainer`: dispatch and exit codes."""

import sys
from importlib import import_module

from trainer import __version__
from trainer.errors import UserError

HELP = """usage: trainer COMMAND [options]      (trainer COMMAND --help lists them)

  fit        train, export, load back and score:  trainer fit --config int5mlp_10l
  validate   score a checkpoint or an artifact:   trainer validate --ckpt runs/quickstart/1/artifact.zst
  export     make the artifact again:             trainer export --ckpt runs/quickstart/1/checkpoints/last.ckpt
  prepare    make or check the token shards:      trainer prepare --config quickstart --verify
  inspect    show what lies in a shard folder:    trainer inspect data/python-documentation

exit codes: 0 done, 1 cannot be done (one line says why), 2 bad options, 130 interrupted, 143 terminated
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    try:
        if command in ("-h", "--help"):
            print(HELP, end="")
        elif command == "--version":
            print(f"trainer {__version__}")
        elif command in ("fit", "validate"):
            from trainer import cli  # noqa: PLC0415 - Lightning takes seconds to import

            cli.run(command, rest)
        elif command in ("export", "prepare", "inspect"):
            import_module(f"trainer.commands.{command}").run(rest)
        else:
            print(
                f"trainer: there is no command {command!r}; use fit, validate, export, prepare or inspect",
                file=sys.stderr,
            )
            return 2
    except UserError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trainer: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
