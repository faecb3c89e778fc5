"""Text generation, token by token, with a key-value cache."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import sentencepiece
import torch
from torch import Tensor
from typing_extensions import override

from trainer.data.case_markup import MARK, SENTENCE_ENDS, SPACE
from trainer.data.tokenizer import BOS
from trainer.errors import UserError
from trainer.kernels.attention_backends import AttentionBackend, SdpaBackend
from trainer.kernels.windowed_attention import with_window
from trainer.model.transformer import Block, Transformer

EMBEDDING_CONTEXT = 2  # tokens before its own that a position's embedding depends on
DECODING_CONTEXT = 16  # tokens that the text of a new one depends on, with room to spare
# The end of a text that the next token may change: a character that is spelled in bytes, or a letter that becomes a
# capital if its word goes on.
UNFINISHED = re.compile(rf"(\ufffd|[{SENTENCE_ENDS}] [a-z])\Z")
MAX_CONTEXT = 2**20  # tokens; RoPE tables for all of them are made at once


class CachedAttention(AttentionBackend):
    """The attention of one block, with a key-value cache."""

    copies_kv = False

    def __init__(self, context: int, passes: int = 1, window: int | None = None) -> None:
        """Start with an empty cache.

        Args:
            context: Number of positions that the cache has room for.
            passes: How often the block runs for each token; each pass has keys and values of its own.
            window: Attention window in tokens; None: full attention.
        """
        self.backend = with_window(SdpaBackend(), window) if window else SdpaBackend()
        self.window = window or context
        self.context = context
        self.lengths = [0] * passes
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._last_keys: list[Tensor | None] = [None] * passes  # before their offset
        self._next_pass = 0

    @override
    def key_before(self, k: Tensor) -> Tensor:
        before = self._last_keys[self._next_pass]
        self._last_keys[self._next_pass] = k[:, -1:].clone()  # a view would keep the whole prompt's
        return super().key_before(k) if before is None else before

    @override
    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        index, self._next_pass = self._next_pass, (self._next_pass + 1) % len(self.lengths)
        if index == len(self._caches):
            shape = (k.size(0), self.context, *k.shape[2:])
            self._caches.append((k.new_empty(shape), v.new_empty(shape)))
        start, end = self.lengths[index], self.lengths[index] + k.size(1)
        for cache, new in zip(self._caches[index], (k, v), strict=True):
            cache[:, start:end] = new
        self.lengths[index] = end
        keys, values = self._caches[index]
        if q.size(1) == 1:  # attends to the end of the window: no mask, and no whole block for one position
            start = max(0, end - self.window)
            return SdpaBackend()(q, keys[:, start:end], values[:, start:end])
        return self.backend(q, keys[:, :end], values[:, :end])

    @override
    def describe(self) -> str:
        return "cached"


class Decoder:
    """Feeds tokens to a model step by step; the model's attention belongs to it."""

    def __init__(self, model: Transformer, context: int = 2048) -> None:
        """Start an empty text.

        Args:
            model: A model in evaluation mode.
            context: Most tokens of context.
        """
        self.model = model
        self.context = context
        self.device = model.token_embedding.weight.device
        self._tables = model.rotary(context, self.device)
        self.restart()

    def restart(self) -> None:
        """Forget the text."""
        self.ids = torch.zeros((1, 0), dtype=torch.int32, device=self.device)
        config = self.model.config
        order = config.block_order(self.model.is_looped)
        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            block.attention.backend = CachedAttention(
                self.context, order.count(index), config.attention.window_of(index)
            )
            block.attention.is_fused = False  # the fused operator does not know the key before the first

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        """Append tokens; a text that outgrows the context continues from its last half.

        Returns:
            (V,) logits of the token that follows.
        """
        if self.ids.size(1) + len(ids) > self.context:
            ids = [*self.ids[0].tolist(), *ids][-(self.context // 2) :]
            self.restart()
        start = self.ids.size(1)
        self.ids = torch.cat((self.ids, torch.tensor([ids], dtype=torch.int32, device=self.device)), dim=1)
        context = max(0, start - EMBEDDING_CONTEXT)
        x0 = self.model.embed(self.ids[:, context:])[:, start - context :]
        values = self.model.value_embeddings(self.ids[:, start:])
        states = self.model.states(x0, self._tables[:, start : self.ids.size(1)], len(ids) - 1, values)
        return self.model.logits(states)[0, -1]


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> int:
    """Draw a token.

    Args:
        logits: (V,).
        temperature: Divides the logits (at least 0); 0 takes the most probable token.
        top_k: Draw from this many of the most probable tokens; None: from all.
        top_p: Draw from the most probable tokens whose probabilities add up to this (Holtzman et al. 2019); 1: all.
        generator: A generator on the CPU, so that the same seed draws the same tokens on every device.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.cpu().double() / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def generate_tokens(decoder: Decoder, prompt: list[int], count: int, choose: Callable[[Tensor], int]) -> Iterator[int]:
    """Yield up to `count` tokens that follow a prompt.

    Args:
        decoder: Starts a new text.
        prompt: Tokens of the prompt, a document's BOS first.
        count: Most tokens to yield.
        choose: Picks a token by its logits.
    """
    decoder.restart()
    logits = decoder.feed(prompt)
    for index in range(count):
        token = choose(logits)
        if token == BOS:  # of a next document
            return
        yield token
        if index + 1 < count:
            logits = decoder.feed([token])


def prompt_tokens(tokenizer: sentencepiece.SentencePieceProcessor, prompt: str) -> list[int]:
    """Tokens of a prompt; a letter at its end stays small if its word goes on."""
    ids: list[int] = tokenizer.encode(prompt)
    text = tokenizer.decode(ids)
    if UNFINISHED.search(text) and tokenizer.id_to_piece(ids[-1]) == SPACE + text[-1]:
        marked = [*ids[:-1], tokenizer.piece_to_id(MARK), ids[-1]]
        if tokenizer.decode(marked) == text:  # it has case markup with this rule
            return marked
    return ids


def stream_text(
    tokenizer: sentencepiece.SentencePieceProcessor, prompt: list[int], tokens: Iterator[int]
) -> Iterator[str]:
    """The text that tokens add to a prompt; a character that the next token may change comes after it."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not UNFINISHED.search(text):
            yield text[len(shown) :]
            ids = ids[-DECODING_CONTEXT:]  # decoding all of them for every token would take quadratic time
            shown = tokenizer.decode(ids)
    if rest := tokenizer.decode(ids)[len(shown) :]:
        yield rest


@dataclass(frozen=True)
class SamplingConfig:
    """How text is generated.

    Attributes:
        tokens: Most tokens to generate (at least 0); a text may end before.
        temperature: Divides the logits (0, or at least 1e-6); 0 always takes the most probable token.
        top_k: Draw from this many of the most probable tokens (at least 1); None: from all.
        top_p: Draw from the most probable tokens whose probabilities add up to this (above 0, at most 1).
        seed: Seed of the draws (0 to 2^63 - 1).
        context: Most tokens of context (2 to 1,048,576).

    Raises:
        UserError: If a number is out of range.
    """

    tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0
    context: int = 2048

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf")):
            raise UserError(f"temperature must be 0 or at least 1e-6, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.tokens < 0:
            raise UserError(f"tokens must be at least 0, not {self.tokens}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        if not 2 <= self.context <= MAX_CONTEXT:
            raise UserError(f"context must be between 2 and {MAX_CONTEXT:,}, not {self.context}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be between 0 and 2^63 - 1, not {self.seed}")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is no text, such as a file name with bytes that are not UTF-8.

    Raises:
        UserError: If it cannot be written as UTF-8.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("prompt: is not UTF-8 text") from error


def continue_text(
    model: Transformer,
    tokenizer: sentencepiece.SentencePieceProcessor,
    prompt: str = "",
    config: SamplingConfig = SamplingConfig(),
) -> Iterator[str]:
    """Yield the text that follows a prompt, as it is generated.

    Args:
        model: A model in evaluation mode; its attention belongs to the generation until the text ends.
        tokenizer: Its tokenizer.
        prompt: Text to continue, as the start of a document.
        config: How tokens are drawn.

    Raises:
        UserError: If the prompt cannot be written as UTF-8.
    """
    check_prompt(prompt)
    return _continued(model, tokenizer, prompt, config)


def _continued(
    model: Transformer, tokenizer: sentencepiece.SentencePieceProcessor, prompt: str, config: SamplingConfig
) -> Iterator[str]:
    """`continue_text`, once its prompt is known to be one; the model gets its own attention back."""
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    kernels = [(block.attention.backend, block.attention.is_fused) for block in blocks]
    ids = [BOS, *prompt_tokens(tokenizer, prompt)]
    generator = torch.Generator().manual_seed(config.seed)
    draw = partial(sample, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, generator=generator)
    try:
        tokens = generate_tokens(Decoder(model, config.context), ids, config.tokens, draw)
        yield from stream_text(tokenizer, ids, tokens)
    finally:
        for block, (backend, is_fused) in zip(blocks, kernels, strict=True):
            block.attention.backend, block.attention.is_fused = backend, is_fused
