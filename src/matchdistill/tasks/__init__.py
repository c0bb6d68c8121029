"""The tasks. Everything that differs between them is in one folder each; the table is all that names them."""

from matchdistill.tasks.classification.task import Classification
from matchdistill.tasks.detection.task import Detection
from matchdistill.tasks.features.task import Features
from matchdistill.tasks.moco.task import Moco
from matchdistill.tasks.multilabel.task import Multilabel
from matchdistill.tasks.segmentation.task import Segmentation
from matchdistill.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), Multilabel(), Detection(), Segmentation(), Features(), Moco())
}
