"""Muon for the matrices and AdamW for everything else, as one optimizer.

One optimizer, because Lightning counts every optimizer's step in `global_step` and updates the fp16 scale after each.
Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is our own since `torch.optim.Muon` loops over the
matrices (2,100 small operations a step for 60 of them; by shape it is 84) and averages its momentum, which differs from
the recipe's sum while the momentum changes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from trainer.model.layers import Linear
from trainer.model.transformer import Transformer
from trainer.optim.newton_schulz import orthogonalisation_dtype, orthogonalise


@dataclass(frozen=True)
class OptimizerConfig:
    """Rates of the two halves.

    Args:
        matrix_lr: Muon, for the weight matrices of the blocks and the bigram projection.
        scalar_lr: AdamW, for gains, gates, mixes and scales.
        tied_embedding_lr: AdamW, for the tables of tokens, bigrams and values when the head is tied.
        embedding_lr: The same when it is not.
        head_lr: Adam without decay, for an untied head.
        momentum: Muon's momentum after its warm-up.
        newton_schulz_steps: Iterations of Muon's orthogonalisation.
        beta1: AdamW's first decay rate.
        beta2: AdamW's second decay rate.
        eps: AdamW's epsilon.
        weight_decay: Decoupled decay of both halves.
        embedding_weight_decay: Of the embeddings; null: weight_decay.
        scalar_weight_decay: Of gains, gates, mixes and scales; null: weight_decay.
        row_normalise: Give every row of a matrix's update the same length before it is orthogonalised (MuonEq-R,
            arXiv 2603.28254).
        row_beta2: Divide every row of an orthogonalised update by its root mean square over the steps, which forgets
            with this rate (0 to 1), and keep the whole update's length (NorMuon, Li et al. 2025, arXiv 2510.05491);
            0: do not.
        grad_clip_norm: Largest global gradient norm; 0 does not clip.
    """

    matrix_lr: float = 0.02
    scalar_lr: float = 0.02
    tied_embedding_lr: float = 0.03
    embedding_lr: float = 0.6
    head_lr: float = 0.008
    momentum: float = 0.99
    newton_schulz_steps: int = 5
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.04
    embedding_weight_decay: float | None = None
    scalar_weight_decay: float | None = None
    row_normalise: bool = False
    row_beta2: float = 0.0
    grad_clip_norm: float = 0.3

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "row_beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1), not {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps must be positive, not {self.eps}")


def parameter_groups(model: Transformer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort every parameter of the model into its group, each exactly once."""
    head = [model.head.weight] if model.head is not None else []
    tables = (model.token_embedding, model.bigram and model.bigram.table, model.value_embedding)
    embeddings = [table.weight for table in tables if table is not None]
    matrices = [module.weight for module in model.modules() if isinstance(module, Linear) and module is not model.head]
    taken = {id(parameter) for parameter in (*head, *embeddings, *matrices)}
    scalars = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    embedding_lr = config.embedding_lr if head else config.tied_embedding_lr
    decay = config.weight_decay
    embedding_decay = decay if config.embedding_weight_decay is None else config.embedding_weight_decay
    scalar_decay = decay if config.scalar_weight_decay is None else config.scalar_weight_decay
    groups = [
        {"params": matrices, "lr": config.matrix_lr, "weight_decay": decay, "muon": True},
        {"params": embeddings, "lr": embedding_lr, "weight_decay": embedding_decay, "muon": False},
        {"params": scalars, "lr": config.scalar_lr, "weight_decay": scalar_decay, "muon": False},
    ]
    if head:
        groups.append({"params": head, "lr": config.head_lr, "weight_decay": 0.0, "muon": False})
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Both halves in one `step`. Learning rates and momentum are set from outside before each.

    Attributes:
        finite: A bool on the device, set before a step: whether all gradients are finite. Where it is False, the step
            changes neither parameters nor state, and the host does not have to know. None: nobody looked.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Hold the parameter groups.

        Args:
            groups: As made by `parameter_groups`; `muon` tells the half.
            config: Momentum, betas, epsilon and Newton-Schulz steps.
        """
        self.config = config
        self.finite: Tensor | None = None
        super().__init__(groups, {"momentum": config.momentum})
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def set_rates(self, multiplier: float, momentum: float) -> None:
        """Scale every group's learning rate and set Muon's momentum for the next step."""
        for group in self.param_groups:
            group["lr"] = multiplier * group["base_lr"]
            group["momentum"] = momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored state, with the rates and decays that this run asks for.

        torch would take the stored ones, and leaves AdamW's step counts on the host, which its fused kernel refuses.
        """
        asked = [{key: group[key] for key in ("base_lr", "weight_decay")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, asked, strict=True):
            group.update(settings)
        for parameter, state in self.state.items():
            if "step" in state and parameter.is_cuda:
                state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params and group["muon"]:
                self._muon(params, group)
            elif params:
                self._adamw(params, group)
        return result

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        buffers = []
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        if self.finite is not None:
            grads = [torch.where(self.finite, grad, 0.0) for grad in grads]
        torch._foreach_mul_(buffers, self._unless_bad(group["momentum"], params[0]))
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"])  # Nesterov
        torch._foreach_mul_(params, self._unless_bad(1 - group["lr"] * group["weight_decay"], params[0]))
        shapes: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for index, parameter in enumerate(params):
            rows, cols = parameter.shape
            shapes[min(rows, cols), max(rows, cols)][rows > cols].append(index)  # wide first, then tall
        dtype = orthogonalisation_dtype(params[0])
        batches = []
        for wide, tall in shapes.values():
            stacks = []
            for indices in (wide, tall):
                if not indices:
                    continue
                stack = torch.stack([updates[index] for index in indices])
                if self.config.row_normalise:
                    stack = F.normalize(stack, dim=2)
                stacks.append(stack.to(dtype) if indices is wide else stack.to(dtype).mT)
            batches.append(torch.cat(stacks))
        batches = orthogonalise(batches, self.config.newton_schulz_steps)
        if self.finite is not None:
            batches = [torch.where(self.finite, batch, 0.0) for batch in batches]
        for (wide, tall), batch in zip(shapes.values(), batches, strict=True):
            for indices, part in ((wide, batch[: len(wide)]), (tall, batch[len(wide) :].mT)):
                if not indices:
                    continue
                chosen = [params[index] for index in indices]
                rows, cols = chosen[0].shape
                alpha = -group["lr"] * max(1.0, rows / cols) ** 0.5
                # Like strides and types, so that one kernel serves all matrices of a shape.
                update = part.to(chosen[0].dtype).contiguous()
                if self.config.row_beta2:
                    update = self._even_rows(update, chosen)
                torch._foreach_add_(chosen, update.unbind(), alpha=alpha)

    def _even_rows(self, updates: Tensor, params: list[Tensor]) -> Tensor:
        """Scale the rows of updates (N, rows, cols) by their history; see `row_beta2`."""
        squares = updates.square().mean(2)  # (N, rows)
        for parameter in params:
            self.state[parameter].setdefault("row_square", squares.new_zeros(squares.size(1)))
        kept = [self.state[parameter]["row_square"] for parameter in params]
        mean = torch.lerp(
            torch.stack(kept), squares, self._unless_bad(1 - self.config.row_beta2, squares, otherwise=0.0)
        )
        torch._foreach_copy_(kept, mean.unbind())
        even = updates / (mean.sqrt() + self.config.eps)[..., None]
        before, after = (each.norm(dim=(1, 2), keepdim=True) for each in (updates, even))
        return even * (before / after.clamp(min=self.config.eps))  # both are zero after a gradient that is not finite

    def _unless_bad(self, factor: float, like: Tensor, otherwise: float = 1.0) -> Tensor | float:
        """A factor, or another where a gradient is not finite."""
        if self.finite is None:
            return factor
        return torch.where(self.finite, torch.full((), factor, dtype=like.dtype, device=like.device), otherwise)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        on_gpu = params[0].is_cuda
        if self.finite is not None and not on_gpu and not self.finite:
            return
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_gpu else "cpu")
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in params]
        adamw(
            params,
            [parameter.grad for parameter in params if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=on_gpu,
            amsgrad=False,
            found_inf=(~self.finite).float() if self.finite is not None and on_gpu else None,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.config.eps,
            maximize=False,
        )
