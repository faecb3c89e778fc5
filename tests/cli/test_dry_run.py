"""The forecast of a run against what a run really takes; it writes nothing and refuses what cannot fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer
from tests.conftest import ROOT, TINY, TINY_OPTIONS
from tests.helpers import trainer_here
from trainer.cli import dry_run
from trainer.errors import UserError
from trainer.kernels.fusion import Fused
from trainer.model import kernel_choice
from trainer.model.attention import AttentionConfig
from trainer.model.config import LoopConfig, TransformerConfig
from trainer.model.embedding import BigramConfig
from trainer.model.memory import TrainingMemory, saved_bytes, training_memory
from trainer.model.mlp import MLPConfig
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import write_artifact
from trainer.quantize.policy import QuantizationConfig, storage_dtype
from trainer.quantize.rounding import prune_smallest
from trainer.quantize.size_forecast import BITS_AT_FINEST, TRAINED, forecast_bytes
from trainer.source_bundle import source_bundle

DOCS = ROOT / "docs"
INT5 = TransformerConfig()
FRONTIER = replace(
    INT5,
    vocab_size=8192,
    num_layers=9,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, xsa=True, gate_dims=12, window=256),
    mlp=MLPConfig(4),
    bigram=BigramConfig(buckets=None),
    value_embedding_blocks=3,
)
LOOPED = replace(FRONTIER, loop=LoopConfig(repeats=1, first=3, last=4))


def forecast(folder: Path, cwd: Path, *args: str) -> tuple[int, str]:
    options = [*TINY_OPTIONS, "--data.source=Shards", f"--data.source.folder={folder}", *args]
    result = trainer_here("fit", "--config=int5mlp_10l_parity", *options, "--dry_run", cwd=cwd)
    return result.returncode, result.stdout + result.stderr


def test_a_forecast_says_what_the_run_takes_and_writes_nothing(shard_folder, tmp_path):
    code, text = forecast(shard_folder, tmp_path, "--trainer.max_steps=50", "--wallclock.seconds=1000")
    assert code == 0, text
    assert f"{sum(each.numel() for each in Transformer(TINY).parameters()):,} parameters" in text
    tokens = sum((path.stat().st_size - 1024) // 2 for path in shard_folder.glob("*_train_*.bin"))
    assert "about 50 steps in" in text
    assert "since model.schedule.warmdown_steps is 600" in text
    assert f"12,800 tokens, {12_800 / tokens:.2f} epochs of {tokens:,}" in text
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_not_prepared_has_no_epochs_and_is_not_made(tmp_path):
    code, text = forecast(tmp_path / "none", tmp_path, "--trainer.max_steps=5")
    assert code == 0, text
    assert "epochs unknown (" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "refusal"),
    [
        (("--export.cap=CODE",), "; set --export.shrink_to_cap true, or lower --model.num_layers or --model.model_dim"),
        (("--export.cap=1000",), "--export.cap 1,000: the code alone has"),
        (("--export.cap=CODE", "--export.shrink_to_cap=true"), "bytes over the cap of"),
    ],
)
def test_what_is_over_the_cap_is_refused_with_what_to_change(shard_folder, tmp_path, args, refusal):
    code, text = forecast(
        shard_folder, tmp_path, *(each.replace("CODE", str(len(source_bundle()) + 500)) for each in args)
    )
    assert code == 1
    assert refusal in text


def test_a_budget_that_ends_before_the_first_step_is_refused(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run._Steps, "tokens_per_second", lambda *args: 2.0)
    code, text = forecast(shard_folder, tmp_path, "--wallclock.seconds=100")
    assert code == 1
    assert "a step takes about 128 s, and the budget is 100 s; raise --wallclock.seconds" in text
    assert (
        "no limit: it trains until it is interrupted" in forecast(shard_folder, tmp_path, "--trainer.max_steps=-1")[1]
    )


def test_what_exceeds_the_memory_is_refused_with_a_micro_batch_that_fits(shard_folder, tmp_path, monkeypatch):
    args = ("--trainer.max_steps=5",)
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 3 * 2**20)
    code, text = forecast(shard_folder, tmp_path, *args)
    assert code == 1
    option = text.strip().rpartition("set ")[2]
    assert option.startswith("--model.micro_batch_tokens")
    assert forecast(shard_folder, tmp_path, *args, *option.split())[0] == 0
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 2**20)
    assert "one sequence of 32 tokens needs" in forecast(shard_folder, tmp_path, *args)[1]


@pytest.mark.parametrize("codec", ["zstd-22", "ans"])
@pytest.mark.parametrize("prune_frac", [0.0, 0.3])
def test_the_size_is_that_of_a_file_of_normal_weights(tmp_path, codec, prune_frac):
    config = replace(INT5, num_layers=4, model_dim=256, bigram=BigramConfig(buckets=2048, dim=128))
    choice = QuantizationConfig(codec=codec, prune_frac=prune_frac)
    state = {name: torch.randn_like(tensor) for name, tensor in Transformer(config).state_dict().items()}
    pruned = {
        name: prune_smallest(tensor, prune_frac) if tensor.ndim == 2 and tensor.numel() > 65536 else tensor
        for name, tensor in state.items()
    }
    dtypes = {name: storage_dtype(name, tensor, config, choice) for name, tensor in state.items()}
    size = write_artifact(tmp_path / "artifact.zst", config, pruned, dtypes, "0" * 64, codec=codec)
    assert forecast_bytes(state, config, choice, 10**9, False) / TRAINED == pytest.approx(size, rel=0.02)


def test_loss_aware_rounding_fills_the_cap_or_stops_at_its_finest_step():
    choice = QuantizationConfig(rounding="loss_aware", codec="ans")
    state = Transformer(TINY).state_dict()
    parameters = sum(tensor.numel() for tensor in state.values())
    assert 20_000 <= forecast_bytes(state, TINY, choice, 30_000, True) <= 30_000
    assert forecast_bytes(state, TINY, choice, 10**9, True) == round(parameters * BITS_AT_FINEST / 8)
    assert forecast_bytes(state, TINY, choice, 10**9, False) is None
    scales = sum(2 * each.size(0) for each in state.values() if each.ndim == 2 and each.size(0) > 8)
    assert scales < forecast_bytes(state, TINY, choice, 100, True) < 2 * parameters  # more than there is room for


def test_what_would_not_be_forecast_is_refused(shard_folder, tmp_path):
    (tmp_path / "runs/int5mlp_10l_parity/taken").mkdir(parents=True)
    (tmp_path / "file").touch()
    for args, refusal in (
        (["--ckpt=last.ckpt"], "leave one of them out"),
        (["--init_from=nowhere.zst"], "nowhere.zst"),
        (["--run_name=taken"], "this run exists already; choose another --run_name"),
        (["--data.batch_tokens=100"], "is not a multiple of data.sequence_length 32"),
        (["--data.source=LocalText", "--data.source.train_files=[nothing.txt]"], "nothing.txt"),
        (["--model.vocab_size=400"], "set --model.vocab_size 300"),
        (["--eval.adapt_rate=0.1"], "eval.adapt_rate belongs to trainer validate"),
        (["--run_name=a/../b"], "--run_name a/../b: must be the name of a folder"),
        ([f"--data.source.folder={tmp_path / 'runs'}"], "holds no shard named"),
        (["--data.held_out_tokens=100000000", "--trainer.max_steps=1"], "tokens; hold out fewer"),
        (
            [
                "--data.source=LocalText",
                f"--data.source.train_files=[{ROOT}/README.md]",
                f"--data.source.folder={DOCS}",
            ],
            "which this trainer did not make",
        ),
        (
            [f"--trainer.default_root_dir={tmp_path}/file/runs"],
            "/file: is a file, not a folder; choose another --trainer",
        ),
        (
            ["--data.source=PythonDocumentation", f"--data.source.folder={tmp_path}/file/text"],
            "/file: is a file, not a folder; choose another data.source.folder",
        ),
    ):
        code, text = forecast(shard_folder, tmp_path, *args)
        assert code == 1
        assert refusal in text
    with pytest.raises(UserError, match="trainer fit --dry_run"):
        trainer.fit(overrides={"dry_run": True})
    assert {each.name for each in tmp_path.iterdir()} == {"runs", "file"}


def test_processes_on_a_cpu_share_its_cores_and_its_memory(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run._Steps, "tokens_per_second", lambda *args: 1000.0)
    monkeypatch.setattr(dry_run, "available_memory", lambda device: 8 * 2**30)
    options = ("--trainer.max_steps=5", "--trainer.devices=2", "--trainer.accelerator=cpu")
    _, text = forecast(shard_folder, tmp_path, *options)
    assert "about 1,000 tokens/s" in text
    assert "of 4.0 GiB" in text


@pytest.mark.parametrize(
    ("config", "parameters", "tokens", "low", "high"),
    [
        (INT5, 25_517_137, 131_072, 18.0, 18.0),
        (INT5, 25_517_137, 393_216, 53.3, 53.3),
        (FRONTIER, 32_265_191, 131_072, 24.3, 24.3),
        (LOOPED, 32_265_191, 131_072, 27.0, 28.8),
    ],
)
def test_memory_is_what_runs_took_on_an_h200(config, parameters, tokens, low, high):
    """`max_memory_allocated` of the runs of 2026-11-26 to 2026-11-29 in docs/log.md, in GiB."""
    total = training_memory(config, parameters, Fused(True, True, True), 2).total(tokens) / 2**30
    assert low / 1.1 < total < high * 1.1


def test_what_an_uncompiled_model_keeps_is_counted_once_and_without_its_weights():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    x = torch.randn(7, 10)  # the products keep their inputs; ReLU keeps its output, which is the second input
    assert saved_bytes(lambda: model(x), model) == 4 * 7 * (10 + 20)


def test_the_largest_part_of_a_step_that_fits():
    memory = TrainingMemory(1000, 10)
    assert memory.largest(12, 8, 1000 + 10 * 96) == 96
    assert memory.largest(12, 8, 1000 + 10 * 95) == 48
    assert memory.largest(12, 8, 1000 + 10 * 8) == 8
    assert memory.largest(12, 8, 1000 + 10 * 7) is None


def test_the_forecast_expects_only_fused_operators_that_the_card_and_the_type_allow(monkeypatch):
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: object())
    gpu, half = torch.device("cuda"), torch.bfloat16
    for capability, dtype, width, expected in (
        ((9, 0), half, 128, Fused(True, True, True)),
        ((7, 5), torch.float16, 128, Fused(False, True, True)),
        ((9, 0), torch.float32, 128, Fused()),
        ((9, 0), half, 96, Fused(True, False, True)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        config = replace(FRONTIER, model_dim=4 * width)
        assert kernel_choice.supported_fused(config, gpu, dtype) == expected
    monkeypatch.setattr(kernel_choice, "find_spec", lambda name: None)
    assert kernel_choice.supported_fused(FRONTIER, gpu, half) == Fused()


def test_a_text_that_a_run_would_make_again_has_no_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(dry_run._Steps, "tokens_per_second", lambda *args: 1000.0)
    (tmp_path / "a.txt").write_text("\n".join(f"Line {k} of some text with words." for k in range(3000)))
    source = ["--data.source=LocalText", "--data.source.train_files=[a.txt]", "--data.source.folder=made"]
    sizes = ["--trainer.max_steps=5", "--data.source.val_every=2"]
    made = trainer_here("prepare", *source, "--data.source.vocab_size=300", "--data.source.val_every=2", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = trainer_here("fit", *TINY_OPTIONS, *source, *sizes, "--model.vocab_size=310", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "epochs unknown (the text is prepared when the run starts)" in result.stdout


def test_the_tokenizer_of_the_parent_is_what_counts(tmp_path, tiny_overrides, monkeypatch):
    """`--init_from` gives the source the parent's tokenizer."""
    monkeypatch.setattr(dry_run._Steps, "tokens_per_second", lambda *args: 1000.0)
    (tmp_path / "a.txt").write_text("Some text. " * 100)
    options = {"trainer.max_steps": 2, "trainer.default_root_dir": str(tmp_path / "runs")}
    parent = trainer.fit("int5mlp_10l_parity", overrides=tiny_overrides | options, quiet=True)
    source = ["--data.source=LocalText", "--data.source.train_files=[a.txt]", "--data.source.folder=made"]
    child = [f"--init_from={parent.run_folder / 'artifact.zst'}", "--dry_run"]
    args = ("fit", "--config=int5mlp_10l_parity", *TINY_OPTIONS, *source, *child, "--trainer.max_steps=2")
    result = trainer_here(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
