"""Groups of runs, pairs of seeds and p-values, against the formulas and tables of a textbook."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import trainer_here
from trainer.comparison import change, group_runs, p_value, table
from trainer.errors import UserError
from trainer.run_folder import RunFolder


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [  # critical values of Student's t (two-sided), as every textbook lists them
        (12.7062, 1, 0.05),
        (63.6567, 1, 0.01),
        (4.3027, 2, 0.05),
        (3.1824, 3, 0.05),
        (12.9240, 3, 0.001),
        (2.7764, 4, 0.05),
        (2.2281, 10, 0.05),
        (1.962339, 1000, 0.05),
        (0.0, 5, 1.0),
    ],
)
def test_p_values_are_those_of_students_t(t: float, freedom: float, p: float):
    assert p_value(t, 1.0, freedom) == pytest.approx(p, rel=1e-4)
    assert p_value(-t, 1.0, freedom) == p_value(t, 1.0, freedom)


def test_without_any_spread_a_difference_is_certain():
    assert p_value(0.0, 0.0, 3) == 1.0
    assert p_value(0.1, 0.0, 3) == 0.0


def make_run(folder: Path, name: str, seed: int, bpb: float, **settings: object) -> RunFolder:
    """A finished run, as far as a comparison reads it; `summary_x` replaces entry x of the summary."""
    run = RunFolder(folder / "recipe" / name)
    run.path.mkdir(parents=True)
    replaced = {key.removeprefix("summary_"): value for key, value in settings.items() if key.startswith("summary_")}
    config = {"seed_everything": seed, "model": {"num_layers": 4}, "wallclock": {"seconds": 300}}
    config |= {key: value for key, value in settings.items() if not key.startswith("summary_")}
    stages = {
        name: {"bpb": bpb + more, "loss": 1.0, "tokens": 300, "bytes": 1000}
        for name, more in (("live_plain", 0.03), ("artifact_plain", 0.01))
    }
    summary = {
        "val_bpb": bpb,
        "val_loss": 2 * bpb,
        "bytes_code": 1000,
        "bytes_model": 15_899_000 + seed,
        "bytes_cap": 16_000_000,
        "val_bytes": 1000,
        "val_tokens": 300,
        "steps": 100 + seed,
        "train_tokens": 2_000_000,
        "train_seconds": 2.0,
        "epochs": 1.5,
        "bytes_total": 15_900_000 + seed,
        "text_fingerprint": "a",
        "shards_fingerprint": "b",
        "tokenizer_sha256": "c",
        "parameters": 10,
        "weights": "averaged",
        "versions": {"device": "cpu"},
        "stages": stages,
        **replaced,
    }
    run.summary.write_text(json.dumps(summary))
    run.config.write_text(yaml.safe_dump(config))
    run.metrics.write_text("step,train/loss,perf/mfu\n0,3.0,0.40\n1,2.0,0.42\n")
    return run


WIDE = {"model": {"num_layers": 4, "mlp": {"ratio": 5}}}
BASE_SCORES, WIDE_SCORES = [1.30, 1.32, 1.31, 1.33], [1.295, 1.316, 1.302, 1.325]


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    base = [make_run(tmp_path, f"base-{seed}", seed, score) for seed, score in enumerate(BASE_SCORES, 1)]
    wide = [make_run(tmp_path, f"wide-{seed}", seed, score, **WIDE) for seed, score in enumerate(WIDE_SCORES, 1)]
    return [*base, *wide]


def test_equal_seeds_are_compared_pair_by_pair(runs: list[RunFolder]):
    base, wide = group_runs([run.read() for run in runs])
    assert (base.name, wide.name) == ("recipe", "model.mlp.ratio=5")
    result = change(base, wide)
    differences = [b - a for a, b in zip(BASE_SCORES, WIDE_SCORES, strict=True)]
    assert result.pairs == 4
    assert result.mean == pytest.approx(statistics.mean(differences))
    assert result.stderr == pytest.approx(statistics.stdev(differences) / 2)
    assert result.p == pytest.approx(p_value(result.mean, result.stderr, 3))
    assert result.p < 0.02  # by pairs it is clear; the groups overlap


def test_other_seeds_are_compared_by_welchs_test(tmp_path: Path):
    base = [make_run(tmp_path, f"b{seed}", seed, score) for seed, score in ((1, 1.30), (2, 1.32), (3, 1.31))]
    wide = [make_run(tmp_path, f"w{seed}", seed, score, **WIDE) for seed, score in ((4, 1.25), (5, 1.27))]
    first, second = group_runs([run.read() for run in [*base, *wide]])
    result = change(first, second)
    a, b = 0.0001 / 3, 0.0002 / 2  # variance by n
    assert result.pairs == 0
    assert result.mean == pytest.approx(-0.05)
    assert result.stderr == pytest.approx(math.sqrt(a + b))
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 1)
    assert result.p == pytest.approx(p_value(-0.05, math.sqrt(a + b), freedom))


def test_what_changes_no_experiment_does_not_split_a_setting(tmp_path: Path):
    runs = [
        make_run(
            tmp_path, "a", 1, 1.30, eval={"every_seconds": None}
        ),  # null is the same as an option that is not there
        make_run(tmp_path, "b", 2, 1.31, samples={"tokens": 4}),
        make_run(tmp_path, "c", 2, 1.32, data={"seed": 5}, model={"num_layers": 4, "micro_batch_tokens": 8}),
    ]
    (group,) = group_runs([run.read() for run in runs])
    assert list(group.scores.values()) == [1.30, 1.31, 1.32]


def test_another_tokenizer_is_another_setting(tmp_path: Path):
    runs = [
        make_run(tmp_path, f"{tokenizer}{seed}", seed, score, summary_tokenizer_sha256=tokenizer * 64)
        for tokenizer, score in (("a", 1.2), ("b", 1.1))
        for seed in (1, 2)
    ]
    first, second = group_runs([run.read() for run in runs])
    assert (len(first.runs), len(second.runs)) == (2, 2)
    assert "tokenizer=bbbbbbbbbbbb" in second.name
    assert change(first, second).pairs == 2


def test_one_run_on_each_side_has_a_difference_and_no_p(tmp_path: Path):
    first, second = make_run(tmp_path, "b", 1, 1.30), make_run(tmp_path, "w", 1, 1.28, **WIDE)
    groups = group_runs([first.read(), second.read()])
    result = change(*groups)
    assert (round(result.mean, 6), result.stderr, result.p) == (-0.02, None, None)
    assert table(groups)[2][9:12] == ["1.2800", "-0.0200", ""]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"summary_text_fingerprint": "z"}, "other text"),
        ({"summary_val_bytes": 999}, "another part of the text"),
        ({"wallclock": {"seconds": 150}}, "wallclock.seconds is 150 there and 300 here"),
        ({"eval": {"stride": 32}}, "eval.stride is 32 there and null here"),
        ({"eval": {"canonical": True}}, "eval.canonical is True there and null here"),
        ({}, "has the settings and the seed of"),
    ],
)
def test_what_does_not_compare_is_refused(tmp_path: Path, settings: dict[str, object], reason: str):
    first, second = make_run(tmp_path, "b", 1, 1.30), make_run(tmp_path, "w", 1, 1.28, **settings)
    with pytest.raises(UserError, match=reason):
        group_runs([first.read(), second.read()])


def test_the_command_prints_the_table_and_the_report_draws_it(runs: list[RunFolder], tmp_path: Path):
    folders = [str(run) for run in runs]
    result = trainer_here("compare", *folders, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    head, _, base, wide = result.stdout.splitlines()
    assert head.startswith("| setting | seeds | steps | epochs | M tok/s | MFU |")
    assert base.startswith("| recipe | 4 | 102 | 1.50 | 1.000 | 41.0 % | 1.3450 |  | 1.3250 | 1.3150 ± 0.0065 |  |  |")
    assert "| model.mlp.ratio=5 | 4 |" in wide
    assert "| -0.0055 ± 0.0009, 4 pairs | 0.0079 |" in wide
    assert trainer_here("report", *folders, "--out=all.html", cwd=tmp_path).returncode == 0
    page = (tmp_path / "all.html").read_text()
    assert "<h2>Comparison</h2>" in page
    assert "-0.0055 ± 0.0009, 4 pairs" in page
    assert trainer_here("compare", folders[0], cwd=tmp_path).stderr.count("at least two run folders") == 1
    nowhere = trainer_here("compare", folders[0], "nowhere", cwd=tmp_path)
    assert nowhere.stderr == "trainer: nowhere: there is no such run folder\n"


def test_runs_without_a_seed_make_no_pairs(tmp_path: Path):
    runs = [
        make_run(tmp_path, f"b{n}", n, 1.3 + n / 100, seed_everything=False, eval={"canonical": False}) for n in (1, 2)
    ]
    runs += [make_run(tmp_path, f"w{n}", n, 1.2, seed_everything=n, model={"num_layers": 5}) for n in (0, 1)]
    groups = group_runs([run.read() for run in runs])
    assert [len(group.runs) for group in groups] == [2, 2]
    assert change(*groups).pairs == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"summary_bytes_total": "15"}, "bytes_total"),
        ({"summary_bytes_cap": 0}, "bytes_cap"),
        ({"summary_bytes_cap": None}, "bytes_cap"),
        ({"summary_val_bpb": 10**400}, "val_bpb"),
        ({"summary_val_bpb": True}, "val_bpb"),
        ({"summary_steps": 10**30}, "steps"),
        ({"summary_versions": {}}, "versions"),
    ],
)
def test_a_summary_that_was_changed_by_hand_is_no_finished_run(tmp_path: Path, changes: dict[str, Any], name: str):
    good, run = make_run(tmp_path, "good", 1, 1.2), make_run(tmp_path, "bad", 2, 1.2, **changes)
    with pytest.raises(UserError, match=f"holds no finished run .summary.json: {name} is missing or invalid"):
        run.read()
    assert run.read_summary() is None
    assert good.read_summary() is not None
    result = trainer_here("runs", f"--root={tmp_path}", cwd=tmp_path)
    assert (result.returncode, result.stdout.count("| finished |")) == (0, 1), result.stderr


@pytest.mark.parametrize("row", ["9" * 400 + ",2.0,0.4", "9" * 200_000])
def test_a_metrics_file_that_was_changed_by_hand_is_refused(tmp_path: Path, row: str):
    run = make_run(tmp_path, "bad", 2, 1.2)
    run.metrics.write_text(f"step,train/loss,perf/mfu\n{row}\n1,2.0,0.42\n")
    with pytest.raises(UserError, match=r"holds no finished run .metrics\.csv: (row 1 is not whole|field larger)"):
        run.read()


def test_the_same_time_on_another_device_is_named(tmp_path: Path):
    for name, device in (("a", "H200"), ("b", "H200"), ("c", "A100")):
        make_run(tmp_path, name, ord(name), 1.2, summary_versions={"device": device})
    recipe = tmp_path / "recipe"
    assert "warning" not in trainer_here("compare", str(recipe / "a"), str(recipe / "b"), cwd=tmp_path).stdout
    result = trainer_here("compare", *(str(recipe / name) for name in "abc"), cwd=tmp_path)
    assert "warning: recipe/c: ran on another device (A100, not H200)" in result.stdout


def test_the_number_of_processes_counts_and_not_how_it_was_asked_for(tmp_path: Path):
    for seed, name, devices, processes in ((1, "a", "auto", 1), (2, "b", 1, 1), (3, "c", "auto", None), (4, "d", 2, 2)):
        more = {} if processes is None else {"summary_processes": processes}
        make_run(tmp_path, name, seed, 1.2, trainer={"devices": devices}, **more)
    result = trainer_here("compare", *(str(tmp_path / "recipe" / name) for name in "abcd"), cwd=tmp_path)
    assert [line.split(" | ")[:2] for line in result.stdout.splitlines()[-2:]] == [
        ["| recipe", "3"],
        ["| processes=2", "1"],
    ]


def test_other_code_is_named_and_another_script_is_another_setting(tmp_path: Path):
    for seed in (1, 2):
        make_run(tmp_path, f"base-seed{seed}", seed, 1.2, summary_code_sha256="a")
        script = {"name": "plain.py", "sha256": "1"}
        make_run(tmp_path, f"plain-seed{seed}", seed, 1.1, summary_code_sha256="a", summary_script=script)
        make_run(tmp_path, f"new-seed{seed}", seed, 1.2, summary_code_sha256="b")
    recipe = tmp_path / "recipe"
    result = trainer_here("compare", *map(str, sorted(recipe.glob("[bp]*-seed*"))), cwd=tmp_path)
    assert "warning" not in result.stdout
    assert "| plain: script=plain.py@1 | 2 |" in result.stdout
    result = trainer_here("compare", str(recipe / "base-seed1"), str(recipe / "new-seed2"), cwd=tmp_path)
    assert "warning: recipe/new-seed2: other code than recipe/base-seed1" in result.stdout
    assert "new: code=b | 1 |" in result.stdout  # which is another setting, too
    changed = json.loads((recipe / "plain-seed2/summary.json").read_text())
    for script, message in (
        ({"name": "plain.py", "sha256": "2"}, "| plain: script=plain.py@2 | 1 |"),  # it was edited
        ("plain.py", "summary.json: script is missing or invalid"),
    ):
        (recipe / "plain-seed2/summary.json").write_text(json.dumps({**changed, "script": script}))
        result = trainer_here("compare", *map(str, sorted(recipe.glob("plain-seed*"))), cwd=tmp_path)
        assert message in result.stdout + result.stderr
