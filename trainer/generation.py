"""Text from a model, one token after the other, with the keys and values of all tokens before kept."""

from collections.abc import Callable, Iterator

import sentencepiece
import torch
from torch import Tensor

from trainer.data.tokenizer import BOS
from trainer.model.attention_kernel import SdpaKernel
from trainer.model.banded_attention import with_window
from trainer.model.transformer import Block, Transformer

LOOK_BACK = 2  # tokens before its own that a position's embedding depends on
DECODED = 16  # tokens that a new one's text depends on, with room


class CachedAttention:
    """The attention of one block, which remembers keys and values."""

    copies_kv = False

    def __init__(self, context: int, passes: int = 1, window: int | None = None) -> None:
        """Begin with nothing.

        Args:
            context: Positions there is room for.
            passes: How often the block runs for each token; each time has keys and values of its own.
            window: Tokens that a position looks back at; None: all.
        """
        self.kernel = with_window(SdpaKernel(), window) if window else SdpaKernel()
        self.window = window or context
        self.context = context
        self.lengths = [0] * passes
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._turn = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from new positions to all there were; see AttentionKernel."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self.lengths)
        if turn == len(self._kept):
            shape = (k.size(0), self.context, *k.shape[2:])
            self._kept.append((k.new_empty(shape), v.new_empty(shape)))
        begin, end = self.lengths[turn], self.lengths[turn] + k.size(1)
        for kept, new in zip(self._kept[turn], (k, v), strict=True):
            kept[:, begin:end] = new
        self.lengths[turn] = end
        keys, values = self._kept[turn]
        if q.size(1) == 1:  # sees the end of the window: no mask, and no whole block for one position
            seen = slice(max(0, end - self.window), end)
            return SdpaKernel()(q, keys[:, seen], values[:, seen])
        return self.kernel(q, keys[:, :end], values[:, :end])

    def describe(self) -> str:
        """See AttentionKernel."""
        return "cached"


class Decoder:
    """A model that is fed tokens bit by bit; it keeps the model's attention for itself."""

    def __init__(self, model: Transformer, context: int = 2048) -> None:
        """Begin an empty text.

        Args:
            model: In evaluation mode.
            context: Longest stretch of text that is looked at.
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
        order = config.order()
        for index, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            block.attention.kernel = CachedAttention(
                self.context, order.count(index), config.attention.window_of(index)
            )

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        """Append tokens; a text that outgrows the context goes on from its last half.

        Returns:
            (V,) logits of the token that follows.
        """
        if self.ids.size(1) + len(ids) > self.context:
            ids = [*self.ids[0].tolist(), *ids][-(self.context // 2) :]
            self.restart()
        begin = self.ids.size(1)
        self.ids = torch.cat((self.ids, torch.tensor([ids], dtype=torch.int32, device=self.device)), dim=1)
        seen = max(0, begin - LOOK_BACK)
        x0 = self.model.embed(self.ids[:, seen:])[:, begin - seen :]
        values = self.model.token_values(self.ids[:, begin:])
        states = self.model.states(x0, self._tables[:, begin : self.ids.size(1)], len(ids) - 1, values)
        return self.model.logits(states)[0, -1]


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw a token.

    Args:
        logits: (V,).
        temperature: 0 takes the most probable.
        top_k: Only so many of the most probable; 0: all.
        top_p: Only the most probable whose probabilities add up to this (Holtzman et al. 2019); 1: all.
        generator: On the CPU, so that the same seed draws the same on every device.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.cpu().double() / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        probabilities[top_k:] = 0
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def generate(
    decoder: Decoder, prompt: list[int], count: int, choose: Callable[[Tensor], int], end: int | None = BOS
) -> Iterator[int]:
    """Yield up to `count` tokens that follow a prompt.

    Args:
        decoder: Forgets what it was fed before.
        prompt: Tokens; a document's BOS first.
        count: Most tokens.
        choose: Picks a token by its logits.
        end: Token that ends the text and is not yielded; the BOS of a next document.
    """
    decoder.restart()
    logits = decoder.feed(prompt)
    for made in range(count):
        token = choose(logits)
        if token == end:
            return
        yield token
        if made + 1 < count:
            logits = decoder.feed([token])


def stream_text(
    tokenizer: sentencepiece.SentencePieceProcessor, prompt: list[int], tokens: Iterator[int]
) -> Iterator[str]:
    """What tokens add to a prompt's text; a character that is spelled in bytes comes when it is whole."""
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            ids = ids[-DECODED:]  # not all of them again for every token
            shown = tokenizer.decode(ids)
    if rest := tokenizer.decode(ids)[len(shown) :]:
        yield rest
