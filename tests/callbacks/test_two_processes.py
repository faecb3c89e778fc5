"""Two processes whose clocks disagree: rank 0's reading decides rate and end, and the weights stay equal bit by bit."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY_OPTIONS, run_python

SCRIPT = """
import hashlib, json, os, sys, time
import lightning.pytorch as pl
from trainer.__main__ import main
from trainer.callbacks.weight_averaging import WeightAveraging
from trainer.clock import TrainingClock
rank = int(os.environ.get("LOCAL_RANK", 0))
steps = [0]
# Rank 1 believes that three times as much time has passed.
TrainingClock.elapsed = property(lambda self: steps[0] * (0.1 if rank == 0 else 0.3))
seen = []
old = WeightAveraging.on_train_batch_end
def spy(self, trainer, module, *rest):
    old(self, trainer, module, *rest)
    steps[0] = trainer.global_step
    seen.append(module.lr_multiplier)
    sha = hashlib.sha256(b"".join(t.numpy().tobytes() for t in module.model.state_dict().values())).hexdigest()
    with open(f"rank{rank}.json", "w") as file:
        json.dump({"rates": seen, "weights": sha}, file)
WeightAveraging.on_train_batch_end = spy
raise SystemExit(main(sys.argv[1:]))
"""


def test_ranks_with_skewed_clocks_follow_rank_0(tmp_path: Path, shard_folder: Path):
    (tmp_path / "skewed.py").write_text(SCRIPT)
    words = [
        "fit",
        "--config=int5mlp_10l",
        f"--data.source.folder={shard_folder}",
        *TINY_OPTIONS,
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.val_check_interval=1000",
        "--wallclock.seconds=1.0",
        "--model.schedule.warmdown_frac=0.5",
    ]
    result = run_python("skewed.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one["rates"] == two["rates"]
    assert one["weights"] == two["weights"]
    assert len(one["rates"]) == 11  # rank 0 reads 1.0 s after the step that follows its tenth
    assert one["rates"][7] == pytest.approx(0.8)  # 0.6 s are read: 0.4 s are left of a warmdown of 0.5 s
