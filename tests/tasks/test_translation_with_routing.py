"""The task under fairseq's own commands."""

import shutil
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from fairseq.logging import meters
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer
from support import small_run

from fairseq_sparsemixer.models.config import ConfigError
from fairseq_sparsemixer.moe import MoEFeedForward
from fairseq_sparsemixer.runs import points
from fairseq_sparsemixer.tasks.translation_with_routing import TranslationWithRoutingTask


def train_command(data):
    """A model that is trained for seconds."""
    return [
        "-m", "fairseq_cli.train", data, "--cpu", *small_run.USER_DIR,
        "--task", "translation_with_routing", "--arch", "switch_transformer_demo",
        "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16,
        "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32,
        "--encoder-attention-heads", 2, "--decoder-attention-heads", 2,
        "--share-all-embeddings", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 1000,
        "--max-update", 3, "--required-batch-size-multiple", 1, "--no-progress-bar",
        "--num-workers", 0,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_task_without_points_is_fairseqs(corpus, tmp_path):
    """fairseq-train with flags: points where asked for, and none without."""
    common = train_command(corpus / "bin")
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


def test_validation_is_scored_as_the_target_language_asks(corpus, tmp_path, monkeypatch):
    """German that is called Chinese: in the points, and by fairseq's own --eval-bleu."""
    for folder in ("bin", "raw"):
        (tmp_path / folder).mkdir()
        for path in (corpus / folder).iterdir():
            name = path.name.replace("en-de", "en-zh").replace(".de", ".zh")
            shutil.copy(path, tmp_path / folder / name)
    file = tmp_path / "p.jsonl"
    points_flags = ["--points-file", file, "--points-text", tmp_path / "raw"]
    save = ["--save-dir", tmp_path / "run", "--no-save"]
    small_run.python(*train_command(tmp_path / "bin"), *save, *points_flags)
    (point,) = points.read_points(file)
    assert "tok:zh" in point["signatures"]["bleu"].split("|")

    task = TranslationWithRoutingTask.__new__(TranslationWithRoutingTask)
    task.cfg = SimpleNamespace(target_lang="zh")
    scored = {"sys": ["旧书在这里。"], "refs": [["那本旧书在这里。"]]}
    monkeypatch.setattr(
        TranslationTask,
        "_inference_with_bleu",
        lambda *_: sacrebleu.corpus_bleu(scored["sys"], scored["refs"]),
    )
    expected = sacrebleu.corpus_bleu(scored["sys"], scored["refs"], tokenize="zh")
    assert task._inference_with_bleu(None, {}, None).score == expected.score > 50
    assert sacrebleu.corpus_bleu(scored["sys"], scored["refs"]).sys_len == 1


@pytest.mark.slow
def test_the_best_checkpoint_is_by_bleu_from_the_beginning(corpus, tmp_path):
    """Also where the model says nothing yet, and the points have a BLEU of their own."""
    command = train_command(corpus / "bin")
    command += ["--save-dir", tmp_path, "--best-checkpoint-metric", "bleu", "--eval-bleu"]
    command += ["--maximize-best-checkpoint-metric", "--eval-bleu-remove-bpe", "sentencepiece"]
    command += ["--eval-bleu-args", '{"min_len": 0, "max_len_b": 0}', "--max-update", 2]
    command += ["--points-file", tmp_path / "p.jsonl", "--points-text", corpus / "raw"]
    small_run.python(*command, "--validate-interval-updates", 1)
    best = torch.load(tmp_path / "checkpoint_best.pt")["extra_state"]
    assert best["val_loss"] == best["best"] == 0


def test_a_measure_that_there_is_not_is_told():
    found = meters.MetersDict()
    found.add_meter("loss", meters.AverageMeter(), priority=0)
    with pytest.raises(ConfigError, match=r"--best-checkpoint-metric blue: .* choose from loss$"):
        found.get_smoothed_values()["blue"]
    task = TranslationWithRoutingTask.__new__(TranslationWithRoutingTask)
    task.cfg = SimpleNamespace(eval_bleu=False)
    best = {"best_checkpoint_metric": "bleu", "maximize_best_checkpoint_metric": True}
    cfg = SimpleNamespace(checkpoint=SimpleNamespace(**best))
    with pytest.raises(ConfigError, match="--best-checkpoint-metric bleu needs --eval-bleu"):
        Trainer(cfg, task, None, None)


@pytest.mark.parametrize(
    ("workers", "sentences", "refused"), [(2, 200, True), (2, 0, False), (1, 200, False)]
)
def test_translating_with_what_other_workers_hold_is_refused(
    workers, sentences, refused, monkeypatch
):
    """Before training, by all workers."""
    spread = MoEFeedForward(2, 2, 2)
    spread.experts.parallel = SimpleNamespace()
    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: workers)
    shard = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # fairscale is not needed
    torch.nn.Module.__init__(shard)
    task = SimpleNamespace(settings=SimpleNamespace(points_text="raw", points_sentences=sentences))
    check = TranslationWithRoutingTask._check_translation
    check(task, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    for part, flag in ((shard, "--ddp-backend"), (spread, "--expert-parallel-size")):
        if refused:
            with pytest.raises(ConfigError, match=f"--points-sentences must be 0 with {flag}"):
                check(task, torch.nn.Sequential(part))
        else:
            check(task, torch.nn.Sequential(part))
