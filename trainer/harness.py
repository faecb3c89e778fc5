"""A stored model for lm-evaluation-harness, which asks for log-likelihoods and for text (the extra `lm-eval`)."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("trainer.harness needs lm-eval; pip install 'golf-trainer[lm-eval]'") from error

from trainer.data.tokenizer import BOS, ByteTable
from trainer.device import default_device
from trainer.errors import UserError
from trainer.evaluation.sliding import score
from trainer.evaluation.windows import EvaluationConfig
from trainer.generation import SamplingConfig, continue_text
from trainer.loading import load_artifact

BATCH_TOKENS = 16_384


class HarnessModel(LM):
    """Answers the harness's requests: `lm_eval.simple_evaluate(HarnessModel("artifact.zst"), tasks=[...])`."""

    def __init__(self, artifact: str | Path, device: str | torch.device | None = None, context: int = 2048) -> None:
        """Open an artifact or a checkpoint.

        Args:
            artifact: The file.
            device: Where the model runs; None: a GPU if there is one.
            context: Most tokens that the model reads at once: the window that its run was scored with.

        Raises:
            UserError: If the file cannot be used.
        """
        super().__init__()
        if context < 2:
            raise UserError(f"context must be at least 2, not {context}")
        self.model, self.processor = load_artifact(artifact, device=device or default_device())
        self.where = self.model.token_embedding.weight.device
        self.table = ByteTable.from_tokenizer(self.processor)
        self.context = context

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation after its context, and whether it is the most probable one."""
        pairs = [self._tokens(*request.args) for request in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))  # similar lengths together
        while order:
            rows = max(1, BATCH_TOKENS // len(pairs[order[-1]][0]))  # padded to the longest, the last one
            chosen, order = order[-rows:], order[:-rows]
            for index, answer in zip(chosen, self._score([pairs[index] for index in chosen]), strict=True):
                answers[index] = answer
        return answers

    def _tokens(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Tokens of a context and its continuation, as much as the model reads, and how many are the continuation's."""
        stripped = context.rstrip()
        if stripped:  # a space at its end belongs to the first word of the continuation
            context, continuation = stripped, context[len(stripped) :] + continuation
        whole, before = self.processor.encode(context + continuation), self.processor.encode(context)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(whole, before, strict=False))
        count = len(whole) - len(list(same))  # from the first token that the continuation changes
        tokens = [BOS, *whole][-self.context - 1 :]
        return tokens, min(count, len(tokens) - 1)

    @torch.no_grad()
    def _score(self, batch: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """The answers for tokens that are padded at their end, which causal attention never looks at."""
        length = max(len(tokens) for tokens, _ in batch)
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in batch], device=self.where)
        log_probs = self.model(ids[:, :-1]).log_softmax(-1)
        values, best = log_probs.gather(2, ids[:, 1:, None])[..., 0], log_probs.argmax(-1) == ids[:, 1:]
        ends = [len(tokens) - 1 for tokens, _ in batch]
        parts = [slice(end - count, end) for end, (_, count) in zip(ends, batch, strict=True)]
        return [
            (float(row[part].double().sum()), bool(hits[part].all()))
            for row, hits, part in zip(values, best, parts, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood in nats of each text, in sliding windows with half a window of context."""
        evaluation = EvaluationConfig(self.context, max(1, self.context // 2), max(1, BATCH_TOKENS // self.context))
        answers = []
        for request in requests:
            ids = [BOS, *self.processor.encode(request.args[0])]
            if len(ids) == 1:
                answers.append(0.0)
                continue
            with torch.no_grad():
                result = score(
                    self.model.nll, torch.tensor(ids, dtype=torch.int32, device=self.where), self.table, evaluation
                )
            answers.append(-result.loss * result.tokens)
        return answers

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The text after each context, up to the first of its stop texts."""
        answers = []
        for request in requests:
            context, options = request.args
            answers.append(self._generate(context, options))
        return answers

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        sampling = SamplingConfig(
            tokens=int(options.get("max_gen_toks", 256)),
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample", True) else 0.0,
            context=self.context,
        )
        text = ""

        def is_open(piece: str) -> bool:
            nonlocal text
            text += piece
            return not any(stop in text for stop in stops)

        for _ in takewhile(is_open, continue_text(self.model, self.processor, context, sampling)):
            pass
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
