"""The reading of training logs, against a simulation of stopped and resumed runs."""

import random
import statistics

import pytest
from support.run_folders import Log, straight_log

from fairseq_sparsemixer.files import write_lines
from fairseq_sparsemixer.runs.logs import by_layer, line_stats, read_log


@pytest.mark.parametrize("seed", range(8))
def test_a_log_of_many_sessions_reads_as_if_never_stopped(seed, tmp_path):
    """Against a simulation that keeps the one line of training that survives."""
    rng = random.Random(seed)
    log, spent, history, speeds = Log(), {0: 0.0}, {}, {}
    saved = 0
    for session in range(rng.randint(2, 6)):
        log.wait(rng.uniform(1, 5000))  # a pause
        log.begin(saved)
        if session and rng.random() < 0.3:
            continue  # killed before it trained: takes nothing back
        log.train()
        clock, updates = spent[saved], saved
        for part in (history, speeds):
            for key in [key for key in part if key > saved]:
                del part[key]
        for updates in range(saved + 1, saved + rng.randint(2, 40)):
            step = round(rng.uniform(0.1, 9), 3)
            log.wait(step)
            clock += step
            if updates % 5 == 0:
                speeds[updates] = rng.randint(500, 900)
                log.inner(updates, speeds[updates])
            if updates % 4 == 0:
                history[updates] = (clock, round(rng.uniform(3, 9), 3))
                log.valid(updates, history[updates][1])
            if updates % 6 == 0:
                log.save(updates, seconds=0.5)
                clock += 0.5
                saved, spent[updates] = updates, clock
            if updates % 13 == 0:
                log.add("fairseq.trainer", "begin training epoch 2")
    log.write(tmp_path / "hydra_train.log")
    found = read_log(tmp_path / "hydra_train.log")
    assert [v.updates for v in found.validations] == sorted(history)
    for validation in found.validations:
        seconds, nll = history[validation.updates]
        assert validation.nll_loss == nll
        assert validation.loss == pytest.approx(nll + 1)
        assert validation.seconds == pytest.approx(seconds, abs=0.05)
    assert found.words_per_second == (statistics.median(speeds.values()) if speeds else None)
    assert found.parameters == 7438100
    assert not found.ended


def test_a_log_that_begins_in_the_middle_tells_no_time(tmp_path):
    log = Log()
    log.begin(500)
    log.train()
    log.wait(60)
    log.valid(600, 4.0)
    log.write(tmp_path / "log")
    (validation,) = read_log(tmp_path / "log").validations
    assert (validation.updates, validation.seconds) == (600, None)


def test_the_end_of_training(tmp_path):
    """A time limit is no end, and a session that goes on takes the end back."""
    log = straight_log()
    log.write(tmp_path / "log")
    assert read_log(tmp_path / "log").ended
    log.begin(300)
    log.write(tmp_path / "log")
    assert not read_log(tmp_path / "log").ended
    log.train()
    limit = "cumulative_training_time: 2.1 > stop_time_hours: 2.0 hour(s)"
    log.add("fairseq_cli.train", f"Stopping training due to {limit}")
    log.done()
    log.write(tmp_path / "log")
    assert not read_log(tmp_path / "log").ended
    log.begin(300)  # a start that finds the time over
    over = "nothing is left to train: the 2.0 hours (--stop-time-hours) are over"
    log.add("fairseq_sparsemixer.restarts", over)
    log.done()
    log.write(tmp_path / "log")
    assert not read_log(tmp_path / "log").ended


def test_lines_that_are_cut_off_or_of_other_kinds(tmp_path):
    log = straight_log()
    cut = log.lines[-2][:-9]
    assert "[valid]" in cut
    write_lines(tmp_path / "log", [*log.lines[:-2], cut])
    assert [v.updates for v in read_log(tmp_path / "log").validations] == [100, 200]
    assert line_stats(cut, "valid") is None
    assert line_stats(log.lines[-2], "train_inner") is None
    assert line_stats("[x][valid][INFO] - nothing", "valid") is None
    scored = log.lines[-2].replace("{", '{"valid_pred": [], "valid_mcc": "41.5", ', 1)
    assert line_stats(scored, "valid", "valid_num_updates")["valid_mcc"] == 41.5
    inner = next(line for line in log.lines if "[train_inner]" in line)
    assert line_stats(inner, "train_inner")["wps"] == 2000
    assert "clip" not in line_stats(inner, "train_inner")
    stats = read_log(tmp_path / "log").validations[0].stats
    assert by_layer(stats, "min_expert_share") == {"encoder.0": 0.2}


def test_another_validation_set_and_cross_entropy_without_smoothing(tmp_path):
    log = Log()
    log.begin()
    log.train()
    log.valid(10, 4.0)
    log.add("dev", '{"epoch": 1, "dev_loss": "3.5", "dev_num_updates": "10"}')
    log.write(tmp_path / "log")
    (validation,) = read_log(tmp_path / "log", "dev").validations
    assert (validation.loss, validation.nll_loss) == (3.5, 3.5)


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*no\.log: No such file"):
        read_log(tmp_path / "no.log")


def test_training_that_was_taken_back_is_not_drawn(tmp_path):
    log = straight_log({20: 9.0}, ended=False)
    log.save(20)
    log.wait(10)
    log.inner(40)
    log.begin(20)
    log.train()
    log.wait(10)
    log.inner(30)
    log.write(tmp_path / "log")
    assert [(p.updates, p.nll_loss) for p in read_log(tmp_path / "log").training] == [
        (20, 9.5),
        (30, 9.5),
    ]


def test_warnings_of_the_watchdogs(tmp_path):
    """Those of updates that were trained again count as they were trained last."""
    log = Log()
    log.begin()
    log.train()
    log.inner(10)
    log.save(10)
    log.warn(10, "encoder.0, since update 5: expert 1")
    log.warn(20, "lost")
    log.begin(10)
    log.train()
    log.warn(30, "decoder.0: more")
    log.add("fairseq_sparsemixer.watchdogs", "of another kind", level="WARNING")
    log.add("other", "update 30: no watchdog's", level="WARNING")
    log.write(tmp_path / "hydra_train.log")
    assert read_log(tmp_path / "hydra_train.log").warnings == [
        (10, "encoder.0, since update 5: expert 1"),
        (30, "decoder.0: more"),
    ]
