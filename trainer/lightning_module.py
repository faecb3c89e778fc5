"""The Lightning module: one batch is one manual optimizer step; validation scores windows."""

import gc
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from trainer.checkpoint import METADATA_KEY
from trainer.clock import TrainingClock
from trainer.data.identity import difference
from trainer.datamodule import POSITION_SETTINGS, data_of
from trainer.distributed import mean_over_ranks
from trainer.errors import UserError
from trainer.evaluation.adaptation import Adapter
from trainer.evaluation.metric import BitsPerByte, Score
from trainer.evaluation.per_document import DocumentScores, document_of_targets, total
from trainer.evaluation.sliding import NllFn, WindowScorer, score
from trainer.evaluation.windows import EvaluationConfig, WindowBatch
from trainer.kernels.attention_backends import AttentionBackend, SdpaBackend
from trainer.kernels.compiler import configure_compiler
from trainer.kernels.fusion import Fused
from trainer.kernels.windowed_attention import with_window
from trainer.logging import logger
from trainer.model.config import TransformerConfig
from trainer.model.flops import forward_flops, peak_flops
from trainer.model.kernel_choice import choose_attention, choose_fused
from trainer.model.transformer import Transformer
from trainer.optim.muon_adamw import MuonAdamW, OptimizerConfig, parameter_groups
from trainer.optim.schedule import ScheduleConfig, lr_multiplier, muon_momentum
from trainer.progress_display import ProgressDisplay
from trainer.recipes import flatten
from trainer.step import GradientNorms, StepFence, clip_gradients, micro_batch_count, train_step

DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "64-true": torch.float64}  # of activations


class LanguageModel(pl.LightningModule):
    """A transformer, its optimizer and its schedule."""

    def __init__(
        self,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        micro_batch_tokens: int | Literal["auto"] = "auto",
        compile: Literal["auto", "on", "off"] = "auto",
        **transformer: Any,
    ) -> None:
        """Build the model and everything that trains it.

        Args:
            optimizer: Learning rates, momentum and weight decay.
            schedule: Warmdown and momentum warm-up.
            micro_batch_tokens: Tokens of a micro-batch on one device (at least 1); a step accumulates the gradients of
                its micro-batches. auto: a whole step, or the largest equal part of it that fits into the GPU's memory,
                found before the clock starts and written to the run's config.
            compile: Use torch.compile. auto: on a GPU only, since a CPU would need a C++ compiler.
            transformer: Sizes and options of the model, as in TransformerConfig.
        """
        super().__init__()
        if micro_batch_tokens != "auto" and micro_batch_tokens < 1:
            raise ValueError(f"model.micro_batch_tokens must be at least 1 or auto, not {micro_batch_tokens}")
        self.automatic_optimization = False
        self.model = Transformer(TransformerConfig(**transformer))
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.micro_batch_tokens = micro_batch_tokens
        self.compile_choice = compile
        self.clock = TrainingClock()  # the wallclock callback puts the run's own here
        self.display = ProgressDisplay()  # the progress callback puts the run's own here
        self.lr_multiplier = 1.0  # of the step in progress or just done
        self.gradient_norms = GradientNorms(torch.zeros(()), torch.zeros(0))
        self.clipped: list[str] = []  # the parameters of these norms
        # (step, loss and gradient norms) of the steps that the device has completed.
        self.completed_metrics: list[tuple[int, Tensor]] = []
        self.updating = False  # between the start of an update and the end of everything that belongs to its step
        self.attention: AttentionBackend = SdpaBackend()
        self.fused = Fused()
        self.is_compiled = False
        self.nll: NllFn = self.model.nll
        self.metrics = torch.nn.ModuleList()
        self.scorers: list[WindowScorer] = []
        self.adapter: Adapter | None = None
        self.validated_at = 0.0  # reading of the training clock
        self.flops_done = 0.0  # of this process in training; those of a step grow when the loop starts
        self.scores: list[Score] = []
        self.documents: DocumentScores | None = None  # of the last evaluation, where they are wanted

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return int(self.trainer.global_step)

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        if getattr(self.trainer, "datamodule", None) is None:
            raise UserError("the model trains and scores with datamodule=TokenData(...) alone, not with other loaders")
        return int(data_of(self.trainer).sequence_length)

    @override
    def setup(self, stage: str) -> None:
        """Choose the kernels and the compiled functions for this device."""
        device = self.trainer.strategy.root_device
        config = self.model.config
        dtype = DTYPES.get(str(self.trainer.precision), torch.float32)
        fused = choose_fused(config, device, dtype)
        attention = choose_attention(config, self.sequence_length, device, dtype, fused.heads)
        # Each process measures for itself and could choose another kernel.
        self.attention, self.fused = self.trainer.strategy.broadcast((attention, fused))
        if window := data_of(self.trainer).evaluation.attention_window:
            if stage == "fit" and window < self.sequence_length:
                raise UserError(
                    f"eval.attention_window {window} is shorter than the training sequences of {self.sequence_length}; "
                    "lengthen it or leave it out of fit"
                )
            self.attention = with_window(self.attention, window)
        self.is_compiled = self.compiles_on(device)
        if self.is_compiled:
            configure_compiler()
        self.nll = self.nll_of(self.model)

    def compiles_on(self, device: torch.device) -> bool:
        """Whether the loss is compiled on a device."""
        return self.compile_choice == "on" or (self.compile_choice == "auto" and device.type == "cuda")

    def nll_of(self, model: Transformer) -> NllFn:
        """The loss function of a model with this run's kernels, compiled if this run compiles."""
        model.set_kernels(self.attention, self.fused)
        return torch.compile(model.nll, fullgraph=True, dynamic=False) if self.is_compiled else model.nll

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return MuonAdamW(parameter_groups(self.model, self.optimizer_config), self.optimizer_config)

    @override
    def on_train_start(self) -> None:
        """Hold the host back to the device, and exclude the objects that exist by now from garbage collection."""
        gc.collect()
        gc.freeze()
        self.fence = StepFence(self.device)
        optimizer = self.optimizers()
        if isinstance(optimizer, list) or self.lr_schedulers() is not None:
            raise UserError(
                "configure_optimizers must return one optimizer and no scheduler: learning rates follow "
                "trainer.lightning_module.lr_multiplier, and one optimizer may have several parameter groups"
            )
        if not isinstance(optimizer.optimizer, MuonAdamW):
            self._prepare_optimizer(optimizer.optimizer)

    def _prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Check an optimizer of a user's own `configure_optimizers`, and give it the rates of this run.

        Raises:
            UserError: If its step needs more than gradients, or clipping would see scaled ones.
        """
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError(
                f"{name} computes the loss several times a step, which this trainer does once; use another one"
            )
        if self.trainer.precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                f"a fused {name} with 16-mixed gets scaled gradients, which cannot be clipped; give fused=False"
            )
        logger.info(f"{name} updates the weights; of model.optimizer only grad_clip_norm has an effect")
        # A resumed one has the rates of the checkpoint.
        fresh: Any = self.configure_optimizers()
        fresh = fresh["optimizer"] if isinstance(fresh, dict) else fresh[0] if isinstance(fresh, Sequence) else fresh
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({key: new[key] for key in ("lr", "weight_decay") if key in new}, initial_lr=new["lr"])

    def micro_batches(self, sequences: int) -> int:
        """Number of micro-batches of a step with so many sequences on this device."""
        if self.micro_batch_tokens == "auto":
            return 1
        return micro_batch_count(sequences, self.sequence_length, self.micro_batch_tokens)

    @override
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Train on the tokens of one step, (sequences, sequence_length + 1)."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.set_rates(optimizer.optimizer)
        optimizer.zero_grad()
        self.model.is_looped = self.progress >= self.model.config.loop.start_frac

        def backward(loss: Tensor, last: bool) -> None:
            if last:
                self.manual_backward(loss)
            else:
                with self._no_sync():
                    self.manual_backward(loss)

        slices = self.micro_batches(len(batch))
        loss = train_step(self.nll, batch, slices, backward, optimizer.step, mean_over_ranks)
        per_token = 3 * forward_flops(self.model.config, self.sequence_length, self.model.is_looped)
        self.flops_done += per_token * batch[:, 1:].numel()
        values = torch.cat([torch.stack([loss, self.gradient_norms.total]), self.gradient_norms.each])
        self.completed_metrics = self.fence.record(self.steps_done, values)
        # Tensors on the device only: to log a Python number, Lightning copies it there and waits for all queued work.
        self.log_dict({"train/loss": loss, "train/gradient_norm": self.gradient_norms.total})

    @property
    def progress(self) -> float:
        """Share of the training that is done: of its time or of its steps, whichever is larger."""
        shares = [0.0]
        if self.clock.budget:
            shares.append(self.clock.reading / self.clock.budget)
        if self.trainer.max_steps > 0:
            shares.append(self.steps_done / self.trainer.max_steps)
        return max(shares)

    @property
    def is_validation_due(self) -> bool:
        """Whether enough seconds of training have passed since the last validation; the same on all processes."""
        every: float | None = data_of(self.trainer).evaluation.every_seconds
        return every is not None and self.clock.reading - self.validated_at >= every

    def _no_sync(self) -> Any:
        strategy = self.trainer.strategy
        assert hasattr(strategy, "block_backward_sync") or self.trainer.world_size == 1
        return strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else torch.enable_grad()

    def set_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rates of the next step, and Muon's momentum."""
        limit = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        step = self.steps_done
        self.lr_multiplier = lr_multiplier(self.schedule, step, limit, self.clock.reading, self.clock.budget)
        if isinstance(optimizer, MuonAdamW):
            momentum = muon_momentum(self.schedule, step, self.optimizer_config.momentum)
            optimizer.set_rates(self.lr_multiplier, momentum)
        else:  # of a user's own `configure_optimizers`
            for group in optimizer.param_groups:
                group["lr"] = self.lr_multiplier * group["initial_lr"]

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Model FLOPs utilization (0 to 1), where the peak of the device is known.

        Args:
            flops: Increase of `flops_done`.
            seconds: Time that it took.
        """
        peak = peak_flops(self.device)
        return None if peak is None else flops / max(seconds, 1e-9) / peak

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: gradients are unscaled (fp16) and summed over the processes."""
        self.updating = True
        self.gradient_norms = clip_gradients(self.model.parameters(), self.optimizer_config.grad_clip_norm)
        if len(self.clipped) != len(self.gradient_norms.each):  # at the first step
            self.clipped = [name for name, parameter in self.model.named_parameters() if parameter.grad is not None]
        is_finite = self.gradient_norms.total.isfinite()
        if isinstance(optimizer, MuonAdamW):
            optimizer.finite = is_finite
        elif self.trainer.precision != "16-mixed" and not is_finite:  # with fp16, the scaler leaves the step out
            optimizer.zero_grad()  # it cannot mask its update, so the host waits for each step

    def score_model(self, name: str, model: Transformer, evaluation: EvaluationConfig, tokens: Tensor) -> Score:
        """Score a model with this run's kernels, on all processes.

        Args:
            name: What is scored, for the progress display.
            model: This one, or another of its size.
            evaluation: How.
            tokens: (n,) of the text.

        Raises:
            UserError: If the score is not a finite number.
        """
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        data = data_of(self.trainer)
        assert data.table is not None

        def show(done: int, total: int) -> None:
            self.display.update_task(f"scoring {name}", done, total)

        with self.trainer.precision_plugin.forward_context(), torch.no_grad():
            nll = self.nll_of(model)
            tokens = tokens.to(self.device)
            result = score(nll, tokens, data.table, evaluation, rank, world_size, show, data.excluded)
        if not math.isfinite(result.bpb):
            raise UserError(f"{name}: the score is {result.bpb}, not a number; lower the learning rate")
        return result

    @override
    def on_validation_epoch_start(self) -> None:
        """Reset the sums; the tokens are on the device already."""
        self.validation_started = time.monotonic()
        self.validated_at = self.clock.reading
        self.scorers = data_of(self.trainer).scorers(self.device)
        self.metrics = torch.nn.ModuleList(BitsPerByte().to(self.device) for _ in self.scorers)
        self.adapter = self._adapter() if self.trainer.state.fn == "validate" else None
        if data_of(self.trainer).scores_documents:
            self.documents = DocumentScores(document_of_targets(self.scorers[-1].tokens))

    def _adapter(self) -> Adapter | None:
        evaluation = data_of(self.trainer).evaluation
        if evaluation.adapt_rate is None:
            return None
        if self.trainer.world_size > 1:
            raise UserError("eval.adapt_rate: the processes would train different models; use one device")
        if str(self.trainer.precision) == "16-mixed":
            raise UserError("eval.adapt_rate: its gradients underflow in float16; give --precision 32-true")
        targets = (evaluation.stride or evaluation.window) * evaluation.batch_windows  # of every batch but the first
        length = min(evaluation.attention_window or evaluation.window, targets)
        rate, ema_decay = evaluation.adapt_rate, evaluation.adapt_ema_decay
        return Adapter(self.model.parameters(), self.nll, rate, length, targets // length, ema_decay)

    @override
    def validation_step(self, batch: WindowBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score a batch of windows."""
        metric = self.metrics[dataloader_idx]
        assert isinstance(metric, BitsPerByte)
        is_last = dataloader_idx == len(self.scorers) - 1
        self.scorers[dataloader_idx].add(metric, self.nll, batch, self.documents if is_last else None)
        has_more = batch_idx + 1 < self.trainer.num_val_batches[dataloader_idx]
        if self.adapter is not None and is_last and has_more:
            self.adapter.learn(self.scorers[dataloader_idx].scored(batch))

    @override
    def on_validation_epoch_end(self) -> None:
        """Read the sums; the last score, sliding if there is one, is the one that counts."""
        self.scores = [metric.score() for metric in self.metrics if isinstance(metric, BitsPerByte)]
        if self.documents is not None:
            self.scores[-1] = total(*self.documents.compute())
        self.validation_seconds = time.monotonic() - self.validation_started
        if not self.trainer.sanity_checking:
            last = self.scores[-1]
            self.log_dict({"val/bpb": last.bpb, "val/loss": last.loss}, sync_dist=False)
        if self.adapter is not None and not self.adapter.steps:
            evaluation = data_of(self.trainer).evaluation
            option = "batch_windows" if evaluation.batch_windows > 1 else "window, and eval.stride with it"
            logger.warning(
                "eval.adapt_rate had no effect: it trains between batches of windows, and this text has too few; lower "
                f"eval.{option}"
            )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `export` needs to use the file alone: plain values only, so that it loads safely."""
        metadata = checkpoint.setdefault(METADATA_KEY, {})
        metadata["model"] = self.model.config.to_dict()
        metadata["validated_at"] = self.validated_at

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, before Lightning lists every tensor that differs, or of other data."""
        if self._trainer is None:  # in `load_from_checkpoint`, which cannot know the model's sizes
            raise UserError("use trainer.load_artifact(path) of an artifact; trainer export makes one of a checkpoint")
        self.check_resumable(checkpoint[METADATA_KEY], data_of(self.trainer))
        self.validated_at = checkpoint[METADATA_KEY].get("validated_at", 0.0)
        # Lightning restores the weights before it converts the model, which would round those of 64-true.
        self.trainer.precision_plugin.convert_module(self)

    def difference_from(self, stored: dict[str, Any], where: str) -> str:
        """What a stored model config differs in from this model's, in words; empty if in nothing."""
        before = dict(flatten(stored))
        return "; ".join(
            f"{key}: {before[key]} {where}, {value} here"
            for key, value in flatten(self.model.config.to_dict())
            if before[key] != value
        )

    def check_resumable(self, metadata: dict[str, Any], data: Any) -> None:
        """Check that this run can resume a checkpoint.

        Args:
            metadata: This project's part of the checkpoint.
            data: The run's data module, set up or not.

        Raises:
            UserError: If model, batch, order or tokenizer are others.
        """
        stored = TransformerConfig.from_dict(metadata["model"]).to_dict()
        if different := self.difference_from(stored, "in the checkpoint"):
            raise UserError(
                f"the checkpoint holds another model ({different}); give the options of its run, or another --ckpt"
            )
        for name in POSITION_SETTINGS:
            if (before := metadata.get(name, getattr(data, name))) != getattr(data, name):
                raise UserError(
                    f"the checkpoint's run had data.{name} {before}, this one has {getattr(data, name)}, and would "
                    "resume at another position of the text; give the same value"
                )
        if data.shards and (change := difference(metadata["shards"], data.shards)):
            raise UserError(
                f"the checkpoint's run read other text ({change}) and would resume at another position of it; give its "
                "run's --data.source"
            )
        if metadata["tokenizer_sha256"] != getattr(data, "tokenizer_sha256", metadata["tokenizer_sha256"]):
            raise UserError(
                "the checkpoint was trained with another tokenizer; give its run's --data.source, or another --ckpt"
            )
