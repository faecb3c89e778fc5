"""Tokenizing text into shards against SentencePiece alone, on the same documents with the same threads."""

import argparse
import itertools
import os
import resource
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.subject import report
from trainer.data.documents import TextFiles, find_files
from trainer.data.shard_writer import Document, tokenize
from trainer.data.tokenizer import load_tokenizer


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="text files, as for data.source.train_files")
    parser.add_argument("--tokenizer", required=True, help="SentencePiece model")
    parser.add_argument("--megabytes", type=float, default=100, help="text to tokenize")
    options = parser.parse_args()
    paths = find_files(options.files)

    def read() -> list[str]:
        sizes = itertools.accumulate((len(text.encode()) for text in TextFiles(paths)), initial=0)
        count = sum(1 for size in itertools.takewhile(lambda size: size < 1e6 * options.megabytes, sizes))
        return list(itertools.islice(TextFiles(paths), count))

    texts = read()
    size = sum(len(text.encode()) for text in texts) / 1e6
    documents = [Document("val" if index == 0 else "train", text, "") for index, text in enumerate(texts)]
    processor, threads = load_tokenizer(options.tokenizer), os.cpu_count() or 1

    def alone() -> None:
        for start in range(0, len(texts), 512):
            processor.encode_as_numpy(texts[start : start + 512], num_threads=threads)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenize(documents, Path(options.tokenizer), Path(folder), {})

    seconds: dict[str, float] = {"alone": 9e9, "whole": 9e9}
    for _ in range(3):  # alternately: a machine's speed drifts
        for name, run in (("alone", alone), ("whole", whole)):
            started = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    row = {
        "megabytes": round(size, 1),
        "tokenize_mb_per_second": round(size / seconds["whole"], 2),
        "sentencepiece_alone_mb_per_second": round(size / seconds["alone"], 2),
        "ratio": round(seconds["alone"] / seconds["whole"], 3),
        "threads": threads,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    report("tokenize", row, torch.device("cpu"))


if __name__ == "__main__":
    main()
