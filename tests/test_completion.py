"""A real bash completes commands, options and choices with the script that jsonargparse and shtab print."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers import trainer

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_shtab_trainer
echo "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    printed = trainer("--print_completion", "shtab-bash", cwd=folder)
    assert printed.returncode == 0, printed.stderr
    path = folder / "trainer.bash"
    path.write_text(printed.stdout)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trainer gen", "generate"),
        ("trainer fit --model.attention.rope_d", "--model.attention.rope_dims"),
        ("trainer validate --weig", "--weights"),
        ("trainer prepare --veri", "--verify"),
        ("trainer submit --github_", "--github_id"),
    ],
)
def test_bash_completes(script: Path, words: str, expected: str):
    question = ASK.format(script=script, words=words)
    result = subprocess.run(["bash", "-c", question], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout.split()
