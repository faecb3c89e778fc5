"""The optimizer step of a recipe's model: Muon by shape against torch's Muon and AdamW, in one process."""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.subject import load, report
from trainer.device import synchronize
from trainer.optim.muon_adamw import MuonAdamW, parameter_groups


def main() -> None:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="int5mlp_10l", help="name or path, as for --config")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    options, args = parser.parse_known_args()
    cli = load(options.config, args)
    device = cli.trainer.strategy.root_device
    model, config = cli.model.model.to(device), cli.model.optimizer_config
    groups = parameter_groups(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    rest = [parameter for group in groups if not group["muon"] for parameter in group["params"]]
    matrices = [parameter for group in groups if group["muon"] for parameter in group["params"]]
    ours = MuonAdamW(groups, config)
    # torch's Muon has bfloat16 built in; on a CPU that is slow and no fair comparison.
    muon = torch.optim.Muon(matrices, lr=config.matrix_lr, momentum=config.momentum, adjust_lr_fn="original")
    adamw = torch.optim.AdamW(rest, lr=config.scalar_lr, fused=device.type == "cuda")

    def both() -> None:
        muon.step()
        adamw.step()

    def milliseconds(step: Callable[[], object]) -> float:
        for _ in range(3):
            step()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(options.steps):
            step()
        synchronize(device)
        return 1000 * (time.perf_counter() - started) / options.steps

    ours_ms, torch_ms = milliseconds(ours.step), milliseconds(both)
    row = {
        "muon_adamw_ms": round(ours_ms, 2),
        "torch_muon_and_adamw_ms": round(torch_ms, 2),
        "ratio": round(torch_ms / ours_ms, 2),
        "matrices": len(matrices),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    report(f"optimizer {options.config} {' '.join(args)}".strip(), row, device)


if __name__ == "__main__":
    main()
