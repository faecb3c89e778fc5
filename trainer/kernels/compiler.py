"""Settings of torch.compile."""

import torch

MAX_GRAPHS = 64  # of one function: shapes, gradients or not, the loop, and a model of each stage of the export


def configure_compiler() -> None:
    """Set what a compiled run needs; once per process, before anything is compiled.

    - DDP does not split graphs: it would make other graphs than the warm-up compiled.
    - A function may have many graphs; beyond torch's limit of 8 an export with a validation, a loop and sliding windows
      would end in an error.
    - Sums over positions stay apart from sums over channels. Inductor puts many of them into one kernel, which took 9
      of the 89 ms of a reference step on an H100.
    - The compile cache keeps graphs that choose an attention backend. It refuses two functions of `sdpa_kernel`,
      although their arguments are part of the graph and so of its key. Without this, every start traces and partitions
      the graphs again: 10 s of the reference model's warm-up.
    """
    from torch._inductor import config  # noqa: PLC0415 - takes a second, which only a run that compiles has to spend

    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    config.triton.mix_order_reduction = False
    names = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")
    config.unsafe_marked_cacheable_functions |= dict.fromkeys(names, torch.__version__)
