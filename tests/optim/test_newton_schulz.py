"""The orthogonalization, and its division between processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.optim.newton_schulz import newton_schulz, orthogonalize

SHAPES = [(5, 4, 6), (1, 3, 3), (2, 6, 4), (2, 2, 9), (1, 9, 2), (3, 7, 5)]  # wide, square and tall


def stacks() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def test_singular_values_come_near_one():
    """After five steps those that were not tiny lie in the interval that the author states, about 0.7 to 1.2."""
    torch.manual_seed(1)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(4, 16, 64).double(), 5))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_each_matrix_wide_or_tall_is_orthogonalized_by_itself():
    results = orthogonalize(stacks(), 5)
    assert [result.shape for result in results] == SHAPES
    for stack, result in zip(stacks(), results, strict=True):
        for matrix, orthogonalized in zip(stack.numpy(), result.numpy(), strict=True):
            x = matrix / np.linalg.norm(matrix)
            for _ in range(5):  # on the other side of a tall matrix it is the same polynomial
                gram = x.T @ x
                x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
            assert np.allclose(orthogonalized, x, atol=1e-6)


def work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(orthogonalize(stacks(), 5), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_divide_the_work_get_the_same_bits(world: int, tmp_path: Path):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    alone = orthogonalize(stacks(), 5)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for index, expected in enumerate(alone):
        assert torch.allclose(results[0][index], expected, atol=1e-12)
        assert all(torch.equal(result[index], results[0][index]) for result in results)
