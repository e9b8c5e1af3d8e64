"""Fine-tuning: train a converted network, or any other; a run can be resumed at the exact step.

In come a network, labelled or unlabelled images, and settings; out come the trained network, checkpoints, a log, and
the network's metrics before and after.
"""

from cadsurgery.finetune.adapter_fitting import RefinementFit, calibrate_means, fit_refinement
from cadsurgery.finetune.batches import augmentation
from cadsurgery.finetune.blend import Blend, calibrate
from cadsurgery.finetune.learning_rates import Draw
from cadsurgery.finetune.logs import Row
from cadsurgery.finetune.loop import Outcome, fit
from cadsurgery.finetune.objectives import Objective, list_objectives, objective
from cadsurgery.finetune.validation import evaluate
from cadsurgery.tasks.task_options import Settings
