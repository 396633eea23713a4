"""Operators on DTensors, and attention with a part of the heads, in two processes."""

import copy
import functools
import subprocess
import sys

import processes
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import andromeda
from andromeda import generation
from andromeda.ops import attention as attention_op
from andromeda.ops import feed_forward as feed_forward_op
from andromeda.ops import linear_cross_entropy as loss_op
from andromeda.ops import qk_norm_rotary as rotary_op
from andromeda.ops import token_shift_norm as shift_op

BATCH, SEQLEN, HEADS, DIM, TOKENS = 2, 6, 4, 16, 20
SHAPES = {
    "attention": {
        "q": (BATCH, SEQLEN, HEADS, DIM),
        "k": (BATCH, SEQLEN, 1, DIM),
        "v": (BATCH, SEQLEN, 1, DIM),
    },
    "qk_norm_rotary": {
        "q": (BATCH, SEQLEN, HEADS, DIM),
        "k": (BATCH, SEQLEN, 1, DIM),
        "q_scale": (HEADS, DIM),
        "k_scale": (1, DIM),
    },
    "token_shift_norm": {
        "x": (BATCH, SEQLEN, DIM),
        "residual": (BATCH, SEQLEN, DIM),
        "residual_scale": (DIM,),
        "gamma": (DIM,),
    },
    "feed_forward": {
        "x": (BATCH, SEQLEN, DIM),
        "weight_in": (32, DIM),
        "bias_in": (32,),
        "weight_out": (DIM, 32),
        "bias_out": (DIM,),
    },
    "linear_cross_entropy": {"hidden": (BATCH, SEQLEN, DIM), "weight": (TOKENS, DIM)},
}
CONSTANTS = {
    "attention": lambda: {
        "alibi_slopes": torch.rand(HEADS),
        "logit_bound": torch.full((HEADS,), 100.0),
        "key_start": torch.tensor([[0, 0, 0, 3, 3, 3], [0, 1, 1, 1, 1, 1]], dtype=torch.int32),
    },
    "linear_cross_entropy": lambda: {"targets": torch.randint(TOKENS, (BATCH, SEQLEN))},
}
OPERATIONS = {
    "attention": functools.partial(attention_op.attention, causal=True),
    "qk_norm_rotary": functools.partial(rotary_op.qk_norm_rotary, rotary_dim=8, xpos=True),
    "token_shift_norm": functools.partial(shift_op.token_shift_norm, alpha=1.5),
    "feed_forward": feed_forward_op.feed_forward,
    "linear_cross_entropy": loss_op.linear_cross_entropy,
}
KEYS = {"k": (BATCH, SEQLEN, HEADS, DIM), "v": (BATCH, SEQLEN, HEADS, DIM)}
PAIRS = {"k": (BATCH, SEQLEN, 2, DIM), "v": (BATCH, SEQLEN, 2, DIM)}

# (operation, the axis of each sharded argument, the placements of the results: an axis, "sum" or None for whole, and
# further: other shapes, options). What is not named is whole in both processes.
CASES = {
    "attention-whole": ("attention", {}, [None], {}),
    "attention-batch": ("attention", {"q": 0, "k": 0, "v": 0, "key_start": 0}, [0], {}),
    "attention-heads": ("attention", {"q": 2, "alibi_slopes": 0, "logit_bound": 0}, [2], {}),
    "attention-heads-whole-slopes": ("attention", {"q": 2}, [2], {}),
    "attention-all-key-heads": ("attention", {"q": 2, "k": 2, "v": 2}, [2], {"shapes": KEYS}),
    "attention-key-heads-of-pairs": ("attention", {"q": 2, "k": 2, "v": 2}, [2], {"shapes": PAIRS}),
    "attention-queries": ("attention", {"q": 1}, [None], {}),
    "qk_norm_rotary-batch": ("qk_norm_rotary", {"q": 0, "k": 0}, [0, 0], {}),
    "qk_norm_rotary-heads": ("qk_norm_rotary", {"q": 2, "q_scale": 0}, [2, None], {}),
    "qk_norm_rotary-tokens": ("qk_norm_rotary", {"q": 1, "k": 1}, [None, None], {}),
    "token_shift_norm-batch": ("token_shift_norm", {"x": 0, "residual": 0}, [0, 0], {"shift": 2}),
    "token_shift_norm-tokens": ("token_shift_norm", {"x": 1, "residual": 1}, [1, 1], {}),
    "token_shift_norm-shifted-tokens": ("token_shift_norm", {"x": 1, "residual": 1}, [None, None], {"shift": 2}),
    "feed_forward-batch": ("feed_forward", {"x": 0}, [0], {}),
    "feed_forward-tokens": ("feed_forward", {"x": 1}, [1], {}),
    "feed_forward-hidden": ("feed_forward", {"weight_in": 0, "bias_in": 0, "weight_out": 1}, ["sum"], {}),
    "linear_cross_entropy-batch": ("linear_cross_entropy", {"hidden": 0, "targets": 0}, ["sum"], {}),
    "linear_cross_entropy-vocabulary": ("linear_cross_entropy", {"weight": 0}, [None], {}),
}


@functools.cache
def mesh():
    return init_device_mesh("cpu", (2,))


def distributed(tensor, axis):
    placement = Replicate() if axis is None else Shard(axis)
    return distribute_tensor(tensor, mesh(), [placement])


def placement(tensor):
    (found,) = tensor.placements
    return "sum" if found.is_partial() else found.dim if found.is_shard() else None


def run_operation(operation, axes, shapes=None, **options):
    """The placements of the results, which and whose gradients are those of one process."""
    tensors = {name: torch.randn(shape) for name, shape in (SHAPES[operation] | (shapes or {})).items()}
    constants = CONSTANTS.get(operation, dict)()
    alone = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    together = {name: distributed(tensor, axes.get(name)).requires_grad_() for name, tensor in tensors.items()}
    function = functools.partial(OPERATIONS[operation], **options)
    expected = function(**alone, **constants)
    found = function(**together, **{name: distributed(tensor, axes.get(name)) for name, tensor in constants.items()})
    expected, found = (x if isinstance(x, tuple) else (x,) for x in (expected, found))
    douts = [torch.randn_like(x) for x in expected]
    torch.autograd.backward(expected, douts)
    torch.autograd.backward(found, [distributed(dout, None) for dout in douts])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other.full_tensor(), one)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name].grad.full_tensor(), tensor.grad)
    return [placement(x) for x in found]


def run_frozen():
    """A call with other gradients is another program, which the remembered strategies must not confuse."""
    for frozen in ({"weight_in", "bias_in"}, set(), {"x"}, {"weight_in"}):
        gradients = []
        torch.manual_seed(1)
        tensors = {name: torch.randn(shape) for name, shape in SHAPES["feed_forward"].items()}
        for place in (torch.clone, functools.partial(distributed, axis=None)):
            leaves = {name: place(tensor).requires_grad_(name not in frozen) for name, tensor in tensors.items()}
            feed_forward_op.feed_forward(**leaves).sum().backward()
            gradients.append({name: leaf.grad for name, leaf in leaves.items()})
        for name in SHAPES["feed_forward"]:
            one, other = (found[name] for found in gradients)
            assert (one is None) == (other is None) == (name in frozen)
            if one is not None:
                torch.testing.assert_close(other.full_tensor(), one)


def run_unequal_parts():
    """Three heads for two processes; a mesh of two axes."""
    q, k, v = torch.randn(3, SEQLEN, 3, DIM), torch.randn(3, SEQLEN, 1, DIM), torch.randn(3, SEQLEN, 1, DIM)
    expected = attention_op.attention(q, k, v, causal=True)
    two_axes = init_device_mesh("cpu", (1, 2))
    places = [
        (mesh(), [Shard(2)], [Replicate()]),
        (mesh(), [Shard(0)], [Shard(0)]),
        (two_axes, [Shard(0), Shard(2)], [Shard(0), Replicate()]),
    ]
    for where, of_q, of_k in places:
        keys = (distribute_tensor(x, where, of_k) for x in (k, v))
        found = attention_op.attention(distribute_tensor(q, where, of_q), *keys, causal=True)
        assert found.placements == tuple(of_q)
        torch.testing.assert_close(found.full_tensor(), expected)


def run_compiled():
    tensors = {name: torch.randn(shape) for name, shape in SHAPES["attention"].items()}
    gradients, eager = [], OPERATIONS["attention"]
    for function in (eager, torch.compile(eager, fullgraph=True, backend="aot_eager")):
        leaves = {name: distributed(x, 2 if name == "q" else None).requires_grad_() for name, x in tensors.items()}
        out = function(**leaves)
        assert placement(out) == 2
        out.sum().backward()
        gradients.append([leaf.grad.full_tensor() for leaf in leaves.values()])
    torch.testing.assert_close(*gradients)


SIZES = {"num_tokens": 64, "max_seq_len": 64, "dim": 32, "depth": 2, "dim_head": 8, "heads": 4, "alibi_num_heads": 2}
MODELS = {
    "default": {"depth": 2},
    "all-key-heads": {"attn_one_kv_head": False},
    "whole-key-heads": {"attn_one_kv_head": False},  # each process takes its own of them
    "no-norm": {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
    "no-scales": {"attn_qk_norm_dim_scale": False},
    "pre-norm": {"deepnorm": False, "alibi_pos_bias": False, "alibi_num_heads": None, "rotary_xpos": False},
}


def new_model(**options):
    """A model whose heads have scales of their own."""
    torch.manual_seed(0)
    model = andromeda.Andromeda(**SIZES | options)
    for parameter in model.parameters():
        if parameter.ndim == 3:
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    return model


def in_parts(model, more=()):
    """A copy of which each of two processes has half of the heads and hidden units."""
    plan = {"transformer.to_logits": ColwiseParallel(output_layouts=Replicate())}
    for index, layer in enumerate(model.transformer.attn_layers.layers):
        name = f"transformer.attn_layers.layers.{index}.fn."
        first, last = ("to_q", "to_out") if index % 2 == 0 else ("proj_in", "proj_out")
        plan |= {name + first: ColwiseParallel(), name + last: RowwiseParallel()}
        plan |= {name + key: ColwiseParallel() for key in more if hasattr(layer.fn, key)}
    return parallelize_module(copy.deepcopy(model), mesh(), plan)


def compare_steps(one, other, steps=20):
    """The largest differences of the first gradients, relative, and of the parameters after some steps."""
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (one, other)]
    gradients = {}
    for step in range(steps):
        tokens = torch.randint(SIZES["num_tokens"], (2, 12), generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((one, other), optimizers, strict=True):
            optimizer.zero_grad()
            processes.whole(model(tokens, return_loss=True)).backward()
        if step == 0:
            gradients = differences(one, other, lambda p: p.grad, relative=True)
        for optimizer in optimizers:
            optimizer.step()
    return max(gradients.values()), max(differences(one, other, torch.Tensor.detach).values())


def differences(one, other, of, relative=False):
    found = {}
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        expected = of(a)
        found[name] = (expected - processes.whole(of(b))).abs().max().item()
        if relative:
            found[name] /= expected.abs().max().item()
    return found


def run_model(name):
    one = new_model(**{"depth": 1} | MODELS[name])
    other = in_parts(one, more=("to_k", "to_v") if name == "all-key-heads" else ())
    prompt = torch.arange(5)[None]
    texts = [processes.whole(model.generate(prompt, 5, temperature=0.0)) for model in (one, other)]
    assert torch.equal(*texts)
    return compare_steps(one, other, steps=20 if name == "default" else 2)


def run_compiled_model():
    """One graph, with the gradients of the model that is not compiled."""
    one = new_model(depth=1)
    other = in_parts(one)
    tokens = torch.arange(12)[None]
    one(tokens, return_loss=True).backward()
    torch.compile(other, fullgraph=True, backend="aot_eager")(tokens, return_loss=True).backward()
    return max(differences(one, other, lambda p: p.grad, relative=True).values())


def run_refusals():
    """The messages for parts that are no whole heads, and for parts of unknown heads."""
    tokens, messages = torch.arange(12)[None], []
    local = new_model()
    local.transformer.attn_layers.layers[0].fn.to_q = torch.nn.Linear(32, 16)
    sharded = new_model()
    attention = sharded.transformer.attn_layers.layers[0].fn
    parallelize_module(attention, mesh(), {"to_q": ColwiseParallel(use_local_output=False)})
    for model in (in_parts(new_model(), more=("to_k",)), sharded, local):
        with pytest.raises(ValueError) as error:
            model(tokens)
        messages.append(str(error.value))
    model = in_parts(new_model())
    prefix = generation.Cache()
    prefix.begin_with([(torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8)) for _ in range(SIZES["depth"])])
    for call in (lambda: model(tokens, cache=prefix), lambda: model.save("never written")):
        with pytest.raises(ValueError) as error:
            call()
        messages.append(str(error.value))
    return messages


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    cases = {name: functools.partial(run_operation, op, axes, **more) for name, (op, axes, _, more) in CASES.items()}
    cases |= {f"model-{name}": functools.partial(run_model, name) for name in MODELS}
    cases |= {
        "frozen": run_frozen,
        "unequal": run_unequal_parts,
        "compiled": run_compiled,
        "compiled-model": run_compiled_model,
        "refusals": run_refusals,
    }
    return processes.run_in_two(cases, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_operations_on_dtensors(name, results):
    """Results and gradients are those of one process, and sharded arguments stay so."""
    assert processes.checked(results[name]) == [CASES[name][2]] * 2


@pytest.mark.parametrize("name", ["frozen", "unequal", "compiled"])
def test_dtensors(name, results):
    processes.checked(results[name])


@pytest.mark.parametrize("name", MODELS)
def test_tensor_parallel_models(name, results):
    """Gradients and further steps are those of one process, and so is the text."""
    for gradient, step in processes.checked(results[f"model-{name}"]):
        assert gradient < 5e-6 and step < 1e-5


def test_a_compiled_tensor_parallel_model(results):
    assert max(processes.checked(results["compiled-model"])) < 5e-6


def test_refusals(results):
    for part_of_key, not_local, unknown, prefix, saved in processes.checked(results["refusals"]):
        assert part_of_key.startswith("Attention: to_k must give heads of 8 numbers in a plain tensor, got 4 numbers")
        assert "got a DTensor" in not_local and "use_local_output=True" in not_local
        assert unknown.startswith("Attention: to_q must give heads=4 heads, or an equal part") and "got 2" in unknown
        assert prefix.startswith("Attention: past_key_values must not begin with a learned prefix under tensor")
        assert saved.startswith("Andromeda.save: parameters must be whole, got parts of")


IMPORT = """
import sys
import torch
import andromeda
from andromeda.ops import attention as op
assert "torch.distributed.tensor" not in sys.modules
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = init_device_mesh("cpu", (2,))
q = DTensor.from_local(torch.randn(1, 4, 2, 8), mesh, [Replicate()])
# The operator itself, as exported programs call it.
out, lse = op.FORWARD(q, q, q, None, None, None, True, 1.0, "auto")
assert out.placements == (Replicate(),)
"""


def test_dtensors_may_be_imported_later():
    """The package does not import torch.distributed.tensor, which takes long. (Here, it is imported first.)"""
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
