"""What is wrong with an option: one line with the option, what it may be and the value."""

import sys
from pathlib import Path

import pytest

from tests.helpers import trainer_here
from trainer.__main__ import main

LOCAL = "--data.source=LocalText"
FILES = "--data.source.train_files=x.txt"
SIZE = "--data.source.vocab_size=abc"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--model.num_layers=abc"], "--model.num_layers: must be a whole number, not abc"),
        (["fit", "--wallclock.seconds=abc"], "--wallclock.seconds: must be a number or null, not abc"),
        (["fit", "--model.attention.xsa=perhaps"], "--model.attention.xsa: must be true or false, not perhaps"),
        (["fit", "--averaging.method=x"], "--averaging.method: must be one of 'late_swa', 'ema' or null, not x"),
        (
            ["fit", "--export.quantization.fp16_key_blocks=3"],
            "--export.quantization.fp16_key_blocks: must be a list, such as [1,2], not 3",
        ),
        (["fit", LOCAL], "--data.source.train_files: missing, but LocalText needs it"),
        (["prepare", LOCAL], "--data.source.train_files: missing, but LocalText needs it"),
        (
            ["fit", LOCAL, FILES, "--data.source.val_every=abc"],
            "--data.source.val_every: must be a whole number, not abc",
        ),
        (
            ["fit", LOCAL, FILES, "--data.source.vocab_size=abc"],
            "--data.source.vocab_size: must be a whole number or null, not",
        ),
        (
            ["prepare", LOCAL, FILES, "--data.source.vocab_size=abc"],
            "--data.source.vocab_size: must be a whole number or null, not abc (",
        ),
        (
            ["fit", "--model.micro_batch_tokens=abc"],
            "--model.micro_batch_tokens: must be one of 'auto' or a whole number, not abc",
        ),
        (["fit", "--data.source.nothing=3"], "--data.source.nothing: PythonDocumentation has no such option"),
        (["fit", "--data.source=Nothing"], "--data.source: there is no class Nothing; give one of LocalText, "),
        (
            ["fit", "--model.optimizer=torch.optim.AdamW"],
            "--model.optimizer: is a group of options, not a class",
        ),
        (["fit", "--trainer.callbacks=EarlyStopping"], "--trainer.callbacks.monitor: missing, but EarlyStopping needs"),
        (["fit", "--config=bad.yaml"], "--model.num_layers: must be a whole number, not many"),
        (
            ["fit", LOCAL, FILES, "--data.case_markup="],
            "--data.case_markup: its value is empty (an unset",
        ),
        (["fit", "--model.num_layers="], "--model.num_layers: its value is empty (an unset variable?); give one"),
        (["fit", "--data.order="], "--data.order: its value is empty (an unset variable?); give one"),
        (["generate", "--artifact=x", "--tokens=abc"], "--tokens: must be a whole number, not abc"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(args: list[str], message: str, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model:\n  num_layers: many\n")
    result = trainer_here(*args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith(f"trainer {args[0]}: {message}"), result.stderr


def test_null_is_refused_where_a_class_needs_a_value(tmp_path: Path):
    result = trainer_here("fit", "--data.source.folder=null", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "trainer: --data.source.folder: must not be null\n")


def test_a_wrong_interval_is_one_line(tmp_path: Path):
    result = trainer_here("fit", "--trainer.val_check_interval=00:00:00:15", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "trainer.val_check_interval must be a whole number of at least 1, not 00:00:00:15" in result.stderr


def test_null_may_be_the_default_of_a_class_that_does_not_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lazy_text.py").write_text(
        "from trainer.data.sources import Shards\n\n\nclass Lazy(Shards):\n"
        "    def __init__(self, folder: str = None):\n        super().__init__(folder or 'data')\n"
    )
    result = trainer_here("fit", "--data.source=lazy_text.Lazy", "--print_config", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


def test_fit_finds_modules_of_the_working_folder_and_puts_them_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_text.py").write_text("from trainer.data.sources import Shards\n\n\nclass Mine(Shards):\n    pass\n")
    (tmp_path / "yaml.py").write_text("raise RuntimeError('the installed one was wanted')\n")
    result = trainer_here("fit", "--data.source=my_text.Mine", "--print_config", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "class_path: my_text.Mine" in result.stdout
    assert sys.path[-1] == str(tmp_path)


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["fit"]) == 1
    assert "install it in the Windows Subsystem for Linux" in capsys.readouterr().err
