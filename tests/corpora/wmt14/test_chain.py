"""From archives to a results table with the commands of docs/wmt14.md, at the smallest size."""

import csv
import json
import os
import subprocess
import sys

import pytest
from support import statmt

from fairseq_sparsemixer.files import read_lines

MODEL = {
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_embed_dim": 32 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_embed_dim": 64 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
TINY = [
    *(f"+model.{key}={value}" for key, value in MODEL.items()),
    "dataset.max_tokens=1000",
    "dataset.num_workers=0",
    "optimization.update_freq=[1]",
    "optimization.max_update=24",
    "optimization.lr=[0.003]",
    "lr_scheduler.warmup_updates=4",
    "common.log_interval=4",
    "checkpoint.save_interval_updates=8",
]
SIZES = {"sentencepiece": ["--vocab-size", 300], "moses": ["--merges", 250]}


def run(*arguments):
    """``fairseq-sparsemixer ARGUMENTS``; its standard output."""
    result = subprocess.run(
        [sys.executable, "-m", "fairseq_sparsemixer.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def sacrebleu(reference, hypotheses, *arguments):
    """The score of sacreBLEU's own command."""
    command = [sys.executable, "-m", "sacrebleu", reference, "-i", hypotheses, "-w", "6"]
    command += ["-b", *arguments]
    return float(subprocess.run(map(str, command), capture_output=True, check=True).stdout)


@pytest.mark.parametrize(
    "pipeline", ["sentencepiece", pytest.param("moses", marks=pytest.mark.slow)]
)
def test_from_archives_to_the_table(pipeline, tmp_path):
    corpus, runs = tmp_path / "corpus", tmp_path / "runs"
    with statmt.serving() as server:
        pins = statmt.write_pins(tmp_path / "pins.json", server)
        flags = ["--mirror", server.url, "--checksums", pins, "--pipeline", pipeline]
        run("prepare", "wmt14", "--output", corpus, *flags, *SIZES[pipeline])

    arms = {
        "dense": ["--router", "dense"],
        "sparsemixer-2": ["--router", "sparsemixer", "--experts", "2"],
    }
    for name, arm in arms.items():
        flags = ["--runs", runs, "--pipeline", pipeline, f"task.data={corpus / 'bin'}"]
        run("train", *arm, *flags, *TINY)
        folder = next(runs.glob(f"{name}*"))
        assert json.loads((folder / "run.json").read_text())["parameters"]["total"] > 0
        shown = run("evaluate", folder, "--last", "2", "--beam", "4", "--lenpen", "0.6")
        (written,) = (folder / "evaluation").glob("*.json")
        report = json.loads(written.read_text())
        scores = report["scores"]
        assert list(scores)[:2] == ["bleu", "chrf"] and report["generation"]["beam"] == 4
        assert report["counts"]["hypothesis_lines"] == 30
        hypotheses = written.with_suffix(".de")
        assert len(read_lines(hypotheses)) == 30
        reference = corpus / "raw" / "test.de"
        ours = pytest.approx(scores["bleu"]["score"], abs=1e-5)
        assert sacrebleu(reference, hypotheses) == ours
        assert ("tokenised_bleu" in scores) == (pipeline == "moses")
        if pipeline == "moses":
            assert "not comparable with sacreBLEU" in shown
            stem = written.with_suffix("")
            tokens = [stem.with_name(f"{stem.name}.{name}.tok") for name in ("ref.de", "de")]
            ours = pytest.approx(scores["tokenised_bleu"]["score"], abs=1e-5)
            assert sacrebleu(*tokens, "--tokenize", "none", "--force") == ours

    shown = run("table", runs, "--baseline", "dense", "--output", tmp_path / "table")
    assert "fill in from the paper" in shown
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == sorted(arms)
    assert float(rows["dense"]["speed_up"]) == 1.0
    assert 0 < float(rows["sparsemixer-2"]["p_value"]) <= 1
    assert rows["sparsemixer-2"]["paper"] == ""
    total, active = (int(rows["sparsemixer-2"][f"parameters_{key}"]) for key in ("total", "active"))
    assert total > active > 0
