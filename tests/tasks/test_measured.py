"""Which task measures what."""

from fairseq.tasks import TASK_REGISTRY

from fairseq_sparsemixer.runs.points import METRICS
from fairseq_sparsemixer.tasks.measured import MeasuredTask


def test_each_measure_that_points_hold_is_one_of_a_task():
    """Besides those that are computed, and not fairseq's."""
    tasks = [task for task in TASK_REGISTRY.values() if issubclass(task, MeasuredTask)]
    of_fairseq = {metric for task in tasks for metric in task.metrics}
    assert of_fairseq == {*METRICS} - {"bleu", "chrf", "bits_per_byte"}
