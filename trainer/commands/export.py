"""`trainer export --ckpt X`: make the artifact again from a checkpoint, exactly as training does."""

import shutil
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import OWN_KEY, live_state, load_checkpoint, stored_average
from trainer.data.sources import Shards
from trainer.datamodule import TokenData
from trainer.errors import UserError
from trainer.loading import run_folder_of
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.options import Parser
from trainer.quantize.calibration import calibrate
from trainer.quantize.export import CAP, ExportedSize, export
from trainer.quantize.policy import QuantizationConfig
from trainer.quantize.sensitive import SensitiveRounding

EXAMPLE = "export --ckpt runs/quickstart/1/checkpoints/last.ckpt --fit"


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("export", "Make the artifact again from a checkpoint, exactly as training does.", EXAMPLE)
    parser.add_argument("--ckpt", required=True, help="checkpoint to export")
    parser.add_argument("--out", help="folder for the files; default: `export` in the checkpoint's run folder")
    parser.add_argument("--cap", type=int, default=CAP, help="largest size of code and model, in bytes (%(default)s)")
    parser.add_argument("--fit", action="store_true", help="store less until code and model fit")
    parser.add_argument("--data", help="folder of shards to measure on; sensitive rounding needs it")
    return parser


def run(args: list[str]) -> None:
    """Parse the words after `export` and do it."""
    options = make_parser().parse_args(args)
    path = Path(options.ckpt)
    checkpoint = load_checkpoint(path)
    run_folder = run_folder_of(path)
    out = Path(options.out) if options.out else run_folder / "export"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); choose another --out") from error
    size = export_checkpoint(checkpoint, out, options.cap, options.fit, options.data)
    for name in ("tokenizer.model", "config.yaml"):
        if (run_folder / name).is_file() and run_folder.resolve() != out.resolve():
            shutil.copyfile(run_folder / name, out / name)
    print(
        f"{out / 'artifact.zst'}: {size.model:,} model + {size.code:,} code = {size.total:,} of {options.cap:,} bytes"
    )


def export_checkpoint(
    checkpoint: dict[str, Any], folder: Path, cap: int, fit: bool = False, data: str | None = None
) -> ExportedSize:
    """Average, quantise and write, with the settings the checkpoint holds.

    Raises:
        UserError: If its rounding measures on text and there is none.
    """
    own = checkpoint[OWN_KEY]
    state = stored_average(checkpoint) or live_state(checkpoint)
    config = TransformerConfig.from_dict(own["model"])
    quantization = QuantizationConfig(**own["quantization"])
    rounding = None
    if quantization.rounding == "sensitive":
        if data is None:
            raise UserError(
                "--data is missing: this recipe's rounding measures on training text; name its shard folder"
            )
        if not Path(data).is_dir():
            raise UserError(f"--data {data}: there is no such folder; name the shard folder that the run trained on")
        sizes = own["batch_tokens"], own["sequence_length"], own["order"], own["seed"]
        text = TokenData(Shards(data), *sizes, vocab_size=config.vocab_size)
        text.expected_tokenizer = own["tokenizer_sha256"]
        text.setup("fit")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Transformer(config).to(device)
        model.load_state_dict(state)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(own["precision"])
        with torch.autocast(device.type, dtype, enabled=dtype is not None and device.type == "cuda"):
            batches = text.calibration_batches(quantization.calibration_sequences, device)
            rounding = SensitiveRounding(model.state_dict(), calibrate(model, batches))
    return export(state, config, quantization, own["tokenizer_sha256"], folder, cap, fit, rounding)
