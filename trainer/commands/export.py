"""`trainer export --ckpt X`: make the artifact again from a checkpoint, exactly as training does."""

import shutil
from pathlib import Path
from typing import Any

from trainer.checkpoint import OWN_KEY, live_state, load_checkpoint, stored_average
from trainer.errors import UserError
from trainer.loading import run_folder_of
from trainer.model.transformer import TransformerConfig
from trainer.options import Parser
from trainer.quantize.export import CAP, ExportedSize, export
from trainer.quantize.policy import QuantizationConfig

EXAMPLE = "export --ckpt runs/quickstart/1/checkpoints/last.ckpt --fit"


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("export", "Make the artifact again from a checkpoint, exactly as training does.", EXAMPLE)
    parser.add_argument("--ckpt", required=True, help="checkpoint to export")
    parser.add_argument("--out", help="folder for the files; default: `export` in the checkpoint's run folder")
    parser.add_argument("--cap", type=int, default=CAP, help="largest size of code and model, in bytes (%(default)s)")
    parser.add_argument("--fit", action="store_true", help="store less until code and model fit")
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
    size = export_checkpoint(checkpoint, out, options.cap, options.fit)
    for name in ("tokenizer.model", "config.yaml"):
        if (run_folder / name).is_file() and run_folder != out:
            shutil.copyfile(run_folder / name, out / name)
    print(
        f"{out / 'artifact.zst'}: {size.model:,} model + {size.code:,} code = {size.total:,} of {options.cap:,} bytes"
    )


def export_checkpoint(checkpoint: dict[str, Any], folder: Path, cap: int, fit: bool = False) -> ExportedSize:
    """Average, prune, quantise and write, with the settings the checkpoint holds."""
    own = checkpoint[OWN_KEY]
    state = stored_average(checkpoint) or live_state(checkpoint)
    return export(
        state,
        TransformerConfig.from_dict(own["model"]),
        QuantizationConfig(**own["quantization"]),
        own["tokenizer_sha256"],
        folder,
        cap,
        fit,
    )
