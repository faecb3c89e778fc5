"""The recipes in `configs/`: the reference is written out in full, the others name only what differs from it."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.cli.lightning_cli import make_parser
from trainer.errors import UserError
from trainer.recipes import find_recipe, flatten, load_recipe, recipe_folder

SECTIONS = ("data", "model", "warmup", "wallclock", "averaging", "stability", "export", "eval")  # of the reference
MACHINE = ("data.vocab_size", "data.evaluation", "data.source", "seed_everything")  # linked, or without a default


def python_defaults() -> dict[str, Any]:
    """Default of every option of fit, by dotted key."""
    return dict(flatten(make_parser("fit").get_defaults().as_dict()))


def settings(name: str) -> dict[str, Any]:
    """Settings of a recipe by dotted key, without the class of its source."""
    return {key: value for key, value in flatten(load_recipe(find_recipe(name))) if not key.startswith("data.source")}


def test_the_reference_recipe_is_the_python_defaults_key_by_key():
    defaults, recipe = python_defaults(), settings("int5mlp_10l")
    for key, value in recipe.items():
        assert defaults[key] == value, key
        assert type(defaults[key]) is type(value), key
    expected = {key for key in defaults if key.startswith(tuple(f"{section}." for section in SECTIONS))}
    assert {key for key in expected if not key.startswith(MACHINE)} == {
        key for key in recipe if key.startswith(tuple(f"{section}." for section in SECTIONS))
    }


@pytest.mark.parametrize("name", ["int5mlp_10l_parity", "int5mlp_10l_8gpu"])
def test_its_siblings_name_only_what_differs(name: str):
    defaults = python_defaults()
    assert [key for key, value in settings(name).items() if defaults[key] == value] == []


def test_frontier_gives_each_setting_its_gain_and_runs_or_says_that_it_was_not_isolated():
    lines = find_recipe("frontier").read_text().splitlines()
    for line in lines[lines.index("model:") : lines.index("wallclock:")]:
        key, _, value = line.split("#")[0].strip().partition(": ")
        if value and key != "num_kv_heads":  # measured with the line before
            assert re.search(r"# .*[-+]0\.\d{4}.*, n=\d|# not isolated", line), line


def test_t4_is_frontier_with_a_longer_budget_and_smaller_batches():
    t4, frontier = settings("t4"), settings("frontier")
    differing = {key for key in t4.keys() | frontier.keys() if t4.get(key) != frontier.get(key)}
    assert differing == {
        *("data.batch_tokens", "wallclock.seconds", "wallclock.reserve", "eval.batch_windows", "eval.max_tokens")
    }
    commented = re.findall(r"^ +(\w+): .*  # ", find_recipe("t4").read_text(), re.MULTILINE)
    assert sorted(commented) == sorted(key.rpartition(".")[2] for key in differing)


def test_every_recipe_opens_with_its_purpose():
    for path in recipe_folder().glob("*.yaml"):
        assert path.read_text().startswith("# "), path
        assert yaml.safe_load(path.read_text())


BOMB = "a: &a [1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 8)}]\n" for x, y in pairwise("abcdefghij"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wallclock:\n", "wallclock is a group of options, not None; give options of it, or remove it"),
        ("export: false\n", "export is a group of options, not False"),
        ("model:\n  attention: 5\n", "model.attention is a group of options, not 5"),
        ("export:\n  quantization: [1]\n", r"export.quantization is a group of options, not \[1\]"),
        ("data: 5\n", "data is a group of options, not 5"),
        ("trainer:\n\tmax_steps: 3\n", r"is not a recipe \(line 2: found character '\\t' that cannot start"),
        ("seed_everything: 1\n1: 2\n", "line 2: the key 1 is not a name"),
        ("x: &a [*a]\n", "its aliases stand for too many values, or for themselves"),
        (BOMB, "its aliases stand for too many values"),
    ],
)  # fmt: skip
def test_a_recipe_of_another_form_is_refused_in_one_line(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        load_recipe(path)
    assert str(refused.value).startswith(f"--config {path}: ")
    assert "\n" not in str(refused.value)
