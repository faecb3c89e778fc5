"""A real bash completes commands, options, recipes and files with the printed script."""

import subprocess
from pathlib import Path

import pytest

from trainer.__main__ import COMMANDS
from trainer.commands import completion

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_trainer
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "trainer.bash"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", printed.append)
        completion.run(["bash"])
    path.write_text(printed[0])
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trainer gen", ["generate"]),
        ("trainer fit --model.attention.rope_d", ["--model.attention.rope_dims"]),
        ("trainer validate --weig", ["--weights"]),
        ("trainer fit --config quick", ["quickstart"]),
        ("trainer prepare --veri", ["--verify"]),
        ("trainer report {folder}/trainer.b", ["{folder}/trainer.bash"]),
    ],
)
def test_bash_completes(script: Path, words: str, expected: list[str]):
    ask = ASK.format(script=script, words=words.format(folder=script.parent))
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert found.stderr == ""
    assert found.stdout.split() == [word.format(folder=script.parent) for word in expected]


def test_every_command_is_there():
    parser = completion.all_commands(None)
    commands = next(action for action in parser._actions if action.dest == "==SUPPRESS==")
    assert list(commands.choices) == list(COMMANDS)
