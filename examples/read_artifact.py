"""Read an artifact and run its model with numpy, zstandard and, for the codec `ans`, constriction.

`python examples/read_artifact.py runs/quickstart/1/artifact.zst 1 300 301` prints the bits that each token after the
first takes, given those before it, and the five likeliest next tokens. Token 1 starts a document. docs/artifact.md
specifies the format.
"""

import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import zstandard

KNOWN = ("num_heads", "num_kv_heads", "rope_base", "rope_dims", "key_offset", "qk_gain_init", "xsa", "gate_dims")
KNOWN += ("window", "window_pattern")


def planes(data, dtype, shape):
    """Numbers whose lowest bytes come first, then the next bytes, and so on."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer(data, np.uint8).reshape(size, -1).T.copy().view(dtype).reshape(shape)


def read(path):
    """The header and the tensors by name, in float32."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    if data[:8] != b"GOLFLM03" or data[8:40] != hashlib.sha256(data[40:]).digest():
        raise SystemExit(f"{path}: is no whole artifact of version 03")
    content = zstandard.ZstdDecompressor().decompress(data[40:])
    (length,) = struct.unpack_from("<I", content)
    header, payload = json.loads(content[4 : 4 + length]), memoryview(content)[4 + length :]
    for option, value in header["model"]["attention"].items():
        if option not in KNOWN and value not in (None, False):
            raise SystemExit(f"{path}: has the option attention.{option}, which this reader does not know")
    coded = header["codec"] == "ans"
    tensors, symbols, classes = {}, {}, {}
    for entry in header["tensors"]:
        kind, shape, at = entry["kind"], entry["shape"], entry["offset"]
        rows, n = int(np.prod(shape[:-1], dtype=int)), int(np.prod(shape, dtype=int))
        columns = n // max(rows, 1)
        if not kind.startswith("int"):
            tensors[entry["name"]] = planes(payload[at : at + n * int(kind[5:]) // 8], kind, shape).astype(np.float32)
            continue
        if coded:
            levels = np.frombuffer(payload, np.int8, rows + columns, at).astype(int)
            classes[entry["name"]] = np.clip(levels[:rows, None] + levels[rows:], -32, 40).ravel()
            symbols[entry["name"]] = np.zeros(n, int)
        else:
            symbols[entry["name"]] = np.frombuffer(payload, np.int8, n, at).astype(int)
        at += rows + columns if coded else n
        scales = planes(payload[at : at + 2 * rows], np.float16, (rows, 1)).astype(np.float32)
        exponents = np.frombuffer(payload, np.int8, columns, at + 2 * rows) if entry.get("columns") else None
        tensors[entry["name"]] = (scales, exponents, shape)
    if coded and symbols:
        _decode(header, payload, symbols, classes)
    for name, values in symbols.items():
        scales, exponents, shape = tensors[name]
        matrix = values.reshape(len(scales), -1).astype(np.float32) * scales
        if exponents is not None:
            matrix = matrix * np.exp2(exponents.astype(np.float32) / np.float32(8))
        tensors[name] = matrix.reshape(shape)
    return header, tensors


def _decode(header, payload, symbols, classes):
    """Fill in the symbols of the codec `ans`, class by class."""
    import constriction

    words = np.frombuffer(payload[len(payload) - 4 * header["words"] :], "<u4").astype(np.uint32)
    end = len(payload) - 4 * header["words"]
    tables = planes(payload[end - 510 * header["tables"] : end], np.uint16, (header["tables"], 255)).astype(int)
    frequencies = (tables % 32) * 2.0 ** np.minimum(tables // 32, 40)
    coder = constriction.stream.stack.AnsCoder(words)
    for number, level in enumerate(sorted({int(each) for values in classes.values() for each in np.unique(values)})):
        model = constriction.stream.model.Categorical(frequencies[number], perfect=False)
        for name, values in classes.items():
            chosen = values == level
            if chosen.any():
                symbols[name][chosen] = coder.decode(model, int(chosen.sum())) - 127
    assert coder.is_empty()


def rms(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(2**-23))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rope(x, config):
    """Rotate the heads of (T, heads, d) by the angles of their positions."""
    d = x.shape[-1]
    r = config["rope_dims"] or d
    frequencies = np.pad(config["rope_base"] ** (-np.arange(0, r, 2) / r), (0, (d - r) // 2))
    angle = np.arange(len(x))[:, None, None] * frequencies
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate((a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)), -1)


def attend(n, w, p, config, letter, embeddings):
    """Attention of one block on normalized states, (T, D) to (T, D)."""
    heads, kv_heads, length = config["num_heads"], config["num_kv_heads"], len(n)
    q = rope(rms((n @ w[p + "q.weight"].T).reshape(length, heads, -1)), config) * w[p + "q_gain"][:, None]
    k = rope(rms((n @ w[p + "k.weight"].T).reshape(length, kv_heads, -1)), config)
    if config.get("key_offset") and not (config["window"] and letter == "S"):
        half, first = k.shape[-1] // 2, config["rope_dims"] // 2
        taken = np.arange(2 * half) % half >= first
        k = np.where(taken, np.concatenate((k[:1], k[:-1])), k)
    v = (n @ w[p + "v.weight"].T).reshape(length, kv_heads, -1)
    if p + "value_gain" in w:
        v = v + w[p + "value_gain"][:, None] * embeddings
    k, v = (np.repeat(each, heads // kv_heads, 1) for each in (k, v))
    age = np.arange(length)[:, None] - np.arange(length)
    seen = (age >= 0) & (age < (config["window"] if config["window"] and letter == "S" else length))
    scores = np.where(seen, np.einsum("phd,qhd->hpq", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("hpq,qhd->phd", weights / weights.sum(-1, keepdims=True), v)
    if config["xsa"]:
        unit = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)
        y = y - (y * unit).sum(-1, keepdims=True) * unit
    if config["gate_dims"]:
        y = y * (2 * sigmoid(n[:, : config["gate_dims"]] @ w[p + "gate"].T))[..., None]
    return y.reshape(length, -1) @ w[p + "out.weight"].T


def embed(w, tokens, config):
    """Input embedding, (T,) to (T, D)."""
    x = w["token_embedding.weight"][tokens]
    if buckets := config["bigram"]["buckets"]:
        mixed = (36313 * tokens[1:]).astype(np.int32) ^ (27191 * tokens[:-1]).astype(np.int32)
        hashed = np.concatenate(([buckets - 1], mixed % (buckets - 1)))
        x = x + w["bigram.scale"] * (w["bigram.table.weight"][hashed] @ w["bigram.proj.weight"].T)
    x = rms(x)
    before = np.concatenate((np.zeros_like(x[:1]), x[:-1]))
    if config["smear"]["gate"] == "per_channel":
        return x + sigmoid(w["smear.gate"]) * (before - x)
    gate = w["smear.scale"] * sigmoid(x[:, : config["smear"]["dims"]] @ w["smear.gate"]) * (tokens != 1)
    return x + gate[:, None] * before


def logits(w, tokens, config):
    """Logits of the next token at every position, (T,) to (T, V)."""
    attention, loop = config["attention"], config["loop"]
    x = x0 = embed(w, tokens, config)
    blocks, stack = list(range(config["num_layers"])), []
    again = list(range(loop["first"], loop["last"] + 1)) * (loop["repeats"] or 0)
    runs = blocks[: loop["last"] + 1] + again + blocks[loop["last"] + 1 :]
    half = len(runs) // 2
    embeddings = None
    if config["value_embedding_blocks"]:
        embeddings = w["value_embedding.weight"][tokens].reshape(len(tokens), attention["num_kv_heads"], -1)
    for number, block in enumerate(runs):
        p = f"blocks.{block}."
        if number >= len(runs) - half:
            x = x + w["skip_weights"][number - len(runs) + half] * stack.pop()
        x = w[p + "mix"][0] * x + w[p + "mix"][1] * x0
        letter = attention["window_pattern"][block % len(attention["window_pattern"])]
        x = x + w[p + "attention_scale"] * attend(rms(x), w, p + "attention.", attention, letter, embeddings)
        up = np.maximum(rms(x) @ w[p + "mlp.up.weight"].T, 0) ** 2
        x = x + w[p + "mlp_scale"] * (up @ w[p + "mlp.down.weight"].T)
        if number < half:
            stack.append(x)
    head = w["token_embedding.weight" if config["tied_embeddings"] else "head.weight"]
    return config["logit_softcap"] * np.tanh(rms(x) @ head.T / config["logit_softcap"])


def main():
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(__doc__)
        raise SystemExit(0 if sys.argv[1:] else 2)
    header, weights = read(sys.argv[1])
    size = header["model"]["vocab_size"]
    for each in sys.argv[2:]:
        if not each.isdecimal() or int(each) >= size:
            raise SystemExit(f"{each}: is no token; give whole numbers from 0 to {size - 1}")
    tokens = np.array([int(each) for each in sys.argv[2:]] or [1])
    scores = logits(weights, tokens, header["model"]).astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    for position, token in enumerate(tokens[1:]):
        print(f"token {token}: {-np.log2(probabilities[position, token]):.6f} bits")
    for token in np.argsort(-probabilities[-1])[:5]:
        print(f"next token {token}: probability {probabilities[-1, token]:.6f}")


if __name__ == "__main__":
    main()
