"""Two processes whose clocks disagree: rank 0 decides rates and end, and the weights stay equal bit by bit."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import TINY_OPTIONS
from tests.helpers import run_faulty


def test_processes_with_skewed_clocks_follow_rank_0(tmp_path: Path, shard_folder: Path):
    args = [
        "fit",
        "--config=int5mlp_10l",
        f"--data.source.folder={shard_folder}",
        *TINY_OPTIONS,
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.val_check_interval=1000",
        "--wallclock.seconds=1.0",
        "--eval.every_seconds=0.25",
        "--progress.mode=lines",
        "--model.schedule.warmdown_frac=0.5",
    ]
    result = run_faulty("skewed_clocks", {}, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one["rates"] == two["rates"]
    assert one["weights"] == two["weights"]
    assert len(one["rates"]) == 11  # rank 0 reads 1.0 s after the step that follows its tenth
    # Both validate after the same steps, by rank 0's clock, which reads 0.3, 0.6, 0.9 s then; and at the end.
    assert re.findall(r"step +(\d+)  validation", result.stdout) == ["4", "7", "10", "11"]
    assert one["rates"][7] == pytest.approx(0.8)  # 0.6 s are read: 0.4 s are left of a warmdown of 0.5 s
