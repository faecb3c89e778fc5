"""lm-evaluation-harness on a stored model, without a network.

Without the extra `lm-eval`, only the evaluation of a task is left out: the two classes that the model needs of the
harness are simple.
"""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, TEXT
from trainer.data.tokenizer import BOS

HAS_HARNESS = find_spec("lm_eval") is not None
if not HAS_HARNESS:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance"):
        sys.modules[name] = ModuleType(name)
    base = {"__init__": lambda self: None, "__module__": "lm_eval.api.model"}
    sys.modules["lm_eval.api.model"].LM = type("LM", (), base)
    sys.modules["lm_eval.api.instance"].Instance = SimpleNamespace

from trainer.harness import HarnessModel  # noqa: E402

GOLDEN = ROOT / "tests/golden/0.1.0"
TASK = """\
task: cats
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    shutil.copy(GOLDEN / "nearest.zst", folder / "artifact.zst")
    shutil.copy(GOLDEN / "shards/tokenizer.model", folder)
    return folder / "artifact.zst"


@pytest.fixture(scope="module")
def model(artifact: Path) -> HarnessModel:
    return HarnessModel(artifact, device="cpu", context=32)


def log_probs(model: HarnessModel, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, from the logits of one unpadded sequence."""
    with torch.no_grad():
        logits = model.model(torch.tensor([tokens[:-1]]))[0].double().numpy()
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(tokens) - 1), tokens[1:]]


def ask(method, *requests):
    return method([SimpleNamespace(args=args) for args in requests])


def test_a_continuation_has_the_sum_of_its_tokens(model: HarnessModel):
    pairs = [
        ("th", "e"),
        ("the model reads", " a token"),
        ("the cats ", "sleep"),
        ("", "warm stones"),
        ("one " * 60, "token"),
    ]
    answers = ask(model.loglikelihood, *pairs)
    for (context, continuation), (value, is_best) in zip(pairs, answers, strict=True):
        tokens = [BOS, *model.processor.encode(context + continuation)]
        before = [BOS, *model.processor.encode(context.rstrip())]
        count = len(tokens) - next(n for n in range(len(tokens)) if tokens[: n + 1] != before[: n + 1])
        expected = log_probs(model, tokens[-33:])[-count:].sum()
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_best is False


def test_the_most_probable_continuation_is_greedy(model: HarnessModel):
    starts = ["the model", "it", "cats", "then", "while 12", "on", "small"]
    texts = ask(model.generate_until, *((start, {"until": [], "max_gen_toks": 1}) for start in starts))
    pairs = [(start, text) for start, text in zip(starts, texts, strict=True) if text.strip() and "\ufffd" not in text]
    assert pairs  # whole characters, of tokens that do not merge with the start
    assert any(is_best for _, is_best in ask(model.loglikelihood, *pairs))


def test_a_text_is_scored_whole(model: HarnessModel):
    text = f"{TEXT} " * 3
    tokens = [BOS, *model.processor.encode(text)]
    assert len(tokens) > 100
    expected = sum(
        log_probs(model, tokens[start : start + 33])[0 if start == 0 else 16 :].sum()
        for start in range(0, len(tokens) - 33, 16)
    )
    last = (len(tokens) - 33) % 16
    (value,) = ask(model.loglikelihood_rolling, (text,))
    if last:  # the last window ends at the end of the text
        expected += log_probs(model, tokens[-33:])[-last:].sum()
    assert value == pytest.approx(expected, rel=1e-5)
    assert ask(model.loglikelihood_rolling, ("",)) == [0.0]


def test_generation_ends_at_a_stop_text(model: HarnessModel):
    whole = ask(model.generate_until, ("the model", {"until": [], "max_gen_toks": 12}))[0]
    stop = whole[4:6]
    cut = ask(model.generate_until, ("the model", {"until": [stop], "max_gen_toks": 12}))[0]
    assert cut == whole[: whole.find(stop)]


@pytest.mark.skipif(not HAS_HARNESS, reason="needs the extra lm-eval")
def test_the_harness_evaluates_a_task(model: HarnessModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    endings = ["sleep on warm stones", "reads a token", "writes another one"]
    documents = [
        {"start": start, "endings": endings, "label": index % 3}
        for index, start in enumerate(("cats", "it", "one", "the"))
    ]
    data = tmp_path / "cats.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    (tmp_path / "cats.yaml").write_text(TASK.format(data=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=["cats"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for each in documents:
        values = [ask(model.loglikelihood, (each["start"], f" {ending}"))[0][0] for ending in endings]
        right += int(np.argmax(values)) == each["label"]
    assert results["results"]["cats"]["acc,none"] == pytest.approx(right / 4)
