"""Batches of the training stream, read ahead by a thread so that no step waits for the disk."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from trainer.data.stream import TrainStream


class Prefetcher:
    """The batches from the next step on; the position is a function of the step, so resuming loses no batch."""

    def __init__(
        self, dataset: TrainStream, first_step: Callable[[], int], pin_memory: bool = False, depth: int = 4
    ) -> None:
        """Read ahead.

        Args:
            dataset: Batches by step number.
            first_step: Called when iteration begins, for the number of the first batch.
            pin_memory: Pin batches, so that a GPU copies them without stopping the host.
            depth: Number of batches read ahead.
        """
        self.dataset = dataset
        self.first_step = first_step
        self.pin_memory = pin_memory
        self.depth = depth

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batch after batch; an error of the thread is raised here, at the step it belongs to."""
        ready: deque[Future[Tensor]] = deque()
        reader = ThreadPoolExecutor(1, "prefetch")
        try:
            for step in range(self.first_step(), len(self.dataset)):
                ready.append(reader.submit(self._read, step))
                if len(ready) > self.depth:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, step: int) -> Tensor:
        batch = self.dataset[step]
        return batch.pin_memory() if self.pin_memory else batch
