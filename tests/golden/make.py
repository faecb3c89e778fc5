"""Writes this version's golden files, once for each release: `python -m tests.golden.make`.

They are a run of a very small model with all it needs, and what this version made of it. docs/artifact.md promises that
later versions make the same of it.
"""

import contextlib
import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceTrainer

import trainer
from tests.conftest import make_documents
from trainer.data.shards import write_shard
from trainer.data.tokenizer import BOS, load_tokenizer

VOCAB_SIZE = 280
STEPS = 6
SAVED = 4  # the step of the checkpoint
RECIPE = f"""\
data:
  source: {{class_path: trainer.data.sources.Shards, init_args: {{folder: shards}}}}
  batch_tokens: 256
  sequence_length: 32
  order: shuffled
model:
  vocab_size: {VOCAB_SIZE}
  num_layers: 2
  model_dim: 8
  attention: {{num_heads: 2, num_kv_heads: 1, xsa: true, gate_dims: 2, window: 4}}
  bigram: {{buckets: 16, dim: 4}}
  smear: {{gate: per_token, dims: 4}}
  loop: {{repeats: 1, first: 1, last: 1}}
  value_embedding_blocks: 1
  schedule: {{warmdown_steps: 4}}
averaging: {{every: 1, start_frac: 1.0}}
checkpoints: {{every: {SAVED}}}
eval: {{window: 32, stride: 8, batch_windows: 16, max_tokens: 300}}
export: {{quantization: {{small_tensor: 16, calibration_sequences: 2}}}}
trainer: {{max_steps: {STEPS}, val_check_interval: {SAVED}, log_every_n_steps: 1}}
"""


def make(folder: Path) -> None:
    """Train, store and score; only what a later version reads is left in the folder."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    documents = make_documents(60, 0)
    with (shards / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=file,
            vocab_size=VOCAB_SIZE,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",  # the tables of another one take 240 KB
            minloglevel=2,
        )
    tokenizer = load_tokenizer(shards / "tokenizer.model")
    for name, part in (("train", documents[:50]), ("val", documents[50:])):
        tokens = [token for ids in tokenizer.encode(part) for token in (BOS, *ids)]
        write_shard(shards / f"words_{name}_000000.bin", np.array(tokens, dtype=np.uint16))
    recipe = folder / "golden.yaml"
    recipe.write_text(RECIPE)
    run = trainer.fit(str(recipe), {"trainer.accelerator": "cpu"})
    ans = {"export.quantization.rounding": "loss_aware", "export.quantization.codec": "ans"}
    coded = trainer.fit(str(recipe), {"trainer.accelerator": "cpu", **ans})
    with (run.run_folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    (saved,) = run.run_folder.glob(f"checkpoints/*{SAVED}*.ckpt")
    shutil.copy(saved, folder / "step.ckpt")
    for name, each in (("nearest.zst", run), ("loss_aware.zst", coded)):
        shutil.copy(each.run_folder / "artifact.zst", folder / name)
    shutil.copy(run.run_folder / "config.yaml", folder / "config.yaml")
    expected = {
        "nearest.zst": run.val_bpb,
        "loss_aware.zst": coded.val_bpb,
        "step.ckpt": trainer.validate(folder / "step.ckpt").val_bpb,
        "losses": losses[SAVED:],
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / "runs")


if __name__ == "__main__":
    target = Path(__file__).parent / trainer.__version__
    if target.exists():
        sys.exit(f"{target}: exists; golden files are written once, by the version that is released")
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        make(Path())
        shutil.copytree(place, target)
