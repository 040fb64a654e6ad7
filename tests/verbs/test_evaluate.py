from ijepa_scale.evals import tasks
from ijepa_scale.verbs import evaluate


def test_help_lists_the_tasks_that_there_are():
    """The verb names them itself, as --help is not to wait for torch."""
    assert list(evaluate.TASKS) == list(tasks.TASKS)
