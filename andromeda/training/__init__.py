"""Training and evaluation: transformers' Trainer runs the loop, and this package adds the guarantees of Andromeda:

* checkpoints that are whole or absent: each is written under `.partial/`, flushed, listed in a manifest with a checksum
  of each file, and renamed. A run that is killed at any moment leaves only whole `checkpoint-<step>` folders, and a run
  resumes only from one whose files have not changed since. The trained model is saved as `model/` in the same way;
* an error for a run whose loss, gradient norm or weights are no longer finite; it names the step. Nothing is saved
  then, so that every checkpoint on the disk has finite weights, which gave a finite loss when they were written;
* exact continuation: a resumed run ends as an uninterrupted one, bit for bit on a CPU, or is refused. For that, every
  checkpoint carries the settings of the run and a fingerprint of its data;
* orderly stops: a first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one, or one
  before the first step, stops at once;
* figures: a progress line (loss, tokens/s, time left, and model flops utilisation where the peak of the device is
  known) and a sample text every `sample_every` steps. `history.jsonl` holds the same figures, one JSON object per line:
  `step`, `loss`, `learning_rate`, `grad_norm` (before clipping) and `tokens_per_second` for each logged interval,
  `step` and `eval_loss` for each evaluation. A figure that is not finite is null, and after such a failure a line with
  `error` ends the file. A resumed run continues the lines up to its checkpoint.

`TrainSettings.trainer` passes all other arguments to Trainer. With `{"fsdp": True}` there, `torchrun` runs Trainer's
own distributed training.

Modules: `trainer` (`train` and the subclass of Trainer), `settings`, `rows` (of a data set), `model_checks`, `finite`
(numbers that must be finite), `checkpoints` and `manifest`, `saved_model`, `history`, `progress`, `stopping`,
`evaluation` (of rows), `exact_evaluation` (of whole documents), `run_card` (of the model).
"""

from andromeda.training.checkpoints import HISTORY, LEFT_BY_A_START, MODEL, check_saved_model, latest_checkpoint
from andromeda.training.evaluation import Evaluation, evaluate, token_bytes
from andromeda.training.exact_evaluation import DocumentLikelihood, ExactEvaluation, evaluate_documents
from andromeda.training.finite import nonfinite_parameters
from andromeda.training.manifest import MANIFEST, read_sealed, sealed
from andromeda.training.messages import first_few
from andromeda.training.model_checks import check_vocabulary
from andromeda.training.progress import peak_flops, sample_text, training_flops_per_token
from andromeda.training.rows import collate
from andromeda.training.run_card import run_card
from andromeda.training.saved_model import load_saved_model, seconds_per_step
from andromeda.training.settings import TrainSettings, of_hub
from andromeda.training.trainer import TrainResult, check_hub, train

__all__ = [
    "HISTORY",
    "LEFT_BY_A_START",
    "MANIFEST",
    "MODEL",
    "DocumentLikelihood",
    "Evaluation",
    "ExactEvaluation",
    "TrainResult",
    "TrainSettings",
    "check_hub",
    "check_saved_model",
    "check_vocabulary",
    "collate",
    "evaluate",
    "evaluate_documents",
    "first_few",
    "latest_checkpoint",
    "load_saved_model",
    "nonfinite_parameters",
    "of_hub",
    "peak_flops",
    "read_sealed",
    "run_card",
    "sample_text",
    "sealed",
    "seconds_per_step",
    "token_bytes",
    "train",
    "training_flops_per_token",
]
