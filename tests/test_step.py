"""The plain training step: gradient accumulation gives the whole gradient, and the host waits for the right step."""

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY
from trainer.model.transformer import Transformer
from trainer.optim.muon_adamw import MuonAdamW, OptimizerConfig, parameter_groups
from trainer.step import StepFence, clip_gradients, train_step


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_accumulated_micro_batches_give_the_loss_and_gradient_of_the_whole(micro_batches: int):
    torch.manual_seed(0)
    model = Transformer(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(0, 300, (8, 17), dtype=torch.int32)
    results = []
    for count in (1, micro_batches):
        model.zero_grad()
        last: list[bool] = []

        def backward(loss: Tensor, is_last: bool, last: list[bool] = last) -> None:
            loss.backward()
            last.append(is_last)

        loss = train_step(model.nll, tokens, count, backward, lambda: None)
        assert last == [False] * (len(last) - 1) + [True]
        results.append((loss, [parameter.grad.clone() for parameter in model.parameters()]))
    (loss, gradients), (other_loss, accumulated) = results
    model.zero_grad()
    expected = torch.nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten().long()
    )
    expected.backward()
    assert abs(loss - expected) < 1e-6
    assert not loss.requires_grad
    for a, parameter in zip(gradients, model.parameters(), strict=True):
        assert (a - parameter.grad).norm() <= 1e-4 * a.norm() + 1e-7
    assert abs(loss - other_loss) < 1e-6
    for a, b in zip(gradients, accumulated, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7


def test_clipping_scales_to_the_limit_and_none_means_no_limit():
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]

    def fill() -> None:
        for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
            parameter.grad = torch.full_like(parameter, value)

    norm = (3 * 9 + 2 * 16) ** 0.5
    fill()
    assert clip_gradients(parameters, 0.5).total.item() == pytest.approx(norm)
    assert parameters[0].grad.tolist() == pytest.approx([3 * 0.5 / norm] * 3, rel=1e-5)
    fill()
    assert clip_gradients(parameters, None).total.item() == pytest.approx(norm)
    assert parameters[1].grad.tolist() == [4.0, 4.0]


def test_an_overflow_under_a_loss_scale_skips_the_step_of_muon_and_adamw_and_lowers_the_scale():
    torch.manual_seed(0)
    model, twin = Transformer(TINY), Transformer(TINY)
    twin.load_state_dict(model.state_dict())
    config = OptimizerConfig()
    optimizer, plain = (MuonAdamW(parameter_groups(m, config), config) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ids, targets = torch.randint(0, 300, (2, 2, 9))

    def step(overflow: bool) -> None:
        scaler.scale(model.nll(ids, targets).mean()).backward()
        if overflow:
            model.bigram.proj.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        clip_gradients(model.parameters(), config.grad_clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(overflow=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state
    assert scaler.get_scale() == 4.0
    step(overflow=False)  # as if there were no scale: clipping came after unscaling
    twin.nll(ids, targets).mean().backward()
    clip_gradients(twin.parameters(), config.grad_clip_norm)
    plain.step()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, twin.state_dict()[name], atol=1e-6), name
    assert not torch.equal(model.token_embedding.weight, before["token_embedding.weight"])


def test_the_host_waits_for_the_step_before_the_last(monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self) -> None:
            events.append(f"record {self.number}")

        def synchronize(self) -> None:
            events.append(f"wait {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    fence = StepFence(torch.device("cuda"))
    completed = [fence.record(step, torch.tensor([10.0 * step])) for step in (1, 2, 3, 4)]
    assert events == ["record 1", "record 2", "record 3", "wait 1", "record 4", "wait 2"]
    assert completed == [[], [], [(1, torch.tensor([10.0]))], [(2, torch.tensor([20.0]))]]
    assert [step for step, _ in fence.drain()] == [3, 4]
    assert StepFence(torch.device("cpu")).record(7, torch.tensor([1.0])) == [(7, torch.tensor([1.0]))]
    assert Event.count == 4
