"""The data module: prepares a source once, serves the training stream and the evaluation windows."""

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from trainer.data import published  # noqa: F401 - a choice for --data.source
from trainer.data.calibration import calibration_sequences
from trainer.data.canonical import check_canonical, excluded_pairs
from trainer.data.identity import Identity, difference, identify
from trainer.data.manifest import check_tokenizer, check_vocabulary
from trainer.data.prefetch import Prefetcher
from trainer.data.scored_text import ScoredText
from trainer.data.shards import TokenArray, TokenFiles, check_vocab_size, open_shard
from trainer.data.sources import PreparedText, Source
from trainer.data.stream import Order, TrainStream
from trainer.data.tokenizer import ByteTable, check_case_markup, load_tokenizer
from trainer.distributed import all_ranks_agree
from trainer.errors import UserError
from trainer.evaluation.sliding import WindowScorer
from trainer.evaluation.windows import EvaluationConfig, WindowBatch, batch_plan, plan_windows
from trainer.files import sha256_of

UNLIMITED_STEPS = 2**40  # of a run without a step limit
# What the position in the text depends on, beside the number of steps: a resumed run must have the same.
POSITION_SETTINGS = ("batch_tokens", "sequence_length", "order", "seed", "held_out_tokens")


class WindowBatches(Dataset[WindowBatch]):
    """One process's share of an evaluation plan."""

    def __init__(self, batches: list[WindowBatch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> WindowBatch:
        """Windows of one batch."""
        return self.batches[index]


class TokenData(pl.LightningDataModule):
    """Training steps and validation windows from one source."""

    def __init__(
        self,
        source: Source,
        batch_tokens: int = 131_072,
        sequence_length: int = 2048,
        order: Order = "sequential",
        seed: int | None = None,
        held_out_tokens: int | None = None,
        vocab_size: int = 1024,
        case_markup: bool | None = None,
        evaluation: EvaluationConfig = EvaluationConfig(),
    ) -> None:
        """Serve a source.

        Args:
            source: Class that provides the text.
            batch_tokens: Tokens of one optimizer step, over all devices (a multiple of sequence_length times the number
                of devices).
            sequence_length: Tokens of one training sequence (at least 1).
            order: How the text is read. sequential (the reference): one running stream, shard after shard. shuffled:
                all sequences of all shards in random order, each once per epoch.
            seed: Seed of the order shuffled (at least 0). null: seed_everything.
            held_out_tokens: Tokens at the end of the training text that are never trained on (at least 2), for
                export.weights better. null: none.
            vocab_size: Vocabulary size of the model (1 to 65,536); linked to model.vocab_size.
            case_markup: Whether the tokenizer encodes a capital letter before a lowercase one as a mark and its
                lowercase letter, so that `The` and `the` share a token; after the end of a sentence it is the lowercase
                letter that gets the mark. true: shards without it are encoded again, in a copy in `data`, with a
                tokenizer that is trained on their first 50 MB. null: shards and tokenizers that exist are used as they
                are, and those that are trained here have it.
            evaluation: How validation text is scored; linked to eval.
        """
        super().__init__()
        self.source = source
        source.model_vocab_size, source.case_markup = vocab_size, case_markup
        self.batch_tokens = batch_tokens
        self.sequence_length = sequence_length
        self.order = order
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed  # where Lightning keeps it
        if held_out_tokens is not None and held_out_tokens < 2:
            raise ValueError(f"data.held_out_tokens must be at least 2, or null for none, not {held_out_tokens}")
        self.held_out_tokens = held_out_tokens
        self.vocab_size = vocab_size
        self.evaluation = evaluation
        self.table: ByteTable | None = None
        self.excluded: Tensor | None = None  # pairs of tokens that get no probability
        self.expected_tokenizer: str | None = None  # sha256 stored with the weights that are scored
        self.resumes = False  # the shards of the run that is resumed must stay
        self.shards: Identity = {}
        self.tokenizer: Path | None = None  # that a scored text is tokenized with
        self.scored_text: ScoredText | None = None  # scored instead of the validation split
        self.split: Literal["val", "train", "held_out"] = "val"  # that is scored
        self.scores_documents = False
        self.document_sources: list[str] = []  # where the documents of a scored text come from

    @override
    def prepare_data(self) -> None:
        """Make the shards, on one process; a command that only scores makes nothing."""
        if self.trainer is None or self.trainer.state.fn != "validate":
            self.check_before_preparing()
            self.source.prepare(only_if_missing=self.resumes)

    def check_before_preparing(self) -> None:
        """Refuse what a training run cannot use, before its text is made.

        Raises:
            UserError: If the source has another vocabulary than the model, or an option belongs to `validate`.
        """
        self._refuse_adaptation()
        size = self.source.known_vocab_size()
        if size not in (None, self.vocab_size):
            raise UserError(
                f"data.source: its vocabulary size is {size:,}, but the model's {self.vocab_size:,}; set "
                f"--model.vocab_size {size}, or change the source's tokenizer, vocab_size or variant"
            )

    @override
    def setup(self, stage: str) -> None:
        """Open the shards and check them against the model, before anything is trained."""
        if self.table is not None:
            return
        if self.scored_text is not None:
            self._take_scored_text(self.scored_text)
            return
        self.text: PreparedText = self.source.prepared()
        tokenizer = load_tokenizer(self.text.tokenizer)
        vocab_size = tokenizer.get_piece_size()
        check_vocab_size(self.text.tokenizer, vocab_size)
        if vocab_size != self.vocab_size:
            raise UserError(
                f"{self.text.tokenizer}: its vocabulary size is {vocab_size:,}, but the model's {self.vocab_size:,}; "
                f"set --model.vocab_size {vocab_size} or use another tokenizer"
            )
        check_case_markup(self.text.tokenizer, tokenizer, self.source.case_markup)
        self._check_tokenizer(self.text.tokenizer)
        check_tokenizer(self.text.train[0].parent, self.text.tokenizer)
        self.table = ByteTable.from_tokenizer(tokenizer)
        scored = self.text.val if self.split == "val" else self.text.train
        tokens = self._read_scored(scored, self.evaluation.max_tokens if stage == "validate" else None)
        check_vocabulary(scored[0], tokens, vocab_size)
        if stage == "fit":
            self._refuse_adaptation()
            self._check_training_tokens(vocab_size)
            self.shards = identify(self.text) if self.trainer is None or self.trainer.local_rank == 0 else {}
            if self.trainer is not None:
                self._agree_on_shards(self.trainer)
        if self.table.total(tokens) == 0:
            raise UserError(f"{scored[0].parent}: the text to score has no bytes; give another one")
        self._take_tokens(tokens, tokenizer, str(scored[0]))
        if stage == "fit" and self.held_out_tokens is not None:  # export.weights better scores them, too
            self._check_canonical(self.held_out(), tokenizer, str(self.text.train[-1]))
        self._evaluations()  # an unusable split fails now

    def _read_scored(self, paths: Sequence[Path], max_targets: int | None) -> TokenArray:
        """The tokens to score, or as many as these targets need."""
        files = TokenFiles(paths, 0 if self.split == "val" else self.held_out_tokens or 0)
        if self.split == "held_out":
            return files.read_held_out()
        return files.read(0, min(max_targets + 1, len(files)) if max_targets else len(files))

    def _refuse_adaptation(self) -> None:
        if self.evaluation.adapt_rate is not None:
            raise UserError("eval.adapt_rate belongs to trainer validate; leave it out of fit")

    def _take_scored_text(self, text: ScoredText) -> None:
        """Tokenize a text with the tokenizer of the weights; no shards are needed."""
        assert self.tokenizer is not None
        tokenizer = load_tokenizer(self.tokenizer, "name that of the model with --tokenizer")
        self._check_tokenizer(self.tokenizer)
        self.table = ByteTable.from_tokenizer(tokenizer)
        tokens, self.document_sources = text.read(tokenizer, self.table)
        if self.table.total(tokens) == 0:
            raise UserError(f"{', '.join(text.files)}: has no bytes to score; give another text")
        self._take_tokens(tokens, tokenizer, ", ".join(text.files))

    def _take_tokens(self, tokens: TokenArray, tokenizer: SentencePieceProcessor, origin: str) -> None:
        """Take the tokens that are scored.

        Raises:
            UserError: If eval.canonical would give no probability to one of them, or the tokenizer is not BPE.
        """
        self.val_tokens = torch.from_numpy(tokens.astype(np.int32))
        if self.evaluation.canonical:
            self.excluded = excluded_pairs(tokenizer)
        self._check_canonical(self.val_tokens, tokenizer, origin)

    def _check_canonical(self, tokens: Tensor, tokenizer: SentencePieceProcessor, origin: str) -> None:
        """Refuse tokens that eval.canonical would give no probability."""
        if self.excluded is not None:
            check_canonical(tokens, self.excluded, tokenizer, origin, "set --eval.canonical false")

    def _check_tokenizer(self, path: Path) -> None:
        """Refuse another tokenizer than that of the weights, where those are known."""
        self.tokenizer_sha256 = sha256_of(path)
        if self.expected_tokenizer not in (None, self.tokenizer_sha256):
            raise UserError(
                f"{path}: is not the tokenizer this model was trained with (its sha256 begins with "
                f"{self.tokenizer_sha256[:12]}, not {str(self.expected_tokenizer)[:12]}); name shards that the model's "
                "own made with --data.source.folder, or let trainer validate score files with --text"
            )

    def _agree_on_shards(self, trainer: pl.Trainer) -> None:
        """Take the shards of rank 0 as the run's, and refuse a node that has others in a folder of its own.

        Raises:
            UserError: On the first process of such a node.
            SystemExit: On the others.
        """
        local_shards, self.shards = self.shards, trainer.strategy.broadcast(self.shards)
        change = difference(self.shards, local_shards) if local_shards else None
        if not all_ranks_agree(change is None, trainer.strategy.root_device):
            if change is None:
                raise SystemExit(1)
            raise UserError(
                f"{self.text.train[0].parent} on {socket.gethostname()}: is not the text of process 0 ({change}); "
                "share the folder between the nodes, or copy it to all of them"
            )

    def _check_training_tokens(self, vocab_size: int) -> None:
        """Refuse a token that the model has no row for: on a GPU it would be an assertion in the middle of a run."""
        for path in self.text.train:  # read once, 200 MB each
            check_vocabulary(path, open_shard(path), vocab_size)

    def _evaluations(self) -> list[tuple[EvaluationConfig, int]]:
        """The evaluations of this stage, each with its number of targets."""
        evaluation, targets = self.evaluation, len(self.val_tokens) - 1
        plain = evaluation.plain
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return [(plain, min(evaluation.fit_tokens or targets, targets))]
        targets = min(evaluation.max_tokens or targets, targets)
        return [(plain, targets)] + ([] if evaluation.is_plain else [(evaluation, targets)])

    @override
    def train_dataloader(self) -> Prefetcher:
        """Steps of this process."""
        trainer = self.trainer
        assert trainer is not None
        stream = TrainStream(
            TokenFiles(self.text.train, self.held_out_tokens or 0),
            self.batch_tokens,
            self.sequence_length,
            trainer.max_steps if trainer.max_steps > 0 else UNLIMITED_STEPS,
            trainer.global_rank,
            trainer.world_size,
            self.order,
            self.seed,
        )
        return Prefetcher(stream, lambda: trainer.global_step, trainer.strategy.root_device.type == "cuda")

    def calibration_sequences(self, count: int, device: torch.device) -> Iterator[Tensor]:
        """The first training sequences, (b, sequence_length + 1) on the device."""
        settings = self.batch_tokens, self.sequence_length, self.order, self.seed
        sequences = calibration_sequences(
            self.text, count, *settings, self.vocab_size, self.tokenizer_sha256, self.held_out_tokens
        )
        return (batch.to(device) for batch in sequences)

    def held_out(self) -> Tensor:
        """The training tokens that were never trained on, (n,) int32."""
        tokens = TokenFiles(self.text.train, self.held_out_tokens or 0).read_held_out()
        return torch.from_numpy(tokens.astype(np.int32))

    @override
    def val_dataloader(self) -> list[DataLoader[WindowBatch]]:
        """Windows of this process: plain, and sliding too unless it is a validation during training."""
        trainer = self.trainer
        assert trainer is not None
        loaders = []
        for evaluation, targets in self._evaluations():
            plan = plan_windows(targets, evaluation.window, evaluation.stride)
            if len(plan.starts) < trainer.world_size:
                raise UserError(
                    f"{targets:,} validation targets make {len(plan.starts)} windows of {plan.window:,}, fewer than "
                    f"{trainer.world_size} processes; raise eval.fit_tokens or eval.max_tokens, or use fewer devices"
                )
            batches = batch_plan(plan, evaluation.batch_windows, trainer.global_rank, trainer.world_size)
            loaders.append(DataLoader(WindowBatches(batches), batch_size=None))
        return loaders

    def scorers(self, device: torch.device) -> list[WindowScorer]:
        """One scorer per validation loader, with its tokens on the device."""
        assert self.table is not None
        self.val_tokens = self.val_tokens.to(device)
        return [
            WindowScorer(self.val_tokens[: targets + 1], self.table, min(evaluation.window, targets), self.excluded)
            for evaluation, targets in self._evaluations()
        ]


def data_of(trainer: pl.Trainer) -> TokenData:
    """The run's data module; Lightning types it as any."""
    return trainer.datamodule  # type: ignore[attr-defined]
