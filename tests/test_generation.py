"""The cached decoder against the plain model, sampling against its definition, and the command as a user runs it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer as package
from tests.conftest import ALL_OPTIONS, TINY
from trainer.__main__ import main
from trainer.data.tokenizer import BOS, load_tokenizer
from trainer.errors import UserError
from trainer.files import sha256_of
from trainer.generation import Decoder, SamplingConfig, continue_text, generate_tokens, sample, stream_text
from trainer.kernels.attention_backends import SdpaBackend
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import write_artifact
from trainer.quantize.policy import QuantizationConfig, storage_dtype


@pytest.fixture(scope="module", params=[TINY, ALL_OPTIONS], ids=["reference", "all options"])
def model(request: pytest.FixtureRequest) -> Transformer:
    """Random everywhere, so that every part has an effect."""
    torch.manual_seed(0)
    model = Transformer(request.param).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@settings(deadline=None, max_examples=50)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 5))
def test_cached_logits_equal_those_of_the_whole_text(model: Transformer, cuts: list[int], seed: int):
    ids = np.random.default_rng(seed).integers(0, 300, sum(cuts)).tolist()
    decoder, twin = Decoder(model, 64), plain_twin(model)
    end = 0
    for cut in cuts:
        logits = decoder.feed(ids[end : end + cut])
        end += cut
        plain = twin(torch.tensor([ids[:end]]))[0, -1]
        assert torch.allclose(logits, plain, atol=1e-10)


def plain_twin(model: Transformer) -> Transformer:
    twin = Transformer(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def test_a_text_longer_than_the_context_continues_from_its_last_half(model: Transformer):
    ids = np.random.default_rng(0).integers(0, 300, 17).tolist()
    decoder = Decoder(model, 16)
    for token in ids:
        logits = decoder.feed([token])
    plain = plain_twin(model)(torch.tensor([ids[-8:]]))[0, -1]
    assert torch.allclose(logits, plain, atol=1e-10)


def test_a_generated_text_uses_its_own_attention_and_gives_the_models_back(model: Transformer, shard_folder: Path):
    attentions = [block.attention for block in model.blocks]
    before = [SdpaBackend("math") for _ in attentions]
    for attention, backend in zip(attentions, before, strict=True):
        attention.backend, attention.is_fused = backend, True  # the fused operator cannot run here
    tokenizer = load_tokenizer(shard_folder / "tokenizer.model")
    assert "".join(continue_text(model, tokenizer, "the model", SamplingConfig(tokens=5, context=16)))
    assert all(a.backend is backend and a.is_fused for a, backend in zip(attentions, before, strict=True))
    for attention in attentions:
        attention.is_fused = False


def test_sampling_draws_from_the_most_probable_in_their_proportions():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(**options: float) -> list[float]:
        settings = {"temperature": 1.0, "top_k": None, "top_p": 1.0, **options}
        drawn = [sample(logits, generator=generator, **settings) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert shares(top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.04)
    assert shares(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=0.04)
    assert shares(temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30], abs=0.04)
    assert shares(temperature=0) == [0, 1, 0, 0]


def test_generation_ends_with_the_document(model: Transformer):
    answers = iter([7, 8, BOS, 9])
    assert list(generate_tokens(Decoder(model, 32), [BOS], 10, lambda logits: next(answers))) == [7, 8]
    assert len(list(generate_tokens(Decoder(model, 32), [BOS], 10, lambda logits: 5))) == 10
    assert list(generate_tokens(Decoder(model, 32), [BOS], 0, lambda logits: 5)) == []


@given(text=st.text(alphabet="the cat é漢🙂", max_size=120), cut=st.integers(0, 30))
def test_streamed_text_is_the_decoded_whole(shard_folder: Path, text: str, cut: int):
    tokenizer = load_tokenizer(shard_folder / "tokenizer.model")
    ids = tokenizer.encode(text)
    parts = list(stream_text(tokenizer, ids[:cut], iter(ids[cut:])))
    assert all("\ufffd" not in part for part in parts[:-1])
    before = tokenizer.decode(ids[:cut])
    if not before.endswith("\ufffd"):
        assert before + "".join(parts) == tokenizer.decode(ids)


@pytest.fixture
def artifact(tmp_path: Path, shard_folder: Path) -> Path:
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in Transformer(TINY).state_dict().items()}
    dtypes = {name: storage_dtype(name, tensor, TINY, QuantizationConfig()) for name, tensor in state.items()}
    tokenizer = shard_folder / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    write_artifact(tmp_path / "artifact.zst", TINY, state, dtypes, sha256_of(tokenizer))
    return tmp_path / "artifact.zst"


def test_load_artifact_opens_model_and_tokenizer(artifact: Path, shard_folder: Path, tmp_path: Path):
    model, tokenizer = package.load_artifact(artifact)
    assert model(torch.tensor([[BOS, *tokenizer.encode("the model")]])).shape[-1] == 300
    assert not model.training
    (tmp_path / "tokenizer.model").write_bytes((shard_folder / "tokenizer.model").read_bytes() + b" ")
    with pytest.raises(UserError, match="not the tokenizer this model was trained with|is not a SentencePiece model"):
        package.load_artifact(artifact)


def test_the_command_writes_the_same_text_for_the_same_seed(artifact: Path, tmp_path: Path, capsys):
    (tmp_path / "prompts.txt").write_text("the model\nstones\n")
    args = ["generate", "--artifact", str(artifact), "--tokens", "12", "--seed", "3"]
    texts = []
    for more in ([], [], ["--seed", "4"]):
        assert main([*args, "--prompt", "small cats", "--prompts", str(tmp_path / "prompts.txt"), *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("small cats")
    assert "\n\nthe model" in texts[0]
    assert "\n\nstones" in texts[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "--temperature must be 0 or at least 1e-6, not -1.0"),
        (["--temperature", ".inf"], "--temperature: must be a finite number, not inf"),
        (["--temperature", ".nan"], "--temperature: must be a finite number, not nan"),
        (["--seed", "-1"], "--seed must be between"),
        (["--prompt", "caf\udce9"], "--prompt: is not UTF-8 text"),
        (["--top_p", "0"], "--top_p must be above 0 and at most 1, not 0"),
        (["--top_k", "0"], "--top_k must be at least 1, not 0"),
        (["--context", "1"], "--context must be between 2 and 1,048,576, not 1"),
        (["--device", "tpu9"], "--device tpu9"),
        (["--prompts", "nowhere"], "--prompts nowhere: cannot be read"),
        (["--artifact", "nowhere"], "nowhere: there is no such file"),
        (["--tokenizer", "nowhere"], "nowhere: there is no tokenizer"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(artifact: Path, args: list[str], message: str, capsys):
    assert main(["generate", "--artifact", str(artifact), *args]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_temperature_that_is_not_a_number_is_refused(artifact: Path, capsys):
    assert main(["generate", "--artifact", str(artifact), "--temperature", "nan"]) == 2
    assert "--temperature: must be a number, not nan" in capsys.readouterr().err


def test_recipes_are_listed_and_a_similar_command_is_suggested(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "int5mlp_10l            The reference recipe on one GPU" in listed
    assert main(["generat"]) == 2
    assert "did you mean generate?" in capsys.readouterr().err
    assert main(["version"]) == 2
    assert "did you mean --version?" in capsys.readouterr().err
    assert main(["dance"]) == 2
    assert "use fit, validate" in capsys.readouterr().err
