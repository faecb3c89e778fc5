"""The model against the recipe's formulas, written again in numpy where there is one."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ALL_OPTIONS, TINY
from trainer.data import tokenizer
from trainer.kernels.attention_backends import SdpaBackend
from trainer.model import embedding
from trainer.model.attention import AttentionConfig, rotary_tables, rotate, xsa
from trainer.model.config import LoopConfig, TransformerConfig
from trainer.model.embedding import BigramConfig, SmearConfig, SmearGate, bigram_buckets
from trainer.model.layers import Linear
from trainer.model.mlp import MLPConfig
from trainer.model.transformer import Transformer


@pytest.fixture(scope="module")
def reference() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig())


OPTIONS = {
    "rope_dims": {"attention": replace(TINY.attention, rope_dims=4)},
    "key_offset": {"attention": replace(TINY.attention, rope_dims=4, key_offset=True)},
    "xsa": {"attention": replace(TINY.attention, xsa=True)},
    "gate_dims": {"attention": replace(TINY.attention, gate_dims=6)},
    "window": {"attention": replace(TINY.attention, window=3)},
    "no bigram": {"bigram": BigramConfig(buckets=None)},
    "per-token smear": {"smear": SmearConfig("per_token", 5)},
    "loop": {"loop": LoopConfig(repeats=2, first=1, last=2)},
    "value_embedding_blocks": {"value_embedding_blocks": 2},
}


def randomized(seed: int = 0, config: TransformerConfig = TINY) -> Transformer:
    """A tiny model whose zero-initialized parts are random, so that every path counts."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def test_the_reference_has_25517137_parameters(reference: Transformer):
    assert sum(parameter.numel() for parameter in reference.parameters()) == 25_517_137


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS, replace(ALL_OPTIONS, tied_embeddings=False)])
def test_every_matrix_starts_orthogonal_or_zero(config: TransformerConfig):
    """Also one that an option adds: torch's own initialization is neither."""
    for name, module in Transformer(config).named_modules():
        if isinstance(module, Linear):
            weight = module.weight.detach().double()
            gram = weight @ weight.mT if weight.size(0) <= weight.size(1) else weight.mT @ weight
            assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram), dtype=gram.dtype), atol=1e-5), name


def test_initialization_statistics(reference: Transformer):
    assert reference.token_embedding.weight.std().item() == pytest.approx(0.005, rel=0.01)
    assert not reference.bigram.table.weight.any()
    assert reference.bigram.scale.item() == pytest.approx(0.05)
    projection = reference.bigram.proj.weight * math.sqrt(20)
    assert torch.allclose(projection.T @ projection, torch.eye(128), atol=1e-5)
    for block in reference.blocks:
        assert not block.attention.out.weight.any()
        assert not block.mlp.down.weight.any()
        up = block.mlp.up.weight
        assert torch.allclose(up.T @ up, torch.eye(512), atol=1e-4)
        assert block.attention.q_gain.tolist() == [1.5] * 8
        assert torch.equal(block.mix, torch.stack((torch.ones(512), torch.zeros(512))))
    assert reference.skip_weights.shape == (5, 512)


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=20), st.sampled_from([64, 10240]))
def test_bigram_buckets_equal_numpy_int32(tokens: list[int], buckets: int):
    ids = np.array(tokens, dtype=np.int32)
    with np.errstate(over="ignore"):
        mixed = np.int32(36313) * ids[1:] ^ np.int32(27191) * ids[:-1]
    expected = [buckets - 1, *np.mod(mixed, buckets - 1).tolist()]
    assert bigram_buckets(torch.tensor([tokens]), buckets)[0].tolist() == expected


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
def test_future_tokens_never_change_past_logits(config: TransformerConfig):
    model = randomized(config=config)
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    before = model(ids)
    for t in (1, 11, 23):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 300
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


def test_smear_gate_mixes_in_the_token_before():
    gate = SmearGate(SmearConfig(), 3).double()
    gate.gate.data = torch.tensor([-1.0, 0.0, 2.0]).double()
    x = torch.randn(1, 4, 3).double()
    g = 1 / (1 + np.exp(-np.array([-1.0, 0.0, 2.0])))
    shifted = np.concatenate([np.zeros((1, 1, 3)), x.numpy()[:, :-1]], axis=1)
    assert np.allclose(gate(x, torch.zeros(1, 4)).detach().numpy(), (1 - g) * x.numpy() + g * shifted)


def test_rotary_positions_only_depend_on_distance():
    tables = rotary_tables(16, 8, 10000.0, torch.device("cpu")).double()
    q, k = torch.randn(2, 8).double()
    rope = lambda x: rotate(x.expand(1, 16, 1, 8), tables)[0, :, 0]  # noqa: E731
    products = rope(q) @ rope(k).T
    for distance in (0, 1, 5):
        assert torch.allclose(products.diagonal(distance), products[0, distance], atol=1e-5)


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
def test_the_whole_model_equals_numpy(config: TransformerConfig):
    """Every formula of the recipe and of its options once more, without torch."""
    model, options = randomized(3, config), config is ALL_OPTIONS
    p = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ids = np.array([5, 7, 7, 200, 1, 31, 8])
    length, heads, kv_heads, d = len(ids), 4, 2, 8

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def norm(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1.1920929e-07)

    def rope(x):
        rotated = 4 if options else d
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, rotated, 2) / rotated)
        angle = np.pad(angle, ((0, 0), (0, (d - rotated) // 2)))
        a, b = x[..., : d // 2], x[..., d // 2 :]
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([a * c + b * s, b * c - a * s], -1)

    def attention(name, x, window):
        q = rope(norm((x @ p[name + "q.weight"].T).reshape(length, heads, d))) * p[name + "q_gain"][:, None]
        k = rope(norm((x @ p[name + "k.weight"].T).reshape(length, kv_heads, d)))
        if options and window == length:  # all but the channels 0, 1, 4 and 5, which RoPE rotates
            for t in range(length - 1, 0, -1):
                k[t, :, [2, 3, 6, 7]] = k[t - 1, :, [2, 3, 6, 7]]
        v = (x @ p[name + "v.weight"].T).reshape(length, kv_heads, d)
        if name + "value_gain" in p:
            tokens = p["value_embedding.weight"][ids].reshape(length, kv_heads, d)
            v = v + p[name + "value_gain"][:, None] * tokens
        out = np.zeros((length, heads, d))
        for h in range(heads):
            for t in range(length):
                seen = slice(max(0, t + 1 - window), t + 1)
                scores = k[seen, h // 2] @ q[t, h] / np.sqrt(d)
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ v[seen, h // 2]
                if options:
                    direction = v[t, h // 2] / np.linalg.norm(v[t, h // 2])
                    out[t, h] -= out[t, h] @ direction * direction
                    out[t, h] *= 2 * sigmoid(x[t, :6] @ p[name + "gate"][h])
        return out.reshape(length, -1) @ p[name + "out.weight"].T

    def mlp(name, x):
        return np.maximum(x @ p[name + "up.weight"].T, 0) ** 2 @ p[name + "down.weight"].T

    x = p["token_embedding.weight"][ids]
    if not options:
        buckets = bigram_buckets(torch.tensor(ids)[None], 64)[0].numpy()
        x = x + p["bigram.table.weight"][buckets] @ p["bigram.proj.weight"].T * p["bigram.scale"]
    x = norm(x)
    before = np.concatenate([np.zeros((1, 32)), x[:-1]])
    if options:
        is_mixed = ids != 1  # nothing across the start of a document
        g = p["smear.scale"] * sigmoid(x[:, :5] @ p["smear.gate"]) * is_mixed
        x = x0 = x + g[:, None] * before
    else:
        g = sigmoid(p["smear.gate"])
        x = x0 = (1 - g) * x + g * before
    stack = []
    order = [0, 1, 2, 1, 2, 3] if options else [0, 1, 2, 3]
    half = len(order) // 2
    for index, i in enumerate(order):
        b = f"blocks.{i}."
        if index >= half:
            x = x + p["skip_weights"][index - half] * stack.pop()
        x = p[b + "mix"][0] * x + p[b + "mix"][1] * x0
        window = 3 if options and i in (0, 2) else length
        x = x + p[b + "attention_scale"] * attention(b + "attention.", norm(x), window)
        x = x + p[b + "mlp_scale"] * mlp(b + "mlp.", norm(x))
        if index < half:
            stack.append(x)
    if options:
        assert [f"blocks.{i}.attention.value_gain" in p for i in range(4)] == [False, True, True, True]
    logits = 30 * np.tanh(norm(x) @ p["token_embedding.weight"].T / 30)
    assert np.allclose(model(torch.tensor(ids)[None])[0].detach().numpy(), logits, atol=1e-5)


def test_a_loss_without_a_fused_operator_is_computed_in_chunks(monkeypatch: pytest.MonkeyPatch):
    model = randomized(5)
    ids, targets = torch.randint(0, 300, (2, 3, 20))
    rows: list[int] = []
    monkeypatch.setattr("trainer.model.transformer.MAX_LOGITS", 7 * 300)
    softcap = model.softcap
    monkeypatch.setattr(model, "softcap", lambda logits: (rows.append(len(logits)), softcap(logits))[1])
    with torch.no_grad():
        chunked = model.nll(ids, targets)
    assert rows == [7] * 8 + [4]
    assert torch.allclose(chunked, model.nll(ids, targets), rtol=1e-12)  # with gradients: all at once
    assert rows[9:] == [60]


def test_nll_is_the_log_softmax_of_the_logits_from_a_position_on():
    model = randomized()
    ids, targets = torch.randint(0, 300, (2, 2, 12))
    logits = model(ids).detach().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, targets.numpy()[..., None], -1)[..., 0]
    assert np.allclose(model.nll(ids, targets, 5).detach().numpy(), expected[:, 5:])


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_activations_follow_autocast(device: str, config: TransformerConfig):
    """On a GPU autocast sums and normalizes in float32, which must not leak: backends take one type."""
    model = Transformer(config).to(device)
    seen = set()

    class Spy(SdpaBackend):
        def __call__(self, q, k, v):
            seen.update((q.dtype, k.dtype, v.dtype))
            return super().__call__(q, k, v)

    for block in model.blocks:
        block.attention.backend = Spy()
    ids = torch.randint(0, 300, (1, 8), device=device)
    with torch.autocast(device, torch.bfloat16):
        assert model.hidden(ids).dtype == torch.bfloat16
        assert seen == {torch.bfloat16}
        assert model(ids).dtype == torch.float32
        assert model.embed(ids).dtype == torch.bfloat16
        v = torch.randn(1, 8, 2, 8, device=device, dtype=torch.bfloat16)
        assert xsa(v, v).dtype == torch.bfloat16
    assert model.hidden(ids).dtype == torch.float32


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_switches_the_compiled_model_and_trains_all_its_parameters(option: str):
    config = replace(TINY, **OPTIONS[option])
    model, ids = randomized(config=config), torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    compiled = torch.compile(model.nll, fullgraph=True, dynamic=False, backend="eager")  # captured, not lowered
    nll = compiled(ids[:, :-1], ids[:, 1:])
    assert torch.allclose(nll, model.nll(ids[:, :-1], ids[:, 1:]))
    without = replace(TINY, attention=replace(config.attention, key_offset=False)) if option == "key_offset" else TINY
    plain = randomized(7, without)
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    shared = {key: value for key, value in model.state_dict().items() if shapes.get(key) == value.shape}
    plain.load_state_dict(shared, strict=False)
    assert not torch.allclose(nll, plain.nll(ids[:, :-1], ids[:, 1:]), atol=1e-4)
    nll.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_where_a_loop_would_be_does_not_matter_without_repeats():
    config = replace(TINY, loop=LoopConfig(repeats=None, first=1, last=9))
    assert config.block_order() == config.block_order(is_looped=False) == [0, 1, 2, 3]


def test_a_loop_that_is_off_is_the_model_without_it():
    model = randomized(config=replace(TINY, loop=LoopConfig(repeats=2, first=1, last=2)))
    plain, ids = Transformer(TINY).double(), torch.randint(0, 300, (2, 12))
    state = model.state_dict()
    plain.load_state_dict(state | {"skip_weights": state["skip_weights"][:2]})
    assert not torch.allclose(model(ids), plain(ids), atol=1e-3)
    model.is_looped = False
    assert torch.equal(model(ids), plain(ids))
    assert model.config.block_order() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert model.config.block_order(is_looped=False) == [0, 1, 2, 3]


def test_a_window_pattern_repeats_over_the_blocks():
    attention = AttentionConfig(window=5, window_pattern="SSL")
    assert [attention.window_of(block) for block in range(7)] == [5, 5, None, 5, 5, None, 5]
    assert [AttentionConfig(window_pattern="SSL").window_of(block) for block in range(3)] == [None] * 3


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
def test_xsa_removes_the_component_along_the_positions_value(kv_heads: int, group: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(2, 3, kv_heads * group, 8, generator=generator).double()
    v = torch.randn(2, 3, kv_heads, 8, generator=generator).double()
    remainder = xsa(y, v)
    assert (remainder * v.repeat_interleave(group, 2)).sum(-1).abs().max() < 1e-9
    assert torch.allclose(xsa(remainder, v), remainder)


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS], ids=["reference", "all options"])
@pytest.mark.parametrize("start_pos", [1, 7, 11])
def test_states_from_a_position_on_equal_the_whole_ones(start_pos: int, config: TransformerConfig):
    model = randomized(5, config).double()
    ids = torch.randint(0, 300, (3, 12))
    assert torch.allclose(model.hidden(ids, start_pos), model.hidden(ids)[:, start_pos:], atol=1e-12)


def test_a_channel_scale_in_the_matrix_has_the_gradient_of_one_behind_it():
    layer, scale, x = Linear(6, 5).double(), torch.randn(5).double().requires_grad_(), torch.randn(3, 4, 6).double()
    grad = torch.randn(3, 4, 5).double()
    folded = torch.autograd.grad(layer(x, scale), (layer.weight, scale), grad)
    behind = torch.autograd.grad(layer(x) * scale, (layer.weight, scale), grad)
    assert all(torch.allclose(a, b) for a, b in zip(folded, behind, strict=True))


@pytest.mark.parametrize("config", [TINY, ALL_OPTIONS, TransformerConfig()], ids=["tiny", "all options", "reference"])
def test_a_config_survives_the_round_trip(config: TransformerConfig):
    assert TransformerConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"model_dim": 100}, "model_dim 100 does not give 8 heads of an even width"),
        ({"num_layers": 1}, "num_layers must be between 2 and 1,000, not 1"),
        ({"num_layers": 100_000}, "num_layers must be between 2 and 1,000, not 100,000"),
        ({"attention": {"num_heads": 0}}, r"attention\.num_heads must be at least 1, not 0"),
        ({"attention": {"num_heads": 8, "num_kv_heads": 3}}, "num_heads 8 is not a multiple of num_kv_heads 3"),
        ({"attention": {"rope_dims": 66}}, "rope_dims 66 is more than the head's 64"),
        ({"attention": {"rope_dims": 7}}, "rope_dims must be even and at least 2, or null for all, not 7"),
        ({"attention": {"rope_dims": 0}}, "rope_dims must be even and at least 2, or null for all, not 0"),
        ({"attention": {"key_offset": True}}, "key_offset needs model.attention.rope_dims below the head's 64"),
        ({"attention": {"key_offset": True, "rope_dims": 64}}, "key_offset needs .* below the head's 64"),
        (
            {"attention": {"key_offset": True, "rope_dims": 16, "window": 8, "window_pattern": "S"}},
            "key_offset needs a block with full attention",
        ),
        ({"attention": {"window": 0}}, "window must be at least 1, or null for none, not 0"),
        ({"attention": {"window_pattern": ""}}, r"window_pattern must consist of S \(window\) and L \(full\), not ''"),
        ({"attention": {"window_pattern": "SX"}}, "window_pattern must consist of S .*, not 'SX'"),
        ({"attention": {"gate_dims": 0}}, "gate_dims must be at least 1, or null for none, not 0"),
        ({"attention": {"gate_dims": 513}}, "gate_dims 513 is more than model_dim 512"),
        ({"mlp": {"ratio": 0}}, r"mlp\.ratio must be at least 1, not 0"),
        ({"smear": {"dims": 0}}, r"smear\.dims must be at least 1, not 0"),
        ({"smear": {"dims": 513}}, r"smear\.dims 513 is more than model_dim 512"),
        ({"bigram": {"buckets": 0}}, r"bigram\.buckets must be at least 2, or null for no table, not 0"),
        ({"bigram": {"buckets": 1}}, r"bigram\.buckets must be at least 2, or null for no table, not 1"),
        ({"bigram": {"dim": 0}}, r"bigram\.dim must be at least 1, not 0"),
        ({"loop": {"repeats": 0}}, r"loop\.repeats must be between 1 and 16, or be null, not 0"),
        ({"loop": {"repeats": 10**9}}, r"loop\.repeats must be between 1 and 16, or be null, not 1000000000"),
        ({"loop": {"repeats": 1, "first": 2, "last": 1}}, r"loop\.first must be between 0 and loop\.last"),
        ({"loop": {"repeats": 1, "start_frac": 1.0}}, r"loop\.start_frac in \[0, 1\), not 0, 0 and 1\.0"),
        ({"loop": {"repeats": 1, "last": 10}}, r"loop\.last 10 is not one of the 10 blocks"),
        ({"value_embedding_blocks": 0}, "value_embedding_blocks must be between 1 and num_layers 10, or be null"),
        ({"value_embedding_blocks": 11}, "value_embedding_blocks must be between 1 and num_layers 10, or be null"),
        ({"attention": {"rope_base": 0.0}}, r"attention\.rope_base must be above 0, not 0\.0"),
        ({"logit_softcap": 0.0}, r"logit_softcap must be above 0, not 0\.0"),
        ({"embedding_init_std": 0.0}, "embedding_init_std must be positive, not 0.0"),
        ({"depth": 3}, r"not a model config: this code has no option model\.depth"),
        ([1], "not a model config"),
        (None, "not a model config"),
        ({3: 1, "x": 2}, "not a model config"),
        ({"mlp": {"ratio": 2, "slope": 0.5}}, r"this code has no option model\.mlp\.slope"),
        ({"attention": 3}, "not a model config"),
        ({"value_embedding_blocks": 1.5}, "model.value_embedding_blocks must be a whole number or null, not 1.5"),
        ({"attention": {"window": 2.5}}, "model.attention.window must be a whole number or null, not 2.5"),
        ({"vocab_size": True}, "not a model config: model.vocab_size must be a whole number, not True"),
        ({"mlp": {"ratio": 2.5}}, "not a model config: model.mlp.ratio must be a whole number, not 2.5"),
        ({"smear": {"gate": "loud"}}, "model.smear.gate must be one of per_channel, per_token, not 'loud'"),
    ],
)
def test_a_bad_config_is_refused(values: Any, message: str):
    whole = TransformerConfig().to_dict()
    if isinstance(values, dict):
        groups = {key: {**whole[key], **value} for key, value in values.items() if isinstance(value, dict)}
        values = {**whole, **values, **groups}
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict(values)


def test_an_option_that_is_absent_is_off_or_missed():
    default = TransformerConfig().to_dict()
    options = [(name,) for name in default if not isinstance(default[name], dict)]
    options += [(group, name) for group in default if isinstance(default[group], dict) for name in default[group]]
    for *group, name in options:
        cut = TransformerConfig(attention=AttentionConfig(rope_dims=8)).to_dict()
        del (cut[group[0]] if group else cut)[name]
        value = (default[group[0]] if group else default)[name]
        if value in (None, False, 0):
            read = TransformerConfig.from_dict(cut).to_dict()
            assert (read[group[0]] if group else read)[name] == value
        else:
            with pytest.raises(ValueError, match=rf"model\.{'.'.join((*group, name))} is missing"):
                TransformerConfig.from_dict(cut)


def test_stored_config_is_the_model_and_not_the_machine():
    """A file trained with one GPU's kernels must load on a GPU without them."""
    attention = AttentionConfig(qk_gain_init=2.0, backend="cudnn")
    config = TransformerConfig(attention=attention, mlp=MLPConfig(4), fused="on")
    expected = TransformerConfig(attention=AttentionConfig(qk_gain_init=2.0), mlp=MLPConfig(4))
    assert TransformerConfig.from_dict(config.to_dict()) == expected


def test_the_model_and_the_tokenizer_mean_the_same_bos():
    """The model cannot import it from the data, and the other way around."""
    assert embedding.BOS == tokenizer.BOS
