"""`trainer export`: make the artifact again from a checkpoint, as training does, or files for other programs."""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.checkpoint import METADATA_KEY, live_state, stored_average
from trainer.cli.parser import CommandParser
from trainer.data.calibration import calibration_sequences
from trainer.data.sources import Shards
from trainer.device import default_device
from trainer.errors import UserError
from trainer.files import copy_file, sha256_of
from trainer.loading import is_artifact, load_run, stored_weights
from trainer.logging import logger
from trainer.model.config import TransformerConfig
from trainer.model_card import write_model_card
from trainer.open_format import Dtype, write_open_format
from trainer.quantize.artifact import Artifact
from trainer.quantize.export import SIZE_CAP
from trainer.quantize.export import export as export_model
from trainer.quantize.policy import QuantizationConfig
from trainer.run_folder import RunFolder
from trainer.source_bundle import source_bundle

EXAMPLE = "export --ckpt runs/quickstart/1/checkpoints/last.ckpt --shrink_to_cap"


def export(
    ckpt: str,
    out: str | None = None,
    cap: int = SIZE_CAP,
    shrink_to_cap: bool = False,
    data: str | None = None,
    format: Literal["artifact", "safetensors"] = "artifact",
    dtype: Dtype = "float32",
) -> None:
    """Make the artifact again from a checkpoint, as training does, or files for other programs.

    Args:
        ckpt: Checkpoint to export; with the format safetensors also an artifact.
        out: Folder for the files; default: export, or safetensors, in the run folder.
        cap: Largest allowed size of code and model together, in bytes (at least 1).
        shrink_to_cap: Store less until code and model fit under the cap.
        data: Folder of the training shards, which loss-aware rounding measures the loss on.
        format: Kind of files. artifact: the compressed file. safetensors, for other programs: all tensors as numbers in
            model.safetensors, the model's config in config.json, and the tokenizer.
        dtype: Type of the tensors in model.safetensors.

    Raises:
        UserError: If the checkpoint cannot be read, the shards are missing, or the files exceed the cap.
    """
    if format == "safetensors":
        if cap != SIZE_CAP or shrink_to_cap or data is not None:
            raise UserError("--cap, --shrink_to_cap and --data belong to the format artifact; leave them out")
        run = RunFolder.containing(Path(ckpt))
        folder = Path(out) if out else run.path / format
        weights = "best"
        if Path(ckpt).is_file() and not is_artifact(Path(ckpt)) and _takes_live(load_run(ckpt)[METADATA_KEY], run):
            weights = "live"
        size_in_bytes = write_open_format(stored_weights(Path(ckpt), weights), run.tokenizer, folder, dtype)
        is_scored = Path(ckpt).resolve() == run.artifact.resolve() and dtype == "float32"
        write_model_card(folder, run, run.read_summary() or {}, is_scored, open_format=True)
        print(f"{folder}: {size_in_bytes:,} bytes of {dtype} tensors, config.json, tokenizer.model and README.md")
        return
    if dtype != "float32":
        raise UserError("--dtype belongs to the format safetensors; leave it out")
    checkpoint = load_run(ckpt)
    metadata = checkpoint[METADATA_KEY]
    run = RunFolder.containing(Path(ckpt))
    target = RunFolder(out or run.path / "export")
    if target.summary.is_file():
        raise UserError(
            f"--out {target}: is the folder of a run, whose artifact would be replaced; choose another --out"
        )
    quantization = QuantizationConfig(**metadata["quantization"])
    config = TransformerConfig.from_dict(metadata["model"])
    is_loss_aware = quantization.rounding == "loss_aware"
    device = default_device() if is_loss_aware else torch.device("cpu")
    average = None if _takes_live(metadata, run) else stored_average(checkpoint)
    state = average or live_state(checkpoint)
    model = Artifact(config, state, metadata["tokenizer_sha256"], ckpt).build().to(device)
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(metadata["precision"])
    sequences = list(_sequences(data, metadata, config, quantization)) if is_loss_aware else []
    code = source_bundle()
    _check_target(target, run, code)
    if metadata["code_sha256"] != hashlib.sha256(code).hexdigest():
        logger.warning(f"the code has changed since the run of {ckpt}; {target.code} is the code of today")
    try:
        target.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); choose another --out") from error
    if not run.tokenizer.is_file():
        logger.warning(f"{run.tokenizer}: is missing, so it is not copied; the artifact needs it")
    copies = ((run.tokenizer, target.tokenizer, metadata["tokenizer_sha256"]), (run.config, target.config, None))
    for source, copy, sha256 in copies:
        if source.is_file() and run.path.resolve() != target.path.resolve():
            copy_file(source, copy, sha256)
    exported = export_model(
        model,
        quantization,
        metadata["tokenizer_sha256"],
        target.path,
        code,
        cap,
        shrink_to_cap,
        (tokens.to(device) for tokens in sequences),
        partial(torch.autocast, device.type, autocast, enabled=autocast is not None and device.type == "cuda"),
    )
    assert exported is not None
    size = exported.size
    is_scored = run.artifact.is_file() and sha256_of(run.artifact) == sha256_of(target.artifact)
    write_model_card(target.path, run, run.read_summary() or {}, is_scored)
    logger.info(f"stored the {'averaged' if average else 'live'} weights of step {checkpoint['global_step']:,}")
    print(f"{target.artifact}: {size.model:,} model + {size.code:,} code = {size.total:,} of {cap:,} bytes")


def _check_target(target: RunFolder, run: RunFolder, code: bytes) -> None:
    """Refuse a folder whose files of these names are something else than those of an export, stopped or not.

    Raises:
        UserError: With the name of such a file.
    """
    if target.artifact.is_file() or target.path.resolve() == run.path.resolve():
        return
    for path, content in ((target.code, code), (target.tokenizer, run.tokenizer), (target.config, run.config)):
        mine = content if isinstance(content, bytes) else content.read_bytes() if content.is_file() else b""
        if path.exists() and not (path.is_file() and path.read_bytes() == mine):
            raise UserError(
                f"--out {target}: its {path.name} was not written by an export and would be overwritten; choose "
                "another --out"
            )


def _takes_live(metadata: dict[str, Any], run: RunFolder) -> bool:
    """Whether the run stored, or would store, the weights of its last step although it has an average."""
    if metadata["weights"] == "better" and not run.summary.is_file():
        raise UserError(f"{run}: has not ended, and so not decided which weights are better; resume it with fit --ckpt")
    return bool(
        metadata["weights"] == "live" or (metadata["weights"] == "better" and run.read().summary["weights"] == "live")
    )


def _sequences(
    data: str | None, metadata: dict[str, Any], config: TransformerConfig, quantization: QuantizationConfig
) -> Iterator[Tensor]:
    """Calibration text of the checkpoint's run."""
    if data is None:
        raise UserError("--data is missing: loss-aware rounding needs training text; name the shard folder of the run")
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: there is no such folder; name the shard folder that the run trained on")
    settings = metadata["batch_tokens"], metadata["sequence_length"], metadata["order"], metadata["seed"]
    text, count = Shards(data).prepared(), quantization.calibration_sequences
    return calibration_sequences(
        text, count, *settings, config.vocab_size, metadata["tokenizer_sha256"], metadata["held_out_tokens"]
    )


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(export, EXAMPLE, shrink_to_cap={"action": "store_true"})
