"""A model outside of this project: the files for other programs, and readers that need nothing of ours."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ALL_OPTIONS, ROOT, TINY
from tests.helpers import trainer_here
from trainer.files import sha256_of
from trainer.loading import stored_weights
from trainer.model.transformer import Transformer
from trainer.quantize.artifact import read_artifact, write_artifact
from trainer.run_folder import RunFolder

TOKENS = [1, 5, 7, 7, 200, 1, 31, 8, 299]
CONFIGS = {
    "reference": TINY,
    "all options": ALL_OPTIONS,
    "untied": replace(ALL_OPTIONS, tied_embeddings=False),
    "no loop": replace(ALL_OPTIONS, loop=replace(ALL_OPTIONS.loop, repeats=None)),
}


@pytest.fixture(params=[(name, codec) for name in CONFIGS for codec in ("zstd-22", "ans")], ids="-".join)
def run(request, tmp_path: Path, shard_folder: Path) -> RunFolder:
    """A folder with an artifact of a random model, and its tokenizer."""
    name, codec = request.param
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    shutil.copy(shard_folder / "tokenizer.model", folder.tokenizer)
    torch.manual_seed(3)
    model = Transformer(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = model.state_dict()
    dtypes = {key: "int6" if tensor.dim() == 2 and "blocks" in key else "float16" for key, tensor in state.items()}
    dtypes["skip_weights"] = "float32"
    write_artifact(folder.artifact, model.config, state, dtypes, sha256_of(folder.tokenizer), codec=codec)
    return folder


def logits_of(artifact: Path) -> np.ndarray:
    with torch.no_grad():
        return read_artifact(artifact).build()(torch.tensor([TOKENS]))[0].numpy()


def run_alone(*args: str, cwd: Path, fails: bool = False) -> str:
    """What a Python program prints, or its error, in a process that cannot import this project."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    blocked = "import sys; sys.modules['trainer'] = None; sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read())"
    command = [sys.executable, "-c", blocked, *args]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == fails, result.stderr
    return result.stderr if fails else result.stdout


@pytest.mark.parametrize("run", [(name, "zstd-22") for name in CONFIGS], indirect=True, ids=CONFIGS)
def test_the_reader_in_the_docs_gives_the_same_logits(run: RunFolder, tmp_path: Path):
    args = ["export", f"--ckpt={run.artifact}", "--format=safetensors"]
    result = trainer_here(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = run.path / "safetensors"
    assert sha256_of(folder / "tokenizer.model") == sha256_of(run.tokenizer)
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/artifact.md").read_text(), re.DOTALL)
    show = f"print(json.dumps(logits(torch.tensor({TOKENS})).tolist()))\n"
    (tmp_path / "reader.py").write_text(program + show)
    logits = json.loads(run_alone("reader.py", str(folder), cwd=tmp_path))
    assert np.allclose(logits, logits_of(run.artifact), atol=1e-4)
    assert trainer_here(*args, cwd=tmp_path).stderr == (
        f"trainer: --out {folder}: holds other files; choose another --out or remove it\n"
    )


def test_the_numpy_example_reads_the_artifact_itself(run: RunFolder, tmp_path: Path):
    lines = (ROOT / "examples/read_artifact.py").read_text().partition('if __name__ == "__main__":')[0]
    lines += f"\nheader, w = read(sys.argv[1])\nt = np.array({TOKENS})\n"
    lines += "print(json.dumps([logits(w, t, header['model']).tolist(), {k: v.tolist() for k, v in w.items()}]))\n"
    (tmp_path / "reader.py").write_text(lines)
    logits, tensors = json.loads(run_alone("reader.py", str(run.artifact), cwd=tmp_path))
    expected = read_artifact(run.artifact).state
    assert set(tensors) == set(expected)
    for name, values in tensors.items():
        assert np.array_equal(np.array(values, dtype=np.float32), expected[name].numpy()), name
    assert np.allclose(logits, logits_of(run.artifact), atol=1e-4)


@pytest.mark.parametrize("run", [("reference", "zstd-22")], indirect=True, ids=["tiny"])
def test_the_numpy_example_prints_bits_and_likely_tokens(run: RunFolder, tmp_path: Path):
    shown = run_alone(str(ROOT / "examples/read_artifact.py"), str(run.artifact), *map(str, TOKENS), cwd=tmp_path)
    scores = torch.from_numpy(logits_of(run.artifact)).double().log_softmax(-1)
    bits = [-float(scores[n, token]) / np.log(2) for n, token in enumerate(TOKENS[1:])]
    assert [float(line.split()[2]) for line in shown.splitlines()[:-5]] == pytest.approx(bits, abs=1e-4)
    best = scores[-1].exp().topk(5)
    assert [int(line.split()[2].rstrip(":")) for line in shown.splitlines()[-5:]] == best.indices.tolist()
    for token in ("300", "the"):
        error = run_alone(str(ROOT / "examples/read_artifact.py"), str(run.artifact), token, cwd=tmp_path, fails=True)
        assert error == f"{token}: is no token; give whole numbers from 0 to 299\n"
    error = run_alone(str(ROOT / "examples/read_artifact.py"), "missing.zst", cwd=tmp_path, fails=True)
    assert error == "missing.zst: cannot be read (No such file or directory)\n"


@pytest.mark.parametrize("run", [("all options", "ans")], indirect=True, ids=["tiny"])
def test_the_tensors_are_those_of_the_artifact_in_the_type_that_was_asked_for(run: RunFolder, tmp_path: Path):
    args = ["export", f"--ckpt={run.artifact}", "--format=safetensors", "--out=out", "--dtype=bfloat16"]
    assert trainer_here(*args, cwd=tmp_path).returncode == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    expected = stored_weights(run.artifact).state
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor.bfloat16()) for name, tensor in expected.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_layers"] == ALL_OPTIONS.num_layers
    assert config["tokenizer_sha256"] == sha256_of(run.tokenizer)
    run.tokenizer.unlink()
    missing = trainer_here(*args[:3], "--out=other", cwd=tmp_path)
    assert missing.stderr.endswith("tokenizer.model: is missing; the model is of no use without it\n")
    assert not (tmp_path / "other").exists()
