"""ONNX graphs of an exported model, run by onnxruntime, against our translations."""

import json
import sys

import numpy as np
import pytest
import torch
from support.commands import command
from support.exported import exported
from support.models import build
from transformers import AutoTokenizer

from fairseq_sparsemixer.errors import UserError
from fairseq_sparsemixer.evaluation.translator import Translator
from fairseq_sparsemixer.export import graphs
from fairseq_sparsemixer.files import read_lines

pytestmark = pytest.mark.usefixtures("one_thread", "modules_cache")


def search(folder, batch, limit):
    """Greedy translations with what the folder holds, as lists of tokens."""
    runtime = pytest.importorskip("onnxruntime")
    encoder, decoder = (
        runtime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        for name in (graphs.ENCODER, graphs.DECODER)
    )
    names = [each.name for each in encoder.get_outputs()]
    memory = dict(zip(names, encoder.run(None, batch)))
    state = {
        name.replace("memory", "past"): np.zeros((*each.shape[:2], 0, each.shape[3]), np.float32)
        for name, each in memory.items()
    }
    tokens = np.full((len(batch["input_ids"]), 1), 2)
    written = [[] for _ in tokens]
    for place in range(limit):
        inputs = {"input_ids": tokens, "attention_mask": batch["attention_mask"]}
        logits, *present = decoder.run(None, {**inputs, **memory, **state})
        state = dict(zip(state, present))
        scores = logits[:, -1]
        scores[:, 1] = -np.inf
        if place == 0:
            scores[:, 2] = -np.inf
        tokens = scores.argmax(-1)[:, None]
        for line, token in zip(written, tokens[:, 0].tolist()):
            if 2 not in line:
                line.append(token)
        if all(2 in line for line in written):
            break
    return written


@pytest.mark.slow
def test_a_greedy_search_finds_what_ours_does(run_dir, corpus, tmp_path):
    pytest.importorskip("onnxscript")
    folder = tmp_path / "out"
    command("export", run_dir, "--data", corpus, "--to", "onnx", "--output", folder)
    lines = read_lines(corpus / "raw" / "test.en")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = dict(tokenizer(lines, return_tensors="np", padding=True))
    limit = json.loads((folder / "generation_config.json").read_text())["max_length"]
    found = tokenizer.batch_decode(search(folder, batch, limit - 2), skip_special_tokens=True)
    ours = Translator(str(run_dir), data=corpus).translate(lines, beam=1)
    assert found == [each.text for each in ours]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"router": "hash"},
        {"router": "sparsemixer-v2", "top_k": 2, "encoder_learned_pos": True},
        {"router": "default-moe", "balance_bias_rate": 0.1, "activation_fn": "gelu"},
    ],
    ids=str,
)
def test_graphs_compute_what_the_model_does(settings, tmp_path):
    """Which :func:`graphs.write` checks itself, for other sizes than it traced."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = exported(build(encoder_layers=1, decoder_layers=1, **settings))
    graphs.write(model, tmp_path)
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(1.5)
    arguments = graphs._arguments(model, 2, 4, 1, 2)[graphs.DECODER]
    memory, past = (
        [f"{name}.0.{part}" for part in ("key", "value")] for name in ("memory", "past")
    )
    difference = graphs._difference(
        graphs._DecoderGraph(model),
        arguments,
        tmp_path / graphs.DECODER,
        ["input_ids", "attention_mask", *memory, *past],
    )
    assert difference > graphs.LARGEST_DIFFERENCE, "another model is told apart"


def test_without_what_makes_graphs_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs onnx: .*'fairseq-sparsemixer\[onnx\]'"):
        graphs.write(None, tmp_path)
