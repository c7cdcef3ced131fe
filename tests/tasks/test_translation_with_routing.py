"""The task under fairseq's own commands."""

import torch
from support import small_run

from fairseq_sparsemixer.runs import points


def test_the_task_without_points_is_fairseqs(corpus, tmp_path):
    """fairseq-train with flags: points where asked for, and none without."""
    common = [
        "-m", "fairseq_cli.train", corpus / "bin", "--cpu", *small_run.USER_DIR,
        "--task", "translation_with_routing", "--arch", "switch_transformer_demo",
        "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16,
        "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32,
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2,
        "--share-all-embeddings", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 1000,
        "--max-update", 3, "--required-batch-size-multiple", 1, "--no-progress-bar",
        "--num-workers", 0,
    ]  # fmt: skip
    small_run.python(*common, "--save-dir", tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("points*"))
    file = tmp_path / "own" / "p.jsonl"
    own = [*common, "--save-dir", tmp_path / "own", "--points-file", file]
    small_run.python(*own)
    (point,) = points.read_points(file)
    assert point["updates"] == 3 and "bleu" not in point
    weights = [
        torch.load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("plain", "own")
    ]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    # Trained anew, its point is that of the new training.
    for path in (tmp_path / "own").glob("*.pt"):
        path.unlink()
    small_run.python(*own, "--seed", 2)
    (anew,) = points.read_points(file)
    assert anew["nll_loss"] != point["nll_loss"]
    # From a checkpoint whose clock is not known, neither is the time.
    file.with_suffix(".clock.json").unlink()
    small_run.python(*own, "--seed", 2, "--max-update", 4)
    _, last = points.read_points(file)
    unknown = ("seconds", "cpu_seconds", "words", "words_per_second")
    assert [last[key] for key in unknown] == [None] * 4
