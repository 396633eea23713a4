"""A saved model opened by TRL and lm-eval in a process that never imported this package."""

import json
import os
import subprocess
import sys

import torch

from andromeda import Andromeda, AndromedaTokenizer
from andromeda.huggingface import AndromedaForCausalLM

SIZES = {"num_tokens": 384, "max_seq_len": 64, "dim": 32, "depth": 1, "dim_head": 16, "heads": 2, "alibi_num_heads": 1}
CODE = """
import json, sys
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from trl import SFTConfig, SFTTrainer

folder, out = sys.argv[1:]
assert "andromeda" not in sys.modules
options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "max_length": 32, "disable_tqdm": True}
arguments = SFTConfig(out, model_init_kwargs={"trust_remote_code": True}, **options)
rows = Dataset.from_dict({"text": ["def add(a, b): return a + b"] * 8})
trained = SFTTrainer(model=folder, args=arguments, train_dataset=rows)
trained.train()
evaluated = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", batch_size=2)
print()
print(json.dumps([f"{type(model).__module__}.{type(model).__name__}" for model in (trained.model, evaluated.model)]))
"""


def test_trl_and_lm_eval_get_the_class_of_the_package_from_a_path(tmp_path):
    torch.manual_seed(0)
    AndromedaForCausalLM.from_andromeda(Andromeda(**SIZES)).save_pretrained(tmp_path / "model")
    AndromedaTokenizer.train(["def add(a, b):\n    return a + b\n"] * 40, 300).save(tmp_path / "model")
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model"), str(tmp_path / "out")],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr
    module = "andromeda.huggingface.modeling_andromeda.AndromedaForCausalLM"
    assert json.loads(result.stdout.splitlines()[-1]) == [module, module]
