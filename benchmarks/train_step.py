"""Milliseconds and tokens/s of the raw training step of a model, on whatever device is there.

`python -m benchmarks.train_step --tokens 131072` prints the reference model's figures; no data is needed.
"""

import argparse
import json
import time

import torch
from torch import Tensor

from trainer.model.attention import choose_kernel
from trainer.model.transformer import Transformer, TransformerConfig
from trainer.optim.muon_adamw import MuonAdamW, OptimizerConfig, parameter_groups
from trainer.step import clip_gradients, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=131072, help="tokens a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    config = TransformerConfig()
    model = Transformer(config).to(device)
    head_dim = config.model_dim // config.attention.num_heads
    kernel = choose_kernel(config.attention, head_dim, 128, device, dtype)
    model.set_attention_kernel(kernel)
    nll = torch.compile(model.nll, fullgraph=True, dynamic=False) if device.type == "cuda" else model.nll
    optimizer = MuonAdamW(parameter_groups(model, OptimizerConfig()), OptimizerConfig())
    tokens = torch.randint(0, config.vocab_size, (options.tokens + 1,), device=device, dtype=torch.int32)

    def backward(loss: Tensor, last: bool) -> None:
        loss.backward()

    def update() -> None:
        clip_gradients(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()

    def steps(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device.type, dtype, enabled=device.type == "cuda"):
                train_step(nll, tokens, options.length, 1, backward, update)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    steps(3)
    seconds = steps(options.steps)
    row = {
        "ms": round(1000 * seconds, 2),
        "tokens_per_second": round(options.tokens / seconds),
        "attention": kernel.describe(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    for key, value in row.items():
        print(f"{key:>18}  {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
