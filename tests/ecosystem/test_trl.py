"""TRL's trainers on Andromeda, beside a Llama of the same size: the losses are those of the documents one by one."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

PAD, END = 0, 1
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": END,
}
TEXTS = ["the cat sat", "a dog", "on the mat it sat down", "so it goes"]
FAMILIES = pytest.mark.parametrize("family", ["andromeda", "llama"])


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A function: the folder of a saved model of a family, with the tokenizer."""
    folders = {}

    def save(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            if family == "llama":
                model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64))
            else:
                model = AndromedaForCausalLM(AndromedaConfig(**SIZES, alibi_num_heads=2))
            model.save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture
def options(tmp_path):
    """Two short steps on the CPU."""
    return {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def load(folder, family):
    return AutoModelForCausalLM.from_pretrained(folder(family))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def token_losses(model, document):
    """The loss of each token of one document (n,) but the first, from the logits of a plain call."""
    logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
    return functional.cross_entropy(logits.float(), document[1:], reduction="none")


def documents(batch):
    """The documents of a batch of TRL, padded or packed."""
    if "attention_mask" in batch:
        return [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    return list(batch["input_ids"][0].tensor_split(starts[1:]))


SFT_FORMS = {
    "default": {},
    "packing": {"packing": True, "max_length": 32, "per_device_train_batch_size": 2},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


@FAMILIES
@pytest.mark.parametrize("form", SFT_FORMS)
def test_sft(family, form, folder, tokenizer, options):
    trainer = SFTTrainer(
        load(folder, family),
        SFTConfig(**{**options, **SFT_FORMS[form]}),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    parts = [document for batch in batches for document in documents(batch)]
    assert sorted(tokenizer.decode(part[:-1]) for part in parts) == sorted(TEXTS)
    with torch.no_grad():
        expected = torch.cat([token_losses(trainer.model, part) for part in parts]).mean().item()
    trainer.train()
    losses = logged(trainer, "loss")
    if form != "label smoothing":
        assert losses[0] == pytest.approx(expected, abs=2e-5)
    assert len(losses) == 2 and losses[1] < losses[0]


@FAMILIES
def test_sft_with_an_adapter_and_a_path(family, folder, options):
    trainer = SFTTrainer(
        str(folder(family)),
        SFTConfig(**{**options, "gradient_checkpointing": True}),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=LoraConfig(target_modules="all-linear", r=4),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[1] < losses[0]
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


@FAMILIES
def test_dpo(family, folder, tokenizer, options):
    prompts, chosen, rejected = ["the ", "one more "], ["cat", "dog"], ["mat is flat", "no"]
    trainer = DPOTrainer(
        load(folder, family),
        args=DPOConfig(**{**options, "learning_rate": 1e-3}),
        train_dataset=Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected}),
        processing_class=tokenizer,
    )

    @torch.no_grad()
    def log_likelihood(prompt, answer):
        answer = [*tokenizer(answer).input_ids, END]
        document = torch.tensor(tokenizer(prompt).input_ids + answer)
        return -token_losses(trainer.model, document)[-len(answer) :].sum().item()

    expected = {
        "logps/chosen": sum(map(log_likelihood, prompts, chosen)) / 2,
        "logps/rejected": sum(map(log_likelihood, prompts, rejected)) / 2,
    }
    trainer.train()
    for name, value in expected.items():
        assert logged(trainer, name)[0] == pytest.approx(value, abs=1e-4)
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # the model is its own reference at first
    assert losses[1] < losses[0]


@FAMILIES
def test_grpo(family, folder, tokenizer, options):
    """Prompts are padded on the left, completions on the right, in one row."""
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(len(text.encode())) + index for index, text in enumerate(completions)]

    trainer = GRPOTrainer(
        load(folder, family),
        reward,
        args=GRPOConfig(**options, num_generations=2, max_completion_length=5, beta=0.1),
        train_dataset=Dataset.from_dict({"prompt": ["the cat", "a", "so it", "on the mat"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen) == 8
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)  # the model is its own reference at first
    assert min(logged(trainer, "grad_norm")) > 0

    rows = [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]
    ids, mask = torch.full((4, 30), PAD), torch.zeros(4, 30, dtype=torch.long)
    for row, (left, document) in enumerate(zip((0, 4, 3, 1), rows, strict=True)):
        ids[row, left : left + len(document)], mask[row, left : left + len(document)] = document, 1
    labels = ids.masked_fill(mask == 0, -100)
    model = trainer.model.eval()
    with torch.no_grad():
        log_probs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        for row, document in enumerate(rows):
            start = int(mask[row].argmax())
            found = log_probs[row, start : start + len(document) - 1]
            torch.testing.assert_close(found, -token_losses(model, document), rtol=1e-4, atol=1e-4)


@FAMILIES
def test_kto(family, folder, tokenizer, options):
    trainer = KTOTrainer(
        load(folder, family),
        args=KTOConfig(**{**options, "learning_rate": 1e-3}),
        train_dataset=Dataset.from_dict(
            {
                "prompt": ["the ", "one more ", "so ", "it "],
                "completion": ["cat", "dog", "it goes", "is"],
                "label": [True, False, True, False],
            }
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-5)  # the model is its own reference at first
    assert losses[1] < losses[0]


@FAMILIES
def test_reward(family, folder, tokenizer, options):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder(family), num_labels=1)
    pairs = {"chosen": ["the cat sat", "a dog"], "rejected": ["no", "on the mat it"], "margin": [0.5, 0.0]}
    trainer = RewardTrainer(
        model, args=RewardConfig(**options), train_dataset=Dataset.from_dict(pairs), processing_class=tokenizer
    )

    @torch.no_grad()
    def score(text):
        document = torch.tensor([[*tokenizer(text).input_ids, END]])
        return model.eval()(input_ids=document, use_cache=False).logits.item()

    expected = [
        math.log1p(math.exp(score(rejected) - score(chosen) + margin))
        for chosen, rejected, margin in zip(*pairs.values(), strict=True)
    ]
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert losses[1] < losses[0]
