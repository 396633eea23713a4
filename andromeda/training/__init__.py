"""Training and evaluation: transformers' Trainer does the work, this module says how Andromeda wants it.

What is added to Trainer:

* checkpoints that are whole or absent: written under `.partial/`, flushed, listed in a manifest with a checksum of each
  file and renamed. A run that is killed at any moment leaves only whole `checkpoint-<step>` folders, and only those
  whose files are still as they were written are resumed from. The trained model is saved as `model/` in the same way;
* a run whose loss, gradient norm or weights are no longer finite ends with an error that names the step. It saves
  nothing, so that every checkpoint on the disk has finite weights, which gave a finite loss when it was written;
* a resumed run does what an uninterrupted one would have done, bit for bit on a CPU, or refuses: every checkpoint
  carries the settings and a fingerprint of the data that its continuation needs;
* a first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one, or one before the training
  proper, stops at once;
* a progress line (loss, tokens/s, time left, and model flops utilisation where the peak of the device is known), a
  sample text every `sample_every` steps, and the same figures in `history.jsonl`: one JSON object per line, with
  `step`, `loss`, `learning_rate`, `grad_norm` (before clipping) and `tokens_per_second` for each logged interval, with
  `step` and `eval_loss` for each evaluation. A figure that is not finite is null, and a line with `error` ends a run
  that failed so. A resumed run goes on with the lines up to its checkpoint.

Everything of Trainer that is not named in `TrainSettings` is reached through `TrainSettings.trainer`: distributed
training is `torchrun` with `{"fsdp": True}`, nothing of it is made here.
"""

from andromeda.training.checkpoints import HISTORY, LEFT_BY_A_START, MODEL, check_saved_model, latest_checkpoint
from andromeda.training.evaluation import Evaluation, evaluate, token_bytes
from andromeda.training.finite import nonfinite_parameters
from andromeda.training.manifest import MANIFEST, read_sealed, sealed
from andromeda.training.messages import first_few
from andromeda.training.model_checks import check_vocabulary
from andromeda.training.progress import peak_flops, sample_text, training_flops_per_token
from andromeda.training.rows import collate
from andromeda.training.settings import TrainSettings
from andromeda.training.trainer import TrainResult, train

__all__ = [
    "HISTORY",
    "LEFT_BY_A_START",
    "MANIFEST",
    "MODEL",
    "Evaluation",
    "TrainResult",
    "TrainSettings",
    "check_saved_model",
    "check_vocabulary",
    "collate",
    "evaluate",
    "first_few",
    "latest_checkpoint",
    "nonfinite_parameters",
    "peak_flops",
    "read_sealed",
    "sample_text",
    "sealed",
    "token_bytes",
    "train",
    "training_flops_per_token",
]
