"""The environment variables of the published port, as aliases of this trainer's options.

They rank between the recipe and the command line, and only count when a recipe is named: `SEED` or `DATA_PATH` may mean
something else to whoever runs a bare `trainer fit`. Source: openai/parameter-golf PR #560.
"""

import math
from collections.abc import Mapping

from trainer.errors import UserError

# A variable, and the options that take its value.
PLAIN = {
    "DATA_PATH": ["data.source.folder"],
    "TOKENIZER_PATH": ["data.source.tokenizer"],
    "RUN_ID": ["run_name"],
    "SEED": ["seed_everything"],
    "ITERATIONS": ["trainer.max_steps"],
    "WARMDOWN_ITERS": ["model.schedule.warmdown_steps"],
    "WARMUP_STEPS": ["warmup.steps"],
    "TRAIN_BATCH_TOKENS": ["data.batch_tokens"],
    "TRAIN_SEQ_LEN": ["data.sequence_length", "eval.window"],
    "TRAIN_LOG_EVERY": ["trainer.log_every_n_steps"],
    "EVAL_STRIDE": ["eval.stride"],
    "EVAL_BATCH_SEQS": ["eval.batch_windows"],
    "VOCAB_SIZE": ["model.vocab_size"],
    "NUM_LAYERS": ["model.num_layers"],
    "MODEL_DIM": ["model.model_dim"],
    "NUM_HEADS": ["model.attention.num_heads"],
    "NUM_KV_HEADS": ["model.attention.num_kv_heads"],
    "MLP_MULT": ["model.mlp.ratio"],
    "ROPE_BASE": ["model.attention.rope_base"],
    "LOGIT_SOFTCAP": ["model.logit_softcap"],
    "QK_GAIN_INIT": ["model.attention.qk_gain_init"],
    "BIGRAM_VOCAB_SIZE": ["model.bigram.buckets"],
    "BIGRAM_DIM": ["model.bigram.dim"],
    "TIED_EMBED_LR": ["model.optimizer.tied_embedding_lr"],
    "TIED_EMBED_INIT_STD": ["model.embedding_init_std"],
    "EMBED_LR": ["model.optimizer.embedding_lr"],
    "HEAD_LR": ["model.optimizer.head_lr"],
    "MATRIX_LR": ["model.optimizer.matrix_lr"],
    "SCALAR_LR": ["model.optimizer.scalar_lr"],
    "MUON_MOMENTUM": ["model.optimizer.momentum"],
    "MUON_BACKEND_STEPS": ["model.optimizer.newton_schulz_steps"],
    "MUON_MOMENTUM_WARMUP_START": ["model.schedule.momentum_warmup_start"],
    "MUON_MOMENTUM_WARMUP_STEPS": ["model.schedule.momentum_warmup_steps"],
    "BETA1": ["model.optimizer.beta1"],
    "BETA2": ["model.optimizer.beta2"],
    "ADAM_EPS": ["model.optimizer.eps"],
    "GRAD_CLIP_NORM": ["model.optimizer.grad_clip_norm"],
    "WEIGHT_DECAY": ["model.optimizer.weight_decay"],
    "SWA_START_FRAC": ["averaging.start_frac"],
    "SWA_EVERY": ["averaging.every"],
}
# Options for which the published script's 0 means off, which is null here.
ZERO_IS_NULL = ("WARMUP_STEPS", "EVAL_STRIDE", "BIGRAM_VOCAB_SIZE", "GRAD_CLIP_NORM")
# Variables whose value has to be translated.
SPECIAL = (
    "MAX_WALLCLOCK_SECONDS",
    "VAL_LOSS_EVERY",
    "TIE_EMBEDDINGS",
    "SWA_ENABLED",
    "LOAD_MODEL_PATH",
    "VAL_BATCH_SIZE",
)
WITHOUT_EFFECT = {
    "LOAD_MODEL_PATH": "no effect on fit; score a model with `trainer validate --ckpt`",
    "VAL_BATCH_SIZE": "no effect; plain and sliding evaluation share --eval.batch_windows",
    "SWA_ENABLED": "no effect; the recipe's --averaging applies",
}


def alias_options(environment: Mapping[str, str], command: str) -> tuple[list[str], list[str]]:
    """Options that environment variables set.

    Args:
        environment: Variables by name.
        command: fit or validate.

    Returns:
        Command-line arguments to place after the recipe, and a line to log for each variable that is set.

    Raises:
        UserError: If a value is not a number although it must be.
    """
    options: list[str] = []
    lines: list[str] = []
    for name in (*PLAIN, *SPECIAL):
        value = environment.get(name)
        if not value:
            continue
        try:
            args = _plain(name, value) if name in PLAIN else _special(name, value, command)
        except ValueError as error:
            raise UserError(f"environment: {name}={value} is not a number; correct it or unset it") from error
        lines.append(f"{name}={value}: {' '.join(args) if args else WITHOUT_EFFECT[name]}")
        options += args
    return options, lines


def _plain(name: str, value: str) -> list[str]:
    if name == "SWA_START_FRAC" and float(value) == 0:
        return ["--averaging.method=null"]
    if name in ZERO_IS_NULL and float(value) == 0:
        value = "null"
    return [f"--{key}={value}" for key in PLAIN[name]]


def _special(name: str, value: str, command: str) -> list[str]:
    if name == "MAX_WALLCLOCK_SECONDS":
        if math.isnan(float(value)):
            raise ValueError(value)
        return [f"--wallclock.seconds={value if float(value) > 0 else 'null'}"]
    if name == "VAL_LOSS_EVERY":
        return [f"--trainer.val_check_interval={value}"] if int(value) > 0 else ["--trainer.limit_val_batches=0"]
    if name == "TIE_EMBEDDINGS":
        return [f"--model.tied_embeddings={'true' if int(value) else 'false'}"]
    if name == "SWA_ENABLED":
        return [] if int(value) else ["--averaging.method=null"]
    if name == "LOAD_MODEL_PATH" and command == "validate":
        return [f"--ckpt={value}"]
    return []
