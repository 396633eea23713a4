"""torch.compile: one graph of a whole model, forward and backward, that suits CUDA graphs."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments, default_data_collator

import andromeda.model
from andromeda import Andromeda
from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM
from andromeda.huggingface.cache_andromeda import AndromedaStaticCache
from andromeda.ops import _checks

SIZES = {"num_attention_heads": 2, "head_dim": 16, "alibi_num_heads": 1, "hidden_size": 32, "num_hidden_layers": 1}
VOCABULARY = 29
LENGTHS = (9, 17, 40, 33, 12)


def new(**options):
    torch.manual_seed(0)
    return AndromedaForCausalLM(AndromedaConfig(vocab_size=VOCABULARY, **SIZES | options))


def batch_of(n, device="cpu"):
    """Two rows, the first with two tokens of padding."""
    tokens = torch.randint(VOCABULARY, (2, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(model, found, expected):
    """The losses, and each gradient relative to its largest entry, differ by at most 1e-6."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found, expected = gradients(model, found), gradients(model, expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max()), name


def test_five_lengths_share_a_graph(monkeypatch):
    """Forward and backward, with padding and labels."""
    monkeypatch.setenv("CI", "true")  # where it is set, Inductor is stricter
    torch.compiler.reset()
    model = new().train()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for n in LENGTHS:
        batch = batch_of(n)
        for tensor in batch.values():
            torch._dynamo.mark_dynamic(tensor, 1)
        assert_equal_gradients(model, compiled(**batch).loss, model(**batch).loss)
    assert counter.frame_count == 1


def test_five_lengths_share_a_dynamic_graph():
    torch.compiler.reset()
    model = Andromeda(VOCABULARY, heads=2, dim_head=16, alibi_num_heads=1, dim=32, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    compiled(batch_of(LENGTHS[0])["input_ids"])
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in LENGTHS:
            tokens = batch_of(n)["input_ids"]
            torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-6, atol=1e-6)


def test_other_values_need_no_other_program():
    torch.compiler.reset()
    model = new()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    batch, other = batch_of(9), batch_of(9)
    other["attention_mask"] = 1 - other["attention_mask"].flip(1)
    other["attention_mask"][1, -1] = 1  # each row must see a token
    other["attention_mask"][0, 7:] = 1
    other["input_ids"] = other["input_ids"].flip(1)
    other["labels"][:, 4:] = -100
    compiled(**batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(**other).loss, model(**other).loss)


START = torch.tensor([[0] * 9, [0] * 4 + [4] * 5], dtype=torch.int32)
POSITIONS = torch.tensor([[*range(9)], [*range(4), *range(5)]])
CAUSAL = (torch.arange(9)[:, None] >= torch.arange(9)).expand(2, 1, 9, 9)
CALLS = {
    "no mask": lambda model, batch: model(batch["input_ids"]).logits,
    "key_start": lambda model, batch: model(batch["input_ids"], key_start=START, labels=batch["labels"]).loss,
    "position_ids": lambda model, batch: model(batch["input_ids"], position_ids=POSITIONS).logits,
    "a mask of four axes": lambda model, batch: model(batch["input_ids"], attention_mask=CAUSAL).logits,
    "embeddings": lambda model, batch: model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"])).logits,
    "hidden states": lambda model, batch: model(batch["input_ids"], output_hidden_states=True).hidden_states[0],
    "a shared mean": lambda model, batch: model(**batch, num_items_in_batch=torch.tensor(40)).loss,
    "kept positions": lambda model, batch: model(batch["input_ids"], logits_to_keep=torch.tensor([0, 3])).logits,
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_compiled(name):
    torch.compiler.reset()
    model, batch, call = new().eval(), batch_of(9), CALLS[name]
    with torch.no_grad():
        found = torch.compile(call, fullgraph=True, backend="eager")(model, batch)
        torch.testing.assert_close(found, call(model, batch), rtol=1e-6, atol=1e-6)


def test_activation_checkpointing_under_autocast_is_one_graph():
    torch.compiler.reset()
    model, batch = new().train(), batch_of(9)
    model.gradient_checkpointing_enable()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = compiled(**batch).loss, model(**batch).loss
    torch.testing.assert_close(found, expected)
    found, expected = gradients(model, found), gradients(model, expected)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-2 * gradient.norm(), name
    assert counter.frame_count == 1


def test_a_default_device_does_not_end_the_graph():
    torch.compiler.reset()
    model, tokens = new().eval(), batch_of(9)["input_ids"]
    with torch.device("cpu"), torch.no_grad():  # as after torch.set_default_device
        found = torch.compile(model, fullgraph=True, backend="eager")(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits)


def test_lengths_of_several_segments(monkeypatch):
    torch.compiler.reset()
    model = new().eval()
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for n in (16, 40):
            batch = batch_of(n)
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


def test_trainer_compiles_one_graph_for_batches_of_any_length(tmp_path):
    losses = {}
    for compiled in (False, True):
        torch.compiler.reset()
        stats = torch._dynamo.utils.counters["stats"]
        stats.clear()
        arguments = TrainingArguments(
            str(tmp_path / str(compiled)),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
        )
        rows = [batch_of(n) for n in (12, 12, 15, 15, 15, 15, 18, 18)]
        data = [{name: tensor[index % 2] for name, tensor in row.items()} for index, row in enumerate(rows)]
        trainer = Trainer(new(), arguments, train_dataset=data, data_collator=default_data_collator)
        trainer._get_train_sampler = lambda *_: None  # in order, so that a batch has one length
        trainer.train()
        losses[compiled] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert stats["unique_graphs"] <= 2 * compiled, stats  # one for the first length, one for all others
    assert len(losses[True]) == 2
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-5, atol=0)


# ---- what a GPU needs: the device meta stands for it, since no value of it can be read back -------------------------


def test_the_graph_stays_on_the_device():
    """torch makes no CUDA graph of a program that uses the CPU or writes to its inputs."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = new().train()
    graphs = []

    def inspect(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=inspect, bw_compiler=inspect)
    torch.compile(model, fullgraph=True, backend=backend)(**batch_of(9, "meta")).loss.backward()
    assert len(graphs) == 2  # forward and backward
    for nodes in (graph.graph.nodes for graph in graphs):
        values = [node.meta.get("val") for node in nodes]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        assert len(tensors) > 50 and {tensor.device.type for tensor in tensors} == {"meta"}
        assert not any("copy_" in str(node.target) for node in nodes)


def test_the_graph_of_a_decoding_step_stays_on_the_device():
    """With a cache of fixed memory all tokens share one graph, which a CUDA graph can repeat."""
    torch.compiler.reset()
    with torch.device("meta"):
        model = new().eval()
    batch, cache, graphs = batch_of(9, "meta"), AndromedaStaticCache(32), []

    def inspect(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    step = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=inspect))
    with torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"], past_key_values=cache)
        for token in batch["input_ids"].split(1, dim=1):
            step(token, past_key_values=cache)
    assert len(graphs) == 1
    values = [node.meta.get("val") for node in graphs[0].graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert len(tensors) > 50 and {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("name", ["mask", "positions", "documents", "a mask of four axes", "decode"])
def test_a_step_reads_no_value_back(name, monkeypatch):
    """Each read would stall the GPU. The mask is checked in the first call on an empty cache only."""
    with torch.device("meta"):
        model = new()
    batch, labels = batch_of(9, "meta"), {"labels": batch_of(9, "meta")["labels"]}
    with torch.no_grad():
        cache = model.eval()(batch["input_ids"], batch["attention_mask"], use_cache=True).past_key_values
    asked = []

    def have_values(*tensors):
        asked.extend(tensor.device.type for tensor in tensors)
        return False

    for module in (_checks, andromeda.model, andromeda.huggingface.modeling_andromeda):
        monkeypatch.setattr(module, "have_values", have_values)
    monkeypatch.setattr(andromeda.huggingface.attention_masks, "have_values", have_values)
    steps = {
        "mask": lambda: model.train()(**batch),
        "positions": lambda: model.train()(batch["input_ids"], position_ids=POSITIONS.to("meta"), **labels),
        "documents": lambda: model.train()(batch["input_ids"], seq_idx=POSITIONS.to("meta"), **labels),
        "a mask of four axes": lambda: model.train()(batch["input_ids"], attention_mask=CAUSAL.to("meta"), **labels),
        "decode": lambda: model(
            batch["input_ids"][:, :1],
            attention_mask=torch.ones(2, 10, device="meta"),
            past_key_values=cache,
            logits_to_keep=1,
        ),
    }
    with torch.set_grad_enabled(name != "decode"):
        steps[name]()
    assert "meta" not in asked
