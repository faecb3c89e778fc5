"""`trainer fit --dry_run`: what a run would take, before anything is trained. It reads, and never writes."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from trainer.callbacks.export import PostTrainExport
from trainer.callbacks.wallclock import WallclockCutoff
from trainer.cli.lightning_cli import TrainerCLI
from trainer.cli.resume import start_from
from trainer.data.shards import TokenFiles
from trainer.data.stream import check_batch
from trainer.device import available_memory, default_device, device_name, synchronize
from trainer.errors import UserError
from trainer.files import check_can_make
from trainer.lightning_module import DTYPES, LanguageModel
from trainer.logging import logger
from trainer.model.flops import forward_flops
from trainer.model.kernel_choice import choose_fused, supported_fused
from trainer.model.memory import TrainingMemory, saved_bytes, training_memory
from trainer.optim.schedule import warmdown_warning
from trainer.quantize.size_forecast import forecast_bytes
from trainer.run_folder import HINT, check_name
from trainer.source_bundle import source_bundle
from trainer.step import clip_gradients, micro_batch_count, train_step

# Share of the speed of a large matrix product that a compiled step reaches on an H200, with all fused operators and
# without them (docs/log.md).
REACHED, REACHED_UNFUSED = 0.55, 0.3
PRODUCT = 8192  # rows and columns of that product
MEASURED_TOKENS = 512  # longest sequences of the steps that are timed
SECONDS = 2.0  # that such a step may take
SIZE_ERROR = 0.03  # share by which the estimated size may be wrong
FEW_BITS = 3.5  # per parameter; with so few, rounding cost 0.006 bpb (docs/ablations.md)
GIB = 2**30

Context = Callable[[], AbstractContextManager[object]]


def dry_run(cli: TrainerCLI) -> None:
    """Print the forecast of a run.

    Args:
        cli: The configured objects.

    Raises:
        UserError: If the run cannot fit into the memory or into the cap, or would be refused before its first step.
    """
    if cli.config.ckpt is not None:
        raise UserError("--dry_run forecasts whole runs, not what --ckpt leaves of one; leave one of them out")
    if (name := cli.config.run_name) is not None:
        check_name(cli.folder_of_runs, name)
        if (run := cli.folder_of_runs / name).exists():
            raise UserError(f"{run}: this run exists already; choose another --run_name")
    module, data, processes = cli.model, cli.datamodule, cli.trainer.world_size
    check_can_make(cli.folder_of_runs, HINT)
    check_batch(data.batch_tokens, data.sequence_length, processes)
    if cli.config.init_from is not None:
        start_from(cli, resumes=False)
    data.source.check()
    data.check_before_preparing()
    device = cli.trainer.strategy.root_device
    # The processes of a machine share its cores and its memory; each GPU is of one.
    sharing = processes // cli.trainer.num_nodes if device.type == "cpu" else 1
    available = available_memory(device) // sharing
    config, length = module.model.config, data.sequence_length
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    logger.info(f"forecast for {cli.recipe}; nothing is trained or written")
    _log("model", f"{parameters:,} parameters")
    _forecast_size(cli, parameters)
    fast, slow = (3 * forward_flops(config, length, is_looped) for is_looped in (False, True))
    flops = " to ".join(f"{data.batch_tokens * each / 1e12:.3g}" for each in sorted({fast, slow}))
    _log("step", f"{data.batch_tokens:,} tokens, {flops} TFLOP")
    is_compiled = module.compiles_on(device)
    if is_compiled and device.type == "cuda":
        dtype = DTYPES.get(str(cli.trainer.precision), torch.float32)
        fused = choose_fused(config, device, dtype, supported_fused(config, device, dtype)._asdict())
        memory = training_memory(config, parameters, fused, dtype.itemsize)
        _forecast_memory(cli, memory, available)
        rate = _product_speed(device, dtype)
        reached = REACHED if all(fused) else REACHED_UNFUSED
        speed = reached * rate / slow
        source = f"{reached:.0%}, as on an H200, of the {rate / 1e12:,.0f} TFLOP/s of a large matrix product"
    else:
        steps = _Steps(module, device, length, cli.trainer.precision_plugin.forward_context)
        micro_batch = _forecast_memory(cli, steps.memory(parameters), available)
        speed = steps.tokens_per_second(data.batch_tokens // processes, micro_batch) / sharing
        source = "measured" + (", not compiled" if is_compiled else "")
    _forecast_budget(cli, speed * processes, slow / fast, f"{source} on {device_name(device)}")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / 2**20:.1f} MiB"


def _without_gpu(device: torch.device) -> str:
    return " (no GPU was found)" if device.type == default_device().type == "cpu" else ""


def _log(name: str, text: str) -> None:
    logger.info(f"  {name:<10}{text}")


def _forecast_size(cli: TrainerCLI, parameters: int) -> None:
    export = cli.callback(PostTrainExport)
    if not export.enabled:
        return
    model, code = cli.model.model, len(source_bundle())
    room = export.cap - code
    if room <= 0:
        raise UserError(f"--export.cap {export.cap:,}: the code alone has {code:,} bytes; raise it")
    size = forecast_bytes(model.state_dict(), model.config, export.quantization, room, export.shrink_to_cap)
    if size is None:
        _log("size", "follows from the trained weights; --export.shrink_to_cap true fits it under the cap")
        return
    bits = 8 * size / parameters
    total = f"{size:,} model + {code:,} code = {size + code:,} of {export.cap:,} bytes"
    _log("size", f"about {total}, {bits:.2f} bits per parameter")
    if export.shrink_to_cap and bits < FEW_BITS:
        logger.warning(f"{bits:.2f} bits per parameter are few, and rounding costs more with fewer")
    if size <= room:
        return
    remedy = "" if export.shrink_to_cap else "set --export.shrink_to_cap true, or "
    remedy += "lower --model.num_layers or --model.model_dim"
    if size - room > SIZE_ERROR * size:
        raise UserError(f"the artifact would be about {size - room:,} bytes over the cap of {export.cap:,}; {remedy}")
    logger.warning(f"the artifact may be over the cap: this estimate can be {SIZE_ERROR:.0%} off; {remedy}")


def _forecast_memory(cli: TrainerCLI, memory: TrainingMemory, available: int) -> int:
    """Print the memory of a step; returns the tokens of its micro-batches.

    Raises:
        UserError: If it does not fit.
    """
    module, length = cli.model, cli.datamodule.sequence_length
    sequences = cli.datamodule.batch_tokens // cli.trainer.world_size // length
    device = cli.trainer.strategy.root_device
    largest = memory.largest(sequences, length, available)
    if largest is None:
        raise UserError(
            f"one sequence of {length:,} tokens needs about {_gib(memory.total(length))}, and {device} has "
            f"{_gib(available)}{_without_gpu(device)}; lower --data.sequence_length or --model.model_dim"
        )
    chooses = module.micro_batch_tokens == "auto" and device.type == "cuda"
    requested = sequences * length if module.micro_batch_tokens == "auto" else module.micro_batch_tokens
    slices = micro_batch_count(sequences, length, requested)
    tokens = largest if chooses else -(-sequences // slices) * length
    if tokens > largest and memory.total(tokens) > available:
        raise UserError(
            f"micro-batches of {tokens:,} tokens need about {_gib(memory.total(tokens))}, and {device} has "
            f"{_gib(available)}{_without_gpu(device)}; set --model.micro_batch_tokens {largest}"
        )
    _log(
        "memory",
        f"about {_gib(memory.total(tokens))} of {_gib(available)} on {device}, micro-batches of {tokens:,} tokens",
    )
    return tokens


def _forecast_budget(cli: TrainerCLI, speed: float, loop_factor: float, source: str) -> None:
    """Print how far the budget goes.

    Args:
        cli: The configured objects.
        speed: Tokens per second with the loop.
        loop_factor: How many times as fast a step is without it.
        source: Where the speed comes from.
    """
    trainer, data = cli.trainer, cli.datamodule
    cutoff = cli.callback(WallclockCutoff)
    share = cli.model.model.config.loop.start_frac if loop_factor > 1 else 0.0  # of the training without the loop
    budget = cutoff.clock.budget
    if budget is not None:
        speed *= share * loop_factor + 1 - share
    else:
        speed /= share / loop_factor + 1 - share
    _log("speed", f"about {speed:,.0f} tokens/s ({source})")
    limits = [] if budget is None else [int(budget * speed / data.batch_tokens)]
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps)
    if not limits:
        _log(
            "budget", "no limit: it trains until it is interrupted; --wallclock.seconds or --trainer.max_steps sets one"
        )
        return
    steps = min(limits)
    if steps == 0:
        raise UserError(
            f"a step takes about {data.batch_tokens / speed:,.0f} s, and the budget is {budget:,.0f} s; raise "
            "--wallclock.seconds, or lower --data.batch_tokens or the model"
        )
    tokens = steps * data.batch_tokens
    text, reason = None, "the text is prepared when the run starts"
    try:
        if data.source.is_prepared():
            text = data.source.prepared()
    except UserError as error:
        reason = str(error)
    if text is None:
        epochs = f"epochs unknown ({reason})"
    else:
        count = len(TokenFiles(text.train, data.held_out_tokens or 0))
        epochs = f"{tokens / count:.2f} epochs of {count:,}"
    schedule = cli.model.schedule
    if warning := warmdown_warning(schedule.warmdown_steps, schedule.warmdown_frac, steps):
        _log("schedule", warning)
    _log("budget", f"about {steps:,} steps in {tokens / speed:,.0f} s, {tokens:,} tokens, {epochs}")


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
    for _ in range(3):
        a @ a
    synchronize(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS / 2:
        for _ in range(5):
            a @ a
        synchronize(device)
        count += 5
    return count * 2 * PRODUCT**3 / (time.perf_counter() - started)


class _Steps:
    """Training steps on random tokens, in the model as it is; the run is not made."""

    def __init__(
        self,
        module: LanguageModel,
        device: torch.device,
        length: int,
        context: Context,
    ) -> None:
        self.module, self.device, self.context = module, device, context
        self.model = module.model.to(device)
        self.length = min(length, MEASURED_TOKENS)
        # Longer sequences cost more in attention alone.
        self.factor = forward_flops(self.model.config, self.length) / forward_flops(self.model.config, length)

    def tokens(self, sequences: int) -> Tensor:
        return torch.randint(self.model.config.vocab_size, (sequences, self.length + 1), device=self.device)

    def memory(self, parameters: int) -> TrainingMemory:
        """Memory of a step, from what one sequence keeps for its backward pass."""
        x = self.tokens(1)
        with self.context():
            size = saved_bytes(lambda: self.model.nll(x[:, :-1], x[:, 1:]), self.model)
        fixed = training_memory(self.model.config, parameters, self.module.fused, 4).fixed
        return TrainingMemory(fixed, size // self.length)

    def tokens_per_second(self, batch_tokens: int, micro_batch_tokens: int) -> float:
        """Speed of whole steps on this device.

        Args:
            batch_tokens: Tokens of a step.
            micro_batch_tokens: Tokens that fit at once.
        """
        optimizer = self.module.configure_optimizers()
        update_seconds, sequences = 0.0, 1

        def update() -> None:
            nonlocal update_seconds
            synchronize(self.device)
            started = time.perf_counter()
            clip_gradients(self.model.parameters(), self.module.optimizer_config.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            synchronize(self.device)
            update_seconds = time.perf_counter() - started

        while True:
            x = self.tokens(sequences)
            started = time.perf_counter()
            with self.context():
                train_step(self.model.nll, x, 1, lambda loss, last: loss.backward(), update)
            seconds = time.perf_counter() - started - update_seconds
            if seconds > SECONDS / 4 or 2 * sequences * self.length > micro_batch_tokens:
                break
            sequences *= 2
        return batch_tokens / (seconds / (sequences * self.length) * batch_tokens / self.factor + update_seconds)
