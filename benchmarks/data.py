"""The training stream of a recipe: tokens per second from the shards to the device, against plain memory-map reads.

And how long a step of 2 million tokens per second waits for its batch when a thread reads ahead.
"""

import argparse
import time

import numpy as np
import torch

from benchmarks.subject import load, report
from trainer.data.prefetch import Prefetcher
from trainer.data.shards import TokenFiles
from trainer.data.stream import TrainStream
from trainer.device import synchronize

CONSUMED_PER_SECOND = 2_000_000


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed")
    options, args = parser.parse_known_args()
    cli = load(options.config, args)
    data, device = cli.datamodule, cli.trainer.strategy.root_device
    data.prepare_data()
    text = data.source.prepared()
    stream = TrainStream(
        TokenFiles(text.train), data.batch_tokens, data.sequence_length, options.steps, order=data.order, seed=data.seed
    )
    on_gpu = device.type == "cuda"

    def streamed() -> None:
        for step in range(options.steps):
            batch = stream[step]
            (batch.pin_memory() if on_gpu else batch).to(device, non_blocking=True)

    plain = np.fromfile(text.train[0], dtype=np.uint16, offset=1024)

    def copied() -> None:
        for step in range(options.steps):
            start = step * data.batch_tokens % (len(plain) - data.batch_tokens)
            torch.from_numpy(plain[start : start + data.batch_tokens + 1].astype(np.int32)).to(device)

    def rate(read: object) -> float:
        assert callable(read)
        read()
        synchronize(device)
        started = time.perf_counter()
        read()
        synchronize(device)
        return options.steps * data.batch_tokens / (time.perf_counter() - started)

    def waiting() -> float:
        """Share of a consumer's time that it waits."""
        waited, started = 0.0, time.perf_counter()
        batches = iter(Prefetcher(stream, lambda: 0, on_gpu))
        for _ in range(min(options.steps, 100)):
            requested = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - requested
            time.sleep(data.batch_tokens / CONSUMED_PER_SECOND)
        return waited / (time.perf_counter() - started)

    speed, bound = rate(streamed), rate(copied)
    row = {
        "stream_tokens_per_second": round(speed),
        "array_slices_tokens_per_second": round(bound),
        "ratio": round(speed / bound, 2),
        "waiting_percent_of_2m_tokens_per_second": round(100 * waiting(), 3),
        "order": data.order,
        "batch_tokens": data.batch_tokens,
    }
    report(f"data {options.config} {' '.join(args)}".strip(), row, device)


if __name__ == "__main__":
    main()
