"""Training, generation and checkpoints in two processes, against one process with the same rows."""

import functools
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

SIZES = {
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "alibi_num_heads": 2,
}
STEPS = 20
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PARALLEL = {"one-key-head": {}, "all-key-heads": {"num_key_value_heads": 4}, "tied": {"tie_word_embeddings": True}}


def new_model(**options):
    """A model whose heads have scales of their own."""
    torch.manual_seed(0)
    model = AndromedaForCausalLM(AndromedaConfig(**SIZES | options))
    for parameter in model.parameters():
        if parameter.ndim == 3:
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    return model.train()


def rows(step):
    return torch.randint(SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, select=slice(None)):
    """select: the rows of this process."""
    losses = []
    for step in range(STEPS):
        tokens = rows(step)[select]
        loss = processes.whole(model(input_ids=tokens, labels=tokens).loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def distance(one, other):
    """The largest difference of the parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - processes.whole(b)).abs().max().item() for a, b in pairs)


@functools.cache
def trained():
    """A model that has learnt in one process."""
    model = new_model()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    return model


def run_data_parallel(**options):
    model = new_model()
    wrapped = DistributedDataParallel(model, **options)
    train(wrapped, torch.optim.AdamW(model.parameters(), lr=1e-3), slice(dist.get_rank(), dist.get_rank() + 1))
    return distance(trained(), model)


def run_sharded(whole=False):
    """whole: only the model, not also each sub-layer."""
    model, mesh = new_model(), init_device_mesh("cpu", (2,))
    for layer in () if whole else model.transformer.attn_layers.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), slice(dist.get_rank(), dist.get_rank() + 1))
    return distance(trained(), model)


def saved(model, folder):
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return folder


def run_tensor_parallel(folder, options):
    """Differences of logits, of parameters after training and after saving, and whether texts are the same."""
    one = new_model(**options)
    other = AndromedaForCausalLM.from_pretrained(saved(one, folder / "one"), tp_plan="auto").train()
    tokens = rows(0)[:, :6]
    with torch.no_grad():
        logits = [processes.whole(model(tokens, attention_mask=PADDED).logits)[PADDED > 0] for model in (one, other)]
    weight = other.transformer.attn_layers.layers[0].fn.to_q.weight
    local = getattr(weight, "_local_tensor", weight).shape[0]
    for model in (one, other):
        train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    step = distance(one, other)
    prompt = {"attention_mask": PADDED, "max_new_tokens": 8, "pad_token_id": 0}
    texts = [
        [
            model.eval().generate(tokens, **prompt, **how)
            for how in ({"do_sample": False}, {"do_sample": False, "use_cache": False}, {"num_beams": 2})
        ]
        for model in (one, other)
    ]
    other.save_pretrained(folder / "two")
    dist.barrier()
    loaded = AndromedaForCausalLM.from_pretrained(folder / "two")
    again = AndromedaForCausalLM.from_pretrained(folder / "two", tp_plan="auto")
    return {
        "rows of to_q": local,
        "logits": (logits[0] - logits[1]).abs().max().item(),
        "parameters": step,
        "texts": all(map(torch.equal, *texts)),
        "saved": max(distance(loaded, other), distance(loaded, again)),
    }


def run_sharded_by_transformers(folder):
    """Fully sharded by the plan of the config; each process has its row."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(fsdp_size=2)
    model = AndromedaForCausalLM.from_pretrained(saved(new_model(), folder), distributed_config=config).train()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), slice(dist.get_rank(), dist.get_rank() + 1))
    return distance(trained(), model)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("two"))
    cases = {
        "ddp": run_data_parallel,
        "ddp-static-graph": functools.partial(run_data_parallel, static_graph=True),
        "fsdp-sublayers": run_sharded,
        "fsdp-whole": functools.partial(run_sharded, whole=True),
        "fsdp-plan": functools.partial(run_sharded_by_transformers, folder / "fsdp"),
    }
    for name, options in PARALLEL.items():
        cases[f"tp-{name}"] = functools.partial(run_tensor_parallel, folder / name, options)
    return processes.run_in_two(cases, folder)


@pytest.mark.parametrize("name", ["ddp", "ddp-static-graph", "fsdp-sublayers", "fsdp-whole", "fsdp-plan"])
def test_training_on_the_rows_of_two_processes(name, results):
    assert max(processes.checked(results[name])) < 1e-5


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallel_plan(name, results):
    for result in processes.checked(results[f"tp-{name}"]):
        assert result["rows of to_q"] == 16, "half of the heads"
        assert result["logits"] < 5e-6 and result["parameters"] < 1e-5
        assert result["texts"] and result["saved"] == 0


def test_plans_name_parts_of_the_model():
    """Every rule applies somewhere, and one key head stays whole."""
    for options in PARALLEL.values():
        model = new_model(**options)
        names = {name for name, _ in model.named_modules()}
        for rule in (*model.tp_plan, *model.fsdp_plan):
            layers = range(2 * SIZES["num_hidden_layers"])
            assert names.intersection(rule.replace("*", str(layer)) for layer in layers), rule
        whole = model.config.num_key_value_heads == 1
        assert any("to_k" in rule or "to_v" in rule for rule in model.tp_plan) is not whole
