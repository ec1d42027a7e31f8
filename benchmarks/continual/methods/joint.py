"""Joint: for each new task, one model is retrained from the pretrained weights on all rows of all tasks so far.

The upper bound of continual learning with one model: no task comes after another. All rows are kept.

Epochs are passes over all rows so far, as many as the options give for that number of rows. With three epochs, the last
of five models sees each row of each task three times, and the five trainings pass 3 (1 + 2 + 3 + 4 + 5) tasks.
"""

from __future__ import annotations

from benchmarks.continual.methods.memory import Remembering
from slm_fast.data import Task


class Joint(Remembering):
    """A `Method`."""

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.memory.keep(task.name, task.rows)
        self.model = self.pretrained()
        self.model.fit(task.name, self.memory.rows, self.options, progress)
