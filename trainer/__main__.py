"""The command `trainer`: dispatch and exit codes."""

import errno
import io
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer import __version__
from trainer.cpu import share_cpu
from trainer.errors import OptionError, UserError
from trainer.logging import running_without_output

# What a machine can lack, wherever a library meets it.
NOT_A_BUG = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EROFS, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)
INTERRUPTED = 130
COMMANDS = {
    "fit": ("train, export, read back and score", "fit --config int5mlp_10l"),
    "validate": ("score a checkpoint or an artifact", "validate --ckpt runs/quickstart/1/artifact.zst"),
    "export": ("make the artifact again", "export --ckpt runs/quickstart/1/checkpoints/last.ckpt"),
    "generate": ("write text with a model", "generate --artifact runs/quickstart/1/artifact.zst --prompt The"),
    "report": ("draw a run, or compare several", "report runs/quickstart/1 runs/quickstart/2"),
    "rerun": ("repeat a run and compare the losses", "rerun runs/int5mlp_10l_parity/1"),
    "runs": ("list runs, or remove old ones", "runs --sort bpb"),
    "compare": ("test whether a change helps", "compare runs/frontier/base-seed* runs/frontier/wide-seed*"),
    "sprint": ("train several seeds and compare", "sprint --config frontier --data data/mine8192"),
    "submit": ("make a submission and prove it", 'submit runs/int5mlp_10l/1 --name "10 layers" ...'),
    "prepare": ("make or check the token shards", "prepare --config quickstart --verify"),
    "inspect": ("show what a folder or file holds", "inspect runs/quickstart/1/artifact.zst"),
    "recipes": ("list the names that --config knows", "recipes"),
}


def usage() -> str:
    """The help of the whole program."""
    lines = [f"  {name:<10} {what:<35} trainer {example}" for name, (what, example) in COMMANDS.items()]
    return (
        "usage: trainer COMMAND [options]      (trainer COMMAND --help lists them)\n\n"
        + "\n".join(lines)
        + "\n\nshell completion: trainer --print_completion shtab-bash >> ~/.bash_completion\n"
        + "exit codes: 0 success, 1 failure (one line says why), 2 bad options,\n"
        + "            130 interrupted, 129 hung up, 138 SIGUSR1, 143 terminated\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    share_cpu()
    command, args = (argv[0], argv[1:]) if argv else ("--help", [])
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - closed by whoever started this process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without UTF-8 shows escapes instead of failing
            stream.reconfigure(errors="backslashreplace")
    if sys.platform == "win32":  # no fcntl, and os.kill(pid, 0) would end the process
        print("trainer: does not run on Windows itself; install it in the Windows Subsystem for Linux", file=sys.stderr)
        return 1
    try:
        if command in ("-h", "--help"):
            if not args:
                print(usage(), end="")
            elif args[0] in COMMANDS:
                _run(args[0], ["--help", *args[1:]])
            else:  # a part of fit's options
                _run("fit", ["--help", *args])
        elif command == "--version":
            print(f"trainer {__version__}{_commit()}")
        elif command.partition("=")[0] == "--print_completion":
            _print_completion(argv)
        elif command in COMMANDS:
            _run(command, args)
        else:
            near = get_close_matches(command, [*COMMANDS, "--help", "--version"], n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(COMMANDS)}"
            print(f"trainer: there is no command {command!r}; {hint}", file=sys.stderr)
            return 2
    except OptionError as error:
        print(error, file=sys.stderr)
        return 2
    except UserError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("trainer: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in NOT_A_BUG:
            raise
        hints = {errno.EMFILE: "; raise the limit with `ulimit -n 4096`", errno.EACCES: "; check its permissions"}
        hint = hints.get(error.errno, "")
        print(f"trainer: {error.filename or 'a file'}: {error.strerror}{hint}", file=sys.stderr)
        return 1
    return 0


def program() -> int:
    """`main` as a program of its own, which a second Ctrl-C ends without Python's tracebacks from its exit."""
    try:
        code = main()
    except KeyboardInterrupt:  # a second one, while the first was reported
        code = INTERRUPTED
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _commit() -> str:
    """The commit of the checkout that runs, or of the release that was built from one; `+` marks changes."""
    package = Path(__file__).resolve().parent
    root, built = package.parent, package / "commit.txt"
    if built.is_file():
        return f" ({built.read_text().strip()})"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    if not (root / ".git").exists():
        return ""
    try:
        return f" ({subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()})"
    except (OSError, subprocess.CalledProcessError):
        return ""


def _run(command: str, args: list[str]) -> None:
    """Import a command and run it; the others, and Lightning with its seconds, stay out."""
    # These may name a class of the user's; its folder comes last, so that it replaces nothing.
    if command in ("fit", "prepare", "rerun", "sprint", "validate") and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if command in ("fit", "validate"):
        with running_without_output() if command == "fit" else nullcontext():
            import_module("trainer.cli.train").run(command, args)
    elif command == "prepare":  # its options depend on the recipe
        import_module("trainer.cli.prepare").run(args)
    else:
        module = import_module(f"trainer.cli.{command}")
        parser = module.make_parser()
        options = parser.instantiate(parser.parse_args(args)).as_dict()
        with running_without_output() if command == "rerun" else nullcontext():
            getattr(module, command)(**options)


def _print_completion(argv: list[str]) -> None:
    """Print a script that completes commands and options in a shell; jsonargparse and shtab make it."""
    os.environ["JSONARGPARSE_ADD_PRINT_COMPLETION_ARGUMENT"] = "true"
    from jsonargparse import ArgumentParser  # noqa: PLC0415 - only a completion needs all commands at once

    parser = ArgumentParser(prog="trainer")
    commands = parser.add_subcommands()
    for name in COMMANDS:
        module: Any = import_module(f"trainer.cli.{'lightning_cli' if name in ('fit', 'validate') else name}")
        commands.add_subcommand(name, module.make_parser(name) if name in ("fit", "validate") else module.make_parser())
    parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(program())
