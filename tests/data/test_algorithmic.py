import numpy as np
import pytest

from graphmoe.data.algorithmic import UNSCORED, CopyTask, RecallTask, RepeatCopyTask
from graphmoe.data.graph_tasks import TraversalTask
from graphmoe.errors import ConfigError, DataError

TASKS = [CopyTask(4, 5), RepeatCopyTask(4, 3, 3), RecallTask(4, 4, 2), TraversalTask(6, 2, 5, 3)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_batches_are_a_pure_function(task):
    whole = task.batch(7, 3, 8)
    assert whole.inputs.shape[2] == task.input_size and whole.labels.shape[2] == task.output_size
    assert whole.inputs.shape[:2] == whole.labels.shape[:2] and whole.inputs.dtype == np.float32
    again = type(task)(*arguments(task)).batch(7, 3, 8)
    parts = [task.batch(7, 3, 8, slice(0, 3)), task.batch(7, 3, 8, slice(3, 8))]
    for index in range(2):
        np.testing.assert_array_equal(whole[index], again[index])
        np.testing.assert_array_equal(whole[index], np.concatenate([part[index] for part in parts]))
    assert not np.array_equal(whole.labels, task.batch(7, 4, 8).labels)
    assert not np.array_equal(whole.labels, task.batch(8, 3, 8).labels)
    first, second = (task.of_length(7, part, task.longest, 8) for part in (0, 1))
    assert first.inputs.shape == second.inputs.shape and not np.array_equal(first.inputs, second.inputs)


def arguments(task):
    extra = {
        "copy": (),
        "repeat_copy": (getattr(task, "most_repeats", None),),
        "recall": (getattr(task, "item_length", None),),
    }
    if task.name == "graph":
        return task.bits, task.num_labels, task.longest, task.walk
    return task.bits, task.longest, *extra[task.name]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_curriculum_bounds_the_difficulty(task):
    steps = {task.batch(0, index, 1, longest=task.shortest).inputs.shape[1] for index in range(20)}
    if task.name != "repeat_copy":  # whose sequences also differ in repetitions
        assert len(steps) == 1
    assert len({task.batch(0, index, 1).inputs.shape[1] for index in range(40)}) > 1


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_answers_cannot_be_read_from_the_step_itself(task):
    batch = task.of_length(0, 0, task.longest, 4)
    asked = (batch.labels != UNSCORED).any(axis=(0, 2))
    assert asked.any() and not asked.all()
    answers = batch.labels[:, asked]
    assert set(np.unique(answers)) <= {0.0, 1.0} and answers.std() > 0
    given = batch.inputs[:, asked]
    if task.name != "graph":  # where the walk's labels are still told
        assert not given.any()
    else:
        assert given[..., task.bits + task.num_labels : -1].sum() == 0


def test_copy_asks_for_what_was_given():
    inputs, labels = CopyTask(4, 5).of_length(1, 0, 5, 3)
    np.testing.assert_array_equal(labels[:, 6:], inputs[:, :5, :4])
    assert inputs[:, 5, 4].all() and inputs[:, :5, 4].sum() == 0


def test_repeat_copy_asks_as_often_as_the_mark_says_and_then_for_the_end():
    task = RepeatCopyTask(4, 3, 4)
    inputs, labels = task.repeated(np.random.default_rng(0), 2, 3, 2)
    assert (inputs[:, 3, 4] == 0.5).all()
    for start in (4, 7):
        np.testing.assert_array_equal(labels[:, start : start + 3, :4], inputs[:, :3, :4])
    assert (labels[:, -1, 4] == 1).all() and (labels[:, 4:-1, 4] == 0).all() and not labels[:, -1, :4].any()


def test_recall_asks_for_the_item_behind():
    task = RecallTask(4, 4, 2)
    inputs, labels = task.of_length(3, 0, 4, 20)
    for row in range(20):
        items = [inputs[row, 3 * item + 1 : 3 * item + 3, :4] for item in range(4)]
        query = inputs[row, 13:15, :4]
        (place,) = [i for i, item in enumerate(items) if np.array_equal(item, query)]
        np.testing.assert_array_equal(labels[row, -2:], items[place + 1])
    assert task.slots(4) == 8


def test_traversal_asks_where_the_edges_lead():
    task = TraversalTask(6, 2, 5, 4)
    inputs, labels = task.of_length(5, 0, 5, 20)
    edges = 10
    for row in range(20):
        told = {}
        for step in inputs[row, :edges]:
            source, label, target = (part.argmax() for part in np.split(step[:-1], [6, 8]))
            assert source != target and step.sum() == 3
            told[source, label] = target
        assert len(told) == edges
        node = inputs[row, edges, :6].argmax()
        for step in range(edges, edges + 4):
            node = told[node, inputs[row, step, 6:8].argmax()]
            assert labels[row, step].argmax() == node and labels[row, step].sum() == 1
    assert task.slots(5) == 10 and task.chance == 1 / 6


def test_wrong_counts_answers():
    labels = np.array([[[1.0, 0.0], [UNSCORED, UNSCORED], [0.0, 1.0]]])
    logits = np.array([[[2.0, 1.0], [9.0, 9.0], [-1.0, 3.0]]])
    assert CopyTask(2, 1).wrong(logits, labels).tolist() == [False, True, False, False]
    assert TraversalTask(2, 1, 2, 1).wrong(logits, labels).tolist() == [False, False]
    assert TraversalTask(2, 1, 2, 1).wrong(-logits, labels).tolist() == [True, True]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CopyTask(0, 5), "--bits"),
        (lambda: CopyTask(4, 0), "--length"),
        (lambda: RepeatCopyTask(4, 5, 0), "--repeats"),
        (lambda: RecallTask(4, 1, 2), "--length"),
        (lambda: RecallTask(4, 4, 0), "--item_length"),
        (lambda: RecallTask(1, 4, 1), "--bits"),
        (lambda: TraversalTask(4, 2, 5, 3), "--names"),
        (lambda: TraversalTask(6, 0, 5, 3), "--labels"),
        (lambda: TraversalTask(6, 2, 5, 0), "--walk"),
    ],
)
def test_what_cannot_be_drawn(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("seed, index, size", [(-1, 0, 1), (0, -1, 1), (0, 0, 0)])
def test_no_such_batch(seed, index, size):
    with pytest.raises(DataError, match="no such batch"):
        CopyTask(4, 5).batch(seed, index, size)
