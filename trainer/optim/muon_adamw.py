"""Muon for the matrices and AdamW for everything else, as one optimizer.

One optimizer, because Lightning counts every optimizer's step in `global_step` and updates the fp16 scale after each.
Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) is our own since `torch.optim.Muon` loops over the
matrices (2,100 small operations a step for 60 of them; by shape it is 84) and averages its momentum, which differs from
the recipe's sum while the momentum changes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from trainer.model.layers import Linear
from trainer.model.transformer import Transformer
from trainer.optim.newton_schulz import orthogonalize

SETTINGS = ("base_lr", "weight_decay", "betas", "eps")  # of a group


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates, momentum and weight decay of Muon and AdamW.

    Args:
        matrix_lr: Learning rate of Muon, for the weight matrices of the blocks and the bigram projection (at
            least 0).
        scalar_lr: Learning rate of AdamW for gains, gates, mixes and scales (at least 0).
        tied_embedding_lr: Learning rate of AdamW for the embedding tables when the head is tied (at least 0).
        embedding_lr: Learning rate of AdamW for the embedding tables when the head is untied (at least 0).
        head_lr: Learning rate of Adam, without weight decay, for an untied head (at least 0).
        momentum: Muon's momentum after its warm-up (0 to 1).
        newton_schulz_steps: Number of Newton-Schulz iterations of Muon's orthogonalization (at least 1).
        beta1: AdamW's decay rate of the first moment (0 to 1).
        beta2: AdamW's decay rate of the second moment (0 to 1).
        eps: AdamW's epsilon (above 0).
        weight_decay: Decoupled weight decay of Muon and AdamW (at least 0).
        embedding_weight_decay: Weight decay of the embedding tables (at least 0); null: weight_decay.
        scalar_weight_decay: Weight decay of gains, gates, mixes and scales (at least 0); null: weight_decay.
        row_normalize: Normalize every row of a matrix's update before it is orthogonalized (MuonEq-R,
            arXiv 2603.28254).
        grad_clip_norm: Largest global norm of the gradients (above 0); null: no clipping.
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
    row_normalize: bool = False
    grad_clip_norm: float | None = 0.3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.endswith(("_lr", "weight_decay")) and value is not None and not value >= 0:
                raise ValueError(f"model.optimizer.{name} must be at least 0, not {value}")
        if self.newton_schulz_steps < 1:
            raise ValueError(f"model.optimizer.newton_schulz_steps must be at least 1, not {self.newton_schulz_steps}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.optimizer.{name} must be in [0, 1), not {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"model.optimizer.eps must be positive, not {self.eps}")
        if self.grad_clip_norm is not None and not self.grad_clip_norm > 0:
            raise ValueError(
                f"model.optimizer.grad_clip_norm must be positive, or null for none, not {self.grad_clip_norm}"
            )


def parameter_groups(model: Transformer, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Sort every parameter of the model into its group, each exactly once; Muon has one group per shape of matrix."""
    head = [model.head.weight] if model.head is not None else []
    tables = [model.token_embedding, model.value_embedding, model.bigram.table if model.bigram is not None else None]
    embeddings = [table.weight for table in tables if table is not None]
    matrices: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for module in model.modules():
        if isinstance(module, Linear) and module is not model.head:
            matrices[module.weight.shape].append(module.weight)
    lists: list[list[Tensor]] = [head, embeddings, *matrices.values()]
    grouped = {id(parameter) for group in lists for parameter in group}
    scalars = [parameter for parameter in model.parameters() if id(parameter) not in grouped]
    embedding_lr = config.embedding_lr if head else config.tied_embedding_lr
    decay = config.weight_decay
    embedding_decay = decay if config.embedding_weight_decay is None else config.embedding_weight_decay
    scalar_decay = decay if config.scalar_weight_decay is None else config.scalar_weight_decay
    groups = [
        *(
            {"params": group, "lr": config.matrix_lr, "weight_decay": decay, "muon": True}
            for group in matrices.values()
        ),
        {"params": embeddings, "lr": embedding_lr, "weight_decay": embedding_decay, "muon": False},
        {"params": scalars, "lr": config.scalar_lr, "weight_decay": scalar_decay, "muon": False},
    ]
    if head:
        groups.append({"params": head, "lr": config.head_lr, "weight_decay": 0.0, "muon": False})
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one `step`. Learning rates and momentum are set from outside before each.

    Attributes:
        finite: A bool on the device, set before a step: whether all gradients are finite. Where it is False, the step
            changes neither parameters nor state, and the host does not have to know. None: not checked.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Hold the parameter groups.

        Args:
            groups: As made by `parameter_groups`; `muon` tells which algorithm updates them.
            config: Newton-Schulz iterations, and momentum, betas and epsilon of groups that do not name their own.
        """
        self.config = config
        self.finite: Tensor | None = None
        betas = config.beta1, config.beta2
        super().__init__(groups, {"momentum": config.momentum, "betas": betas, "eps": config.eps})
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def set_rates(self, multiplier: float, momentum: float) -> None:
        """Scale every group's learning rate and set Muon's momentum for the next step."""
        for group in self.param_groups:
            group["lr"] = multiplier * group["base_lr"]
            group["momentum"] = momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a stored state, with the settings of this run.

        torch would restore the stored ones, and leaves AdamW's step counts on the host, which its fused kernel refuses.
        """
        current = [{key: group[key] for key in SETTINGS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, current, strict=True):
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
        groups = [
            {**group, "params": [parameter for parameter in group["params"] if parameter.grad is not None]}
            for group in self.param_groups
        ]
        if muon := [group for group in groups if group["muon"] and group["params"]]:
            updates = self._momentum(muon)
            if self.config.row_normalize:
                updates = [F.normalize(update, dim=2) for update in updates]
            updates = orthogonalize(updates, self.config.newton_schulz_steps)
            self._apply(muon, updates)
        for group in groups:
            if group["params"] and not group["muon"]:
                self._adamw(group)
        return result

    def _momentum(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """Nesterov momentum, m = mu m + g, then g + mu m; of every shape a stack, (N, rows, cols)."""
        params, mu = _params(groups), groups[0]["momentum"]
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in params]
        grads = [parameter.grad for parameter in params if parameter.grad is not None]
        if self.finite is not None:
            grads = [torch.where(self.finite, grad, 0.0) for grad in grads]
        torch._foreach_mul_(buffers, self._if_finite(mu, params[0]))
        torch._foreach_add_(buffers, grads)
        updates = iter(torch._foreach_add(grads, buffers, alpha=mu))
        return [torch.stack([next(updates) for _ in group["params"]]) for group in groups]

    def _apply(self, groups: list[dict[str, Any]], updates: list[Tensor]) -> None:
        """Weight decay, then the orthogonalized updates: w = (1 - lr wd) w - lr sqrt(max(1, rows / cols)) u."""
        decayed: dict[float, list[Tensor]] = defaultdict(list)  # all matrices, unless a user has changed a group
        for group in groups:
            decayed[1 - group["lr"] * group["weight_decay"]] += group["params"]
        for factor, params in decayed.items():
            torch._foreach_mul_(params, self._if_finite(factor, params[0]))
        for group, update in zip(groups, updates, strict=True):
            rows, cols = update.shape[1:]
            if self.finite is not None:
                update = torch.where(self.finite, update, 0.0)
            # Strides and types as the weights have them, so that one kernel updates all matrices.
            update = update.to(group["params"][0].dtype).contiguous()
            torch._foreach_add_(group["params"], update.unbind(), alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)

    def _if_finite(self, factor: float, like: Tensor) -> Tensor | float:
        """A factor; one where a gradient is not finite."""
        if self.finite is None:
            return factor
        return torch.where(self.finite, torch.full((), factor, dtype=like.dtype, device=like.device), 1.0)

    def _adamw(self, group: dict[str, Any]) -> None:
        params = group["params"]
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
            [parameter.grad for parameter in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=on_gpu,
            amsgrad=False,
            found_inf=(~self.finite).float() if self.finite is not None and on_gpu else None,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _params(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"]]
