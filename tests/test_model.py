"""The model against golden data, against x-transformers, and against itself (docs/model.md#2, #11, #13, #15)."""

import copy
import gc
import itertools
import math
import pickle
import weakref

import golden_cases
import oracle
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional

import andromeda.model
import andromeda.ops._persistent
import andromeda.ops.attention
from andromeda import Andromeda, AndromedaEmbedding, AutoregressiveWrapper, Decoder, TransformerWrapper
from andromeda.checkpoint import x_transformers_names
from andromeda.config import read_key_start

# docs/model.md#15: dtype -> limits of the largest difference in logits, loss and gradients.
LIMITS = {torch.float64: (1e-10, 1e-10, 1e-10), torch.float32: (2e-5, 2e-6, 1e-6)}


def small(**arguments) -> Andromeda:
    return Andromeda(**(oracle.SMALL | arguments))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


# ---- golden data


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", golden_cases.CASES)
def test_golden(name, dtype):
    model, description, tensors = golden_cases.model(name, dtype)
    logits_limit, loss_limit, gradient_limit = LIMITS[dtype]
    assert largest(model(tensors["tokens"]), tensors["logits_f64"]) <= logits_limit
    loss = model(tensors["loss_tokens"], return_loss=True)
    assert abs(loss.item() - tensors["loss_f64"].item()) <= loss_limit
    loss.backward()
    parameters, names = dict(model.named_parameters()), x_transformers_names(model)
    assert len(description["gradients"]) == 4
    for key in description["gradients"]:
        assert largest(parameters[names[key]].grad, tensors[f"grads_f64/{key}"]) <= gradient_limit, key


@pytest.mark.parametrize("name", golden_cases.CASES)
def test_golden_bfloat16(name):
    model, description, tensors = golden_cases.model(name, torch.bfloat16)
    error = (model(tensors["tokens"]).double() - tensors["logits_f64"]).abs()
    assert error.max() <= 5e-2 and error.mean() <= 1e-2
    loss = model(tensors["loss_tokens"], return_loss=True)
    assert abs(loss.item() - tensors["loss_f64"].item()) <= 1e-2
    loss.backward()
    parameters, names = dict(model.named_parameters()), x_transformers_names(model)
    for key in description["gradients"]:
        expected = tensors[f"grads_f64/{key}"]
        assert largest(parameters[names[key]].grad, expected) <= 5e-2 * expected.abs().max().item(), key


# ---- the oracle


def combinations() -> list[dict]:
    """Every combination of the switches, with sizes that cycle through awkward values."""
    switches = ["use_abs_pos_emb", "alibi_pos_bias", "rotary_xpos", "deepnorm", "attn_one_kv_head", "norm"]
    switches.append("attn_qk_norm_dim_scale")
    sizes = itertools.cycle(
        dict(heads=heads, alibi_num_heads=alibi, dim=dim, dim_head=width, depth=depth, shift_tokens=shift, length=n)
        for heads, alibi, dim, width, depth, shift, n in (
            (2, 1, 24, 8, 1, 1, 17), (3, 3, 20, 8, 2, 0, 5), (1, 1, 24, 16, 1, 2, 2), (5, 3, 25, 8, 1, 1, 33),
            (4, None, 24, 12, 2, 3, 9), (6, 3, 30, 8, 1, 0, 24), (3, 0, 22, 32, 1, 2, 40), (2, 2, 16, 20, 3, 1, 3),
            (1, 0, 9, 8, 1, 1, 12), (4, 3, 31, 8, 1, 3, 31), (6, 5, 24, 16, 1, 1, 19),
        )
    )  # fmt: skip
    result = []
    for index, values in enumerate(itertools.product((True, False), repeat=len(switches))):
        flags = dict(zip(switches, values, strict=True))
        norm = flags.pop("norm")
        # Either of the two switches turns the normalisation off (docs/model.md#13.1).
        flags |= dict(qk_norm=norm or index % 3 == 0, attn_qk_norm=norm or index % 3 == 1)
        for attn_flash in (True, False):
            result.append(flags | next(sizes) | dict(attn_flash=attn_flash))
    return result


COMBINATIONS = combinations()


def test_enough_combinations():
    distinct = {tuple(sorted(case.items(), key=str)) for case in map(str_keys, COMBINATIONS)}
    assert len(distinct) == len(COMBINATIONS) >= 200


def str_keys(case: dict) -> dict:
    return {key: str(value) for key, value in case.items()}


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
def test_oracle(index):
    case = dict(COMBINATIONS[index])
    length = case.pop("length")
    torch.manual_seed(index)
    theirs = oracle.build_oracle(case)
    oracle.perturb(theirs)
    ours = small(**case)
    ours.load_x_transformers(theirs.state_dict())
    ours, theirs = ours.double(), oracle.widen(theirs, case)
    tokens = torch.randint(oracle.SMALL["num_tokens"], (1 + index % 3, length))
    assert largest(ours(tokens), theirs.net(tokens)) <= 1e-10
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.2, -100)
    labels[:, -1] = tokens[:, -1]
    our_loss, their_loss = ours(labels, return_loss=True), theirs(labels)
    assert abs(our_loss.item() - their_loss.item()) <= 1e-10
    our_loss.backward()
    their_loss.backward()
    for name, own, other in oracle.parameter_pairs(ours, theirs):
        gradient = torch.zeros_like(other) if other.grad is None else other.grad
        own_gradient = torch.zeros_like(own) if own.grad is None else own.grad
        assert largest(own_gradient, gradient) <= 1e-10, name


def test_length_matches_oracle_beyond_tiles():
    """Lengths with windows, several tiles and both kinds of heads in the compiled kernels, in float32."""
    case = dict(dim=32, dim_head=16, heads=4, alibi_num_heads=2, depth=1, max_seq_len=900)
    theirs = oracle.build_oracle(case)
    oracle.perturb(theirs)
    ours = small(**case)
    ours.load_x_transformers(theirs.state_dict())
    tokens = torch.randint(oracle.SMALL["num_tokens"], (1, 900))
    exact = oracle.widen(theirs, case)
    expected = exact.net(tokens)
    assert largest(ours(tokens), expected) <= 2e-5 * max(1.0, expected.abs().max().item())
    ours(tokens, return_loss=True).backward()
    exact(tokens).backward()
    for name, own, other in oracle.parameter_pairs(ours, exact):
        assert largest(own.grad, other.grad) <= 1e-5 * max(0.1, other.grad.abs().max().item()), name


# ---- laws


FLAGS = {
    "defaults": {},
    "prenorm": dict(deepnorm=False),
    "plain": dict(alibi_pos_bias=False, rotary_xpos=False, qk_norm=False, shift_tokens=0),
    "multi_head": dict(attn_one_kv_head=False, attn_qk_norm_dim_scale=False, shift_tokens=2),
    "absolute": dict(use_abs_pos_emb=True),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_later_tokens_change_nothing_before(flags):
    model = small(**flags, depth=2).double()
    tokens = torch.randint(23, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 23
    assert torch.equal(model(tokens)[:, :12], model(changed)[:, :12])


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_documents_are_separate(flags):
    """key_start hides earlier documents in attention and token shift, and restarts absolute positions."""
    model = small(**flags, depth=2).double()
    tokens = torch.randint(23, (1, 21))
    ends = (0, 8, 9, 21)
    start = torch.cat([torch.full((1, end - begin), begin) for begin, end in itertools.pairwise(ends)], dim=1)
    packed = model(tokens, key_start=start.int())
    apart = torch.cat([model(tokens[:, begin:end]) for begin, end in itertools.pairwise(ends)], dim=1)
    assert largest(packed, apart) <= 1e-12
    loss = model(tokens, return_loss=True, key_start=start)
    assert abs(loss - functional.cross_entropy(apart[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())) <= 1e-12


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_left_padding_equals_the_row_alone(flags):
    model = small(**flags, depth=2).double()
    row = torch.randint(23, (1, 13))
    padded = torch.cat((torch.randint(23, (1, 7)), row), dim=1)
    out = model(padded, key_start=torch.full((1, 20), 7, dtype=torch.int32))
    assert largest(out[:, 7:], model(row)) <= 1e-12


@pytest.mark.parametrize("flags", ({}, dict(use_abs_pos_emb=True)), ids=("relative", "absolute"))
@pytest.mark.parametrize("return_loss", (False, True), ids=("logits", "loss"))
def test_key_start_is_checked_once(flags, return_loss, monkeypatch):
    """The outermost module checks it; inner modules check a tensor only if they get it from elsewhere."""
    owners = []

    def read(owner, key_start, *shape_and_device):
        if isinstance(key_start, torch.Tensor):
            owners.append(owner)
        return read_key_start(owner, key_start, *shape_and_device)

    monkeypatch.setattr(andromeda.model, "read_key_start", read)
    model, wrong = small(**flags), torch.zeros(1, 2, dtype=torch.int32)
    model([1, 2, 3], return_loss=return_loss, key_start=torch.zeros(1, 3, dtype=torch.int64))
    assert owners == ["Andromeda"]
    for module, inputs in ((model.decoder, [1, 2, 3]), (model.transformer, [1, 2, 3]),
                           (model.transformer.attn_layers, torch.ones(1, 3, 24))):  # fmt: skip
        with pytest.raises(ValueError, match="key_start must have shape"):
            module(inputs, key_start=wrong)


def test_attn_flash_is_only_a_switch():
    model = small(depth=2, heads=4, alibi_num_heads=2)
    plain = small(depth=2, heads=4, alibi_num_heads=2, attn_flash=False)
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 150))
    assert largest(model(tokens), plain(tokens)) <= 2e-5


@pytest.mark.parametrize("segment", (16, 64))
def test_segments_of_positions(segment, monkeypatch):
    """Sequences longer than an xPos segment: each segment of queries has its own origin (docs/attention.md#xpos)."""
    model = small(depth=2).double()
    tokens = torch.randint(23, (2, 150))
    whole = model(tokens)
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    assert largest(model(tokens), whole) <= 1e-10


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_long_half_precision(dtype):
    """Positions, slopes and tables stay exact: at 5000 tokens bfloat16 integers would be off by 16."""
    model = small(dim=32, dim_head=16).to(dtype)
    exact = small(dim=32, dim_head=16).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (1, 5000))
    with torch.no_grad():
        error = (model(tokens).double() - exact(tokens)).abs()
    assert error.max() <= 5e-2 and error.mean() <= 1e-2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_half_precision(flags, dtype):
    """Logits, loss and gradients are those of the wide model with the same weights, within docs/model.md#15."""
    arguments = dict(depth=2, dim=48, heads=4, dim_head=16, alibi_num_heads=2) | flags
    model, exact = small(**arguments), small(**arguments).double()
    oracle.perturb(model)
    model = model.to(dtype)
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 40))
    start = torch.tensor([[0] * 40, [0] * 15 + [15] * 25], dtype=torch.int32)
    for key_start in (None, start):
        logits, expected = model(tokens, key_start=key_start), exact(tokens, key_start=key_start)
        error = (logits.double() - expected).abs()
        assert logits.dtype == dtype
        assert error.max() <= 5e-2 and error.mean() <= 1e-2
    loss, expected = model(tokens, return_loss=True), exact(tokens, return_loss=True)
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) <= 1e-2
    loss.backward()
    expected.backward()
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert largest(own.grad, other.grad) <= 5e-2 * other.grad.abs().max().item(), name


def test_autocast_keeps_the_residual_stream_wide():
    """Under autocast the projections are in bfloat16; embeddings, residuals and norms stay in float32."""
    model = small(depth=2)
    exact = small(depth=2).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.transformer.features(tokens)
        loss = model(tokens, return_loss=True)
    assert features.dtype == torch.float32
    assert largest(features, exact.transformer.features(tokens)) <= 5e-2
    loss.backward()
    expected = exact(tokens, return_loss=True)
    assert abs(loss.item() - expected.item()) <= 1e-2
    expected.backward()
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert own.grad.dtype == torch.float32
        assert largest(own.grad, other.grad) <= 5e-2 * other.grad.abs().max().item(), name


@pytest.mark.parametrize("reentrant", (False, True), ids=("plain", "reentrant"))
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_activation_checkpointing_changes_nothing(flags, reentrant):
    model = small(**flags, depth=2).double().train()
    tokens = torch.randint(23, (2, 20))
    expected = torch.autograd.grad(model(tokens, return_loss=True), list(model.parameters()))
    layers = model.transformer.attn_layers
    layers.gradient_checkpointing = True
    calls, computed, hooked = [], [], []

    def checkpoint(function, *arguments):
        calls.append(function.__self__)
        return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=reentrant)

    for layer in layers.layers:
        layer._gradient_checkpointing_func = checkpoint
        layer.register_forward_pre_hook(lambda module, inputs: hooked.append(module))
        layer.fn.register_forward_pre_hook(lambda module, inputs: computed.append(module))
    model(tokens, return_loss=True).backward()
    assert calls == hooked == list(layers.layers)  # as for FSDP2, whose hooks must not gather again
    assert len(computed) == 2 * len(calls)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


REPLACED = {
    "hook": lambda linear: linear.register_forward_hook(lambda module, inputs, out: 2 * out),
    "forward": lambda linear: setattr(linear, "forward", lambda x: 2 * type(linear).forward(linear, x)),
    "parametrization": lambda linear: [
        torch.nn.utils.parametrize.register_parametrization(linear, name, Twice()) for name in ("weight", "bias")
    ],
}


class Twice(torch.nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.fixture
def operations(monkeypatch):
    """The shapes of x in the calls of `feed_forward` by models."""
    seen, operation = [], andromeda.model.feed_forward

    def watched(x, *parameters, **options):
        seen.append(x.shape)
        return operation(x, *parameters, **options)

    monkeypatch.setattr(andromeda.model, "feed_forward", watched)
    return seen


@pytest.mark.parametrize("map_name", ["proj_in", "proj_out"])
@pytest.mark.parametrize("way", REPLACED)
def test_feed_forward_calls_maps_that_are_not_plain(way, map_name, operations):
    """Adapters, hooks and parametrizations act; the operation would read the weight beside them."""
    torch.manual_seed(1)
    layer = small().transformer.attn_layers.layers[1].fn
    h = torch.randn(2, 40, 24)
    plain = layer(h, None)
    assert operations == [(2, 40, 24)]
    operations.clear()
    REPLACED[way](getattr(layer, map_name))
    product = functional.linear(h, layer.proj_in.weight, layer.proj_in.bias)
    factors = {"proj_in": (1 if way == "parametrization" else 2, 1), "proj_out": (1, 2)}[map_name]
    hidden = functional.gelu(factors[0] * product)
    out = functional.linear(hidden, layer.proj_out.weight, layer.proj_out.bias)
    expected = out if way == "parametrization" else factors[1] * out
    found = layer(h, None)
    torch.testing.assert_close(found, expected)
    assert operations == [] and not torch.allclose(found, plain)


def test_feed_forward_of_few_tokens_calls_its_maps(operations):
    """Without gradients, as in decoding: the operation would take the host longer than the two calls."""
    layer = small().transformer.attn_layers.layers[1].fn
    with torch.no_grad():
        outs = [layer(torch.ones(1, n, 24), None) for n in (1, 64, 65)]
    assert operations == [(1, 65, 24)]
    torch.testing.assert_close(outs[2][:, :1], outs[0])
    layer(torch.ones(1, 1, 24), None)
    assert operations[1:] == [(1, 1, 24)]


def test_feed_forward_keeps_its_input_alone():
    """For the backward pass; on the CPU."""
    layer = small().transformer.attn_layers.layers[1].fn
    kept, h = [], torch.randn(2, 40, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(h, None)
    own = {tensor.data_ptr() for tensor in (h, *layer.parameters())}
    assert [t.shape for t in kept if t.numel() > 0 and t.data_ptr() not in own] == []


def test_embedding_of_any_strides():
    class Transposed(torch.nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens).mT.contiguous().mT

    model = small(embedding_provider=type("Provider", (), {"get_embedding": staticmethod(Transposed)})())
    plain = small()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 9))
    assert torch.equal(model(tokens), plain(tokens))


def test_training_mode_changes_nothing():
    model = small()
    tokens = torch.randint(23, (1, 9))
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_input_forms_agree():
    model = small()
    tokens = torch.randint(23, (1, 9))
    expected = model(tokens)
    assert expected.shape == (1, 9, 23)
    for form in (tokens[0], tokens.tolist(), tokens[0].tolist()):
        assert torch.equal(model(form), expected)


# ---- the promise of logit_bound


BOUNDED = {
    "one key head": {},
    "key heads": dict(attn_one_kv_head=False),
    "fixed scale": dict(attn_qk_norm_dim_scale=False),
    "no rotation": dict(rotary_xpos=False),
    "pre-norm": dict(deepnorm=False, alibi_pos_bias=False),
}


def promises(model, monkeypatch, run) -> list[torch.Tensor]:
    """largest |softmax_scale * <q, k>| of a visible pair / logit_bound, (num_heads,), of each call of `attention`."""
    ratios = []

    def observed(q, k, v, *, logit_bound, softmax_scale, key_start=None, **options):
        group = q.shape[2] // k.shape[2]
        scores = softmax_scale * torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(group, 2))
        key = torch.arange(k.shape[1])
        hidden = key > torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None]
        if key_start is not None:
            hidden = hidden | (key < key_start[:, None, :, None])
        ratios.append(scores.abs().masked_fill(hidden, 0).amax((0, 2, 3)) / logit_bound.double())
        options |= dict(logit_bound=logit_bound, softmax_scale=softmax_scale, key_start=key_start)
        return andromeda.ops.attention.attention(q, k, v, **options)

    monkeypatch.setattr(andromeda.model, "attention", observed)
    run(model)
    return ratios


def aligned(dtype=torch.float32, **flags) -> Andromeda:
    """A model whose queries and keys point the same way, along channels that its scales stretch most.

    Two channels of 3 / sqrt(2) = 2.1213 each: in bfloat16 they are 2.125, and the score exceeds 3 * 3.
    """
    model = small(**(dict(heads=4, alibi_num_heads=4, dim=32, dim_head=16, depth=1) | flags))
    attention = model.transformer.attn_layers.layers[0].fn
    with torch.no_grad():
        model.transformer.token_emb.weight.abs_()
        for projection, scale in ((attention.to_q, attention.q_scale), (attention.to_k, attention.k_scale)):
            weight = projection.weight.zero_().unflatten(0, (-1, 16))
            weight[:, 9:11] = 1.0  # no rotation touches these
            if scale is not None:
                scale.uniform_(0.5, 2.0)
                scale[..., 9:11] = 3.0
    return model.to(dtype)


@pytest.mark.parametrize(
    ("flags", "scale"),
    [
        *((flags, math.log(2)) for flags in BOUNDED.values()),
        (dict(qk_norm=False), math.log(2)),
        (dict(qk_norm=False, rotary_xpos=False), 8**-0.5),
    ],
    ids=[*BOUNDED, "no norm", "neither norm nor rotation"],
)
def test_queries_that_are_transformed_take_the_softmax_scale(flags, scale, monkeypatch):
    """A softmax_scale of ln(2) spares the kernels a product per score; the scores are those of the golden data."""
    scales = []

    def observed(*tensors, softmax_scale, **options):
        scales.append(softmax_scale)
        return andromeda.ops.attention.attention(*tensors, softmax_scale=softmax_scale, **options)

    monkeypatch.setattr(andromeda.model, "attention", observed)
    small(**flags, dim_head=8, depth=2).generate(torch.arange(5), 3, temperature=0.0)
    assert len(scales) >= 6 and set(scales) == {scale}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", BOUNDED.values(), ids=BOUNDED)
def test_no_visible_score_exceeds_the_bound(flags, dtype, monkeypatch):
    """The model is made so that its largest scores come within the margin; also with documents and a cache."""
    tokens = torch.randint(23, (2, 40))
    start = torch.tensor([[0] * 40, [0] * 25 + [25] * 15], dtype=torch.int32)

    def run(model):
        model(tokens, key_start=start)
        cache = andromeda.model.generation.Cache()
        with torch.no_grad():
            for piece in tokens.split([30, 1, 9], dim=1):
                model(piece, cache=cache)

    ratios = torch.stack(promises(aligned(dtype, **flags), monkeypatch, run))
    assert len(ratios) == 4 and (ratios <= 1).all() and (ratios >= 0.98).all()


@pytest.mark.parametrize("flags", BOUNDED.values(), ids=BOUNDED)
def test_random_models_keep_the_bound(flags, monkeypatch):
    for seed in range(5):
        torch.manual_seed(seed)
        model = small(**(dict(heads=4, alibi_num_heads=2, dim=32, dim_head=16, depth=2) | flags))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_scale"):
                    parameter.mul_(torch.randn_like(parameter).exp())
        ratios = torch.stack(promises(model, monkeypatch, lambda model: model(torch.randint(23, (2, 60)))))
        assert len(ratios) == 2 and (ratios <= 1).all()


@pytest.mark.parametrize("scale", [6.0, 10.0])
def test_results_depend_on_no_bound_where_scores_reach_it(scale):
    """A bound that is too small would skip relevant keys: here the farthest keys have the highest scores.

    Queries of the last tokens point at the keys of the first ones and away from their own.
    """
    sizes = dict(heads=8, alibi_num_heads=8, dim=32, dim_head=16, depth=1, rotary_xpos=False, shift_tokens=0)
    model, plain = small(**sizes, max_seq_len=512), small(**sizes, max_seq_len=512, attn_flash=False)
    attention = model.transformer.attn_layers.layers[0].fn
    with torch.no_grad():
        model.transformer.token_emb.weight[1] = -model.transformer.token_emb.weight[0]
        attention.to_q.weight.copy_(-attention.to_k.weight.repeat(8, 1))
        attention.q_scale.fill_(scale)
        attention.k_scale.fill_(scale)
    plain.load_state_dict(model.state_dict())
    tokens = torch.tensor([[0] * 452 + [1] * 60])
    assert largest(model(tokens), plain.double()(tokens)) <= 1e-5


# ---- structure, initialisation


def test_each_parameter_once():
    model = small()
    names = list(model.state_dict())
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert model.decoder.net is model.transformer
    assert isinstance(model.transformer, TransformerWrapper) and isinstance(model.decoder, AutoregressiveWrapper)


def test_default_parameter_count():
    with torch.device("meta"):
        model = Andromeda()
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_460_405_760


def test_composition():
    """The wrappers compose as users of x-transformers expect."""
    decoder = Decoder(dim=24, depth=1, heads=2, dim_head=8, alibi_num_heads=1)
    net = TransformerWrapper(num_tokens=23, max_seq_len=48, attn_layers=decoder)
    wrapper = AutoregressiveWrapper(net, ignore_index=-100, pad_value=0)
    tokens = torch.randint(23, (2, 9))
    assert net(tokens).shape == (2, 9, 23)
    assert wrapper(tokens).shape == ()
    assert wrapper.generate(tokens, 3).shape == (2, 3)


def test_embedding_provider():
    class Provider:
        def get_embedding(self, num_tokens, dim):
            table = torch.nn.Embedding(num_tokens, dim)
            torch.nn.init.constant_(table.weight, 0.25)
            return table

    model = Andromeda(**oracle.SMALL, embedding_provider=Provider())
    assert (model.transformer.token_emb.weight == 0.25).all()
    assert model([1, 2, 3]).shape == (1, 3, 23)


def test_default_provider_is_stateless():
    first, second = small(), small()
    assert first.transformer.token_emb.weight.data_ptr() != second.transformer.token_emb.weight.data_ptr()
    assert not vars(AndromedaEmbedding())


def test_provider_of_the_wrong_width():
    class Provider:
        def get_embedding(self, num_tokens, dim):
            return torch.nn.Embedding(num_tokens, dim + 1)

    with pytest.raises(ValueError, match=r"embedding_provider.*\(1, 3, 24\).*\(1, 3, 25\)"):
        Andromeda(**oracle.SMALL, embedding_provider=Provider())([1, 2, 3])


def moments(weight: torch.Tensor) -> tuple[float, float]:
    return weight.mean().item(), weight.std().item()


@pytest.mark.parametrize("deepnorm", (True, False))
def test_initialisation(deepnorm):
    """docs/model.md#11, by the first two moments and the range, within six standard errors."""
    torch.manual_seed(1)
    dim, depth, dim_head, heads = 128, 2, 32, 4
    model = Andromeda(num_tokens=512, max_seq_len=64, dim=dim, depth=depth, dim_head=dim_head, heads=heads,
                      alibi_num_heads=2, deepnorm=deepnorm, use_abs_pos_emb=True)  # fmt: skip
    beta = (8 * depth) ** -0.25
    ours, names = model.state_dict(), x_transformers_names(model)

    def check(key, std, bound=None):
        weight = ours[names[key]].double()
        mean, spread = moments(weight)
        error = 6 / weight.numel() ** 0.5
        assert abs(mean) <= std * error, key
        assert abs(spread / std - 1) <= error, key
        if bound is not None:
            assert weight.abs().max() <= bound, key

    check("token_emb.emb.weight", (2 / dim) ** 0.5)
    check("pos_emb.emb.weight", 1.0)
    check("to_logits.weight", (3 * dim) ** -0.5, dim**-0.5)
    maps = {
        "attn_layers.layers.0.1.fn.to_q.weight": (dim, heads * dim_head, 1.0),
        "attn_layers.layers.0.1.fn.to_k.weight": (dim, dim_head, 1.0),
        "attn_layers.layers.0.1.fn.to_v.weight": (dim, dim_head, beta),
        "attn_layers.layers.0.1.fn.to_out.weight": (heads * dim_head, dim, beta),
        "attn_layers.layers.1.1.fn.ff.0.0.weight": (dim, 4 * dim, beta),
        "attn_layers.layers.1.1.fn.ff.2.weight": (4 * dim, dim, beta),
    }
    for key, (fan_in, fan_out, gain) in maps.items():
        if deepnorm:
            check(key, gain * (2 / (fan_in + fan_out)) ** 0.5)
        else:
            check(key, (3 * fan_in) ** -0.5, fan_in**-0.5)
    for key, fan_in in (
        ("attn_layers.layers.1.1.fn.ff.0.0.bias", dim),
        ("attn_layers.layers.1.1.fn.ff.2.bias", 4 * dim),
    ):
        bias = ours[names[key]]
        if deepnorm:
            assert (bias == 0).all()
        else:
            check(key, (3 * fan_in) ** -0.5, fan_in**-0.5)
    for key, name in names.items():
        if key.endswith("gamma"):
            assert (ours[name] == 0).all()
        elif key.endswith("residual_scale"):
            assert (ours[name] == 1).all()
        elif "qk_norm" in key:
            torch.testing.assert_close(ours[name], torch.full_like(ours[name], dim_head**0.25))


# ---- loss


def test_loss_ignores_labels():
    model = small().double()
    tokens = torch.randint(23, (2, 12))
    labels = tokens.clone()
    labels[0, 3] = labels[1, 7:] = -100
    logits = model(labels.masked_fill(labels == -100, 0))[:, :-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert abs(model(labels, return_loss=True) - expected) <= 1e-12


def test_loss_in_blocks(monkeypatch):
    """Blocks of rows change neither the loss nor its gradient."""
    logits = torch.randn(37, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (37,))
    targets[::5] = -100
    expected = functional.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(andromeda.model, "_LOSS_BLOCK_LOGITS", 4 * 11)
    loss = andromeda.model.cross_entropy(logits, targets)
    assert abs(loss - expected) <= 1e-12
    assert largest(torch.autograd.grad(loss, logits)[0], gradient) <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0), 5], ids=str)
def test_the_loss_over_no_target_is_zero_with_zero_gradients(dtype, count):
    """A part of a step without a target adds nothing to the loss, even if the whole step has none."""
    logits = torch.randn(6, 11, dtype=dtype, requires_grad=True)
    loss = andromeda.model.cross_entropy(logits, torch.full((6,), -100), count=count)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and torch.count_nonzero(gradient) == 0


def test_a_loss_of_nothing_is_an_error_in_a_single_call():
    model = small()
    ignored = torch.full((2, 7), -100)
    first = ignored.clone()
    first[:, 0] = 3  # nothing predicts the first token of a row
    for labels in (ignored, first):
        with pytest.raises(ValueError, match=r"labels must hold a token to predict, got -100 .* leave the batch out"):
            model(labels, return_loss=True)
    wrapper = AutoregressiveWrapper(model.transformer, ignore_index=3)
    with pytest.raises(ValueError, match="labels must hold a token to predict, got 3"):
        wrapper(torch.full((1, 4), 3))


@pytest.fixture
def losses_from_hidden(monkeypatch):
    """The `backend` of each call of linear_cross_entropy by the model."""
    backends, real = [], andromeda.model.linear_cross_entropy

    def noted(*tensors, backend, **options):
        backends.append(backend)
        return real(*tensors, backend=backend, **options)

    monkeypatch.setattr(andromeda.model, "linear_cross_entropy", noted)
    return backends


def with_bias(projection):
    projection.bias = torch.nn.Parameter(torch.zeros_like(projection.weight[:, 0]))


class DerivedLinear(torch.nn.Linear):
    """What a library that quantises or adapts a model puts in the place of its maps."""


def of_another_class(projection):
    projection.__class__ = DerivedLinear


PROJECTIONS = {
    "hook": lambda projection: projection.register_forward_hook(lambda *_: None),
    "hook before": lambda projection: projection.register_forward_pre_hook(lambda *_: None),
    "replaced forward": lambda projection: setattr(projection, "forward", projection.forward),
    "bias": with_bias,
    "another class": of_another_class,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("change", PROJECTIONS.values(), ids=PROJECTIONS)
def test_the_loss_with_and_without_logits(change, dtype, losses_from_hidden):
    """A projection that may do more than its product is called; the two losses and their gradients agree."""
    model, tokens = small().to(dtype), torch.randint(23, (2, 12))
    tokens[1, 5:] = -100
    parameters = list(model.parameters())
    loss = model(tokens, return_loss=True)
    assert losses_from_hidden == [None]
    change(model.transformer.to_logits)
    other = model(tokens, return_loss=True)
    assert losses_from_hidden == [None]
    _, loss_limit, gradient_limit = LIMITS[dtype]
    assert largest(loss, other) <= loss_limit
    for a, b in zip(*(torch.autograd.grad(result, parameters) for result in (loss, other)), strict=True):
        assert largest(a, b) <= gradient_limit


def test_attn_flash_reaches_the_loss(losses_from_hidden):
    small(attn_flash=False)(torch.randint(23, (1, 9)), return_loss=True)
    assert losses_from_hidden == ["reference"]


def test_targets_of_the_network():
    """`TransformerWrapper.forward` with targets, as wrappers of the network see it."""
    net, tokens = small().transformer, torch.randint(23, (2, 12))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    expected = functional.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
    assert largest(net(inputs, targets=targets), expected) <= 2e-6
    counted = targets.masked_fill(targets == 5, 3)
    expected = functional.cross_entropy(net(inputs).flatten(0, 1), counted.flatten(), ignore_index=3)
    assert largest(net(inputs, targets=counted, ignore_index=3), expected) <= 2e-6
    with pytest.raises(ValueError, match="logits_to_keep must be left out with targets"):
        net(inputs, targets=targets, logits_to_keep=1)
    with pytest.raises(ValueError, match="labels must be below the vocabulary size 23, or -100, got 23"):
        net(inputs, targets=torch.full_like(targets, 23))


def test_loss_is_wide():
    model = small().bfloat16()
    assert model(torch.randint(23, (1, 9)), return_loss=True).dtype == torch.float32


# ---- errors


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        ([], ValueError, "at least"),
        ([[]], ValueError, "at least"),
        ([[1, 2], [3]], ValueError, "length"),
        ([1, 23], ValueError, "23"),
        ([1, -1], ValueError, "-1"),
        ([1.5, 2.0], TypeError, "int"),
        ([True, False], TypeError, "int"),
        ("abc", TypeError, "str"),
        (torch.zeros(1, 3), TypeError, "float32"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, "dimension|shape"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least"),
        (torch.tensor([[0, 99]]), ValueError, "99"),
    ],
    ids=["empty", "empty_row", "ragged", "too_large", "negative", "floats", "bools", "text", "float_tensor",
         "three_dimensions", "no_tokens", "tensor_too_large"],
)  # fmt: skip
def test_wrong_tokens(tokens, error, match):
    with pytest.raises(error, match=match):
        small()(tokens)


def test_wrong_calls():
    model = small()
    with pytest.raises(TypeError, match="attention_mask"):
        model([1, 2, 3], attention_mask=None)
    with pytest.raises(TypeError, match="alibi_heads"):
        Andromeda(alibi_heads=2)
    with pytest.raises(ValueError, match="at least 2"):
        model([1], return_loss=True)
    with pytest.raises(ValueError, match="23"):
        model(torch.tensor([[1, 2, 40]]), return_loss=True)
    with pytest.raises(ValueError, match="key_start"):
        model([1, 2, 3], key_start=torch.zeros(1, 2, dtype=torch.int32))


def test_absolute_table_ends():
    model = small(use_abs_pos_emb=True, max_seq_len=8)
    model(list(range(8)))
    with pytest.raises(ValueError, match=r"max_seq_len=8.*position 8"):
        model(list(range(9)))


def test_length_is_free_without_a_table():
    assert small(max_seq_len=8)([[1] * 50]).shape == (1, 50, 23)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deepnorm", [True, False], ids=["deepnorm", "pre-norm"])
def test_compiles_into_one_graph_without_constants(deepnorm):
    """Every run would copy a constant from the CPU, and torch makes no CUDA graph of a program that uses the CPU."""
    model = Andromeda(
        num_tokens=64, max_seq_len=128, dim=64, depth=2, dim_head=32, heads=3, alibi_num_heads=2, deepnorm=deepnorm
    )
    tokens = torch.randint(0, 64, (2, 16))
    constants = []

    def inspect(graph, inputs):
        constants.extend(node.target for node in graph.graph.nodes if node.op == "get_attr" or "lift" in node.name)
        return make_boxed_func(graph)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=inspect), fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    assert constants == []


def compiled_of(name):
    """A model that has not run yet, of each class, and a function from it to a scalar."""
    sizes = dict(heads=2, alibi_num_heads=1, dim_head=8, dim=24, depth=1)
    model = small(**sizes)
    tokens = torch.randint(23, (2, 9))
    start = torch.tensor([[0] * 9, [0] * 4 + [4] * 5], dtype=torch.int32)
    key_start = {"key_start": start}
    return {
        "Andromeda": (model, lambda m: m(tokens, **key_start).square().mean()),
        "Andromeda, loss": (model, lambda m: m(tokens, return_loss=True, **key_start)),
        "Andromeda, positions": (model, lambda m: m(tokens, logits_to_keep=torch.tensor([0, 3])).square().mean()),
        "TransformerWrapper": (model.transformer, lambda m: m(tokens, logits_to_keep=2, **key_start).square().mean()),
        "AutoregressiveWrapper": (AutoregressiveWrapper(model.transformer), lambda m: m(tokens, **key_start)),
        "decoder of a model": (model.decoder, lambda m: m(tokens, **key_start)),
        "Decoder": (model.transformer.attn_layers, lambda m: m(torch.ones(2, 9, 24), **key_start).square().mean()),
        "pre-norm": (small(**sizes, deepnorm=False, use_abs_pos_emb=True), lambda m: m(tokens, return_loss=True)),
        "plain torch": (small(**sizes, attn_flash=False), lambda m: m(tokens, return_loss=True)),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["Andromeda", "Andromeda, loss", "Andromeda, positions", "TransformerWrapper", "AutoregressiveWrapper",
     "decoder of a model", "Decoder", "pre-norm", "plain torch"],
)  # fmt: skip
def test_a_fresh_model_compiles_into_one_graph(name, monkeypatch):
    """It compiles before it has run and without another model's constants; forward and backward."""
    torch.compiler.reset()
    entries = andromeda.ops._persistent.entries
    monkeypatch.setattr(andromeda.ops._persistent, "entries", type(entries)(dict))
    model, call = compiled_of(name)
    found = call(torch.compile(model, fullgraph=True, backend="eager"))
    found.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    expected = call(model)
    expected.backward()
    torch.testing.assert_close(found, expected)
    others = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("origin", ["loaded", "copied", "pickled", "bfloat16", "float64"])
def test_a_model_of_any_origin_compiles(origin, tmp_path):
    torch.compiler.reset()
    model, tokens = small(), torch.randint(23, (2, 9))
    if origin == "loaded":
        model.save(tmp_path / "model")
        model = Andromeda.load(tmp_path / "model")
    else:
        model = {
            "copied": copy.deepcopy,
            "pickled": lambda m: pickle.loads(pickle.dumps(m)),
            "bfloat16": lambda m: m.bfloat16(),
            "float64": lambda m: m.double(),
        }[origin](model)
    loss = torch.compile(model, fullgraph=True, backend="eager")(tokens, return_loss=True)
    loss.backward()
    torch.testing.assert_close(loss, model(tokens, return_loss=True))


# ---- modules that are replaced --------------------------------------------------------------------------------------


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def assert_one_model(model, tokens):
    """Logits, losses and generation use the same parameters, whichever interface computes them."""
    logits = model(tokens)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    for loss in (model(tokens, return_loss=True), model.decoder(tokens)):
        torch.testing.assert_close(loss, expected)
    for next_token in (model.generate(tokens, 1, temperature=0), model.decoder.generate(tokens, 1, temperature=0)):
        assert torch.equal(next_token[:, 0], logits[:, -1].argmax(-1))
    assert model.decoder.net is model.transformer
    ours, theirs = dict(model.transformer.named_parameters()), dict(model.decoder.named_parameters())
    assert [f"net.{name}" for name in ours] == list(theirs)
    assert all(a is b for a, b in zip(ours.values(), theirs.values(), strict=True))
    assert list(model.state_dict()) == [f"transformer.{name}" for name in ours]


def shallow(model):
    """A copy as torch.nn.DataParallel makes its replicas, with its own transformer."""
    replica = model._replicate_for_data_parallel()
    replica._modules["transformer"] = changed(copy.deepcopy(model.transformer))
    return replica


WAYS = {
    "set": lambda model, other: setattr(model, "transformer", other.transformer),
    "in the dictionary": lambda model, other: model._modules.update(transformer=other.transformer),
    "by the decoder": lambda model, other: setattr(model.decoder, "net", other.transformer),
    "layers": lambda model, other: setattr(model.transformer, "attn_layers", other.transformer.attn_layers),
    "embedding": lambda model, other: setattr(model.transformer, "token_emb", other.transformer.token_emb),
    "projection": lambda model, other: setattr(model.transformer, "to_logits", other.transformer.to_logits),
    "compiled": lambda model, other: setattr(model, "transformer", torch.compile(other.transformer, backend="eager")),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_replaced_module_is_used_everywhere(way):
    model, other = small(), changed(small())
    tokens = torch.randint(23, (2, 9))
    before, decoder = model(tokens), model.decoder
    assert_one_model(model, tokens)  # by now loss and generation have found their network
    WAYS[way](model, other)
    with torch.compiler.set_stance("force_eager"):  # compiles nothing: the wrapper around the module matters
        assert not torch.equal(model(tokens), before)
        assert decoder is model.decoder
        assert_one_model(model, tokens)


@pytest.mark.parametrize(
    "make",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), shallow],
    ids=["deepcopy", "copy", "pickle", "replica"],
)
def test_copies_are_models_of_their_own_parameters(make):
    model, tokens = small(), torch.randint(23, (2, 9))
    model.decoder.pad_value = 7
    twin = make(model)
    assert type(twin) is Andromeda and twin.decoder.pad_value == 7
    assert_one_model(twin, tokens)
    twin.transformer = changed(small()).transformer
    assert_one_model(twin, tokens)
    assert_one_model(model, tokens)


def test_a_decoder_outlives_its_model_which_is_freed_at_once():
    model = small()
    decoder, gone = model.decoder, weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    assert decoder([1, 2, 3]).isfinite()


def test_parametrized_and_pruned_modules():
    model, tokens = small(), torch.randint(23, (2, 9))

    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    before = model(tokens)
    torch.nn.utils.parametrize.register_parametrization(model.transformer.to_logits, "weight", Doubled())
    torch.testing.assert_close(model(tokens), 2 * before)
    assert_one_model(model, tokens)


def test_sizes_follow_the_modules():
    model = small()
    model.transformer.token_emb, model.transformer.to_logits = torch.nn.Embedding(40, 24), torch.nn.Linear(24, 40)
    assert model([[39, 1]]).shape == (1, 2, 40)
    assert model.config.num_tokens == model.transformer.num_tokens == model.decoder.net.num_tokens == 40
    assert model([[39, 1]], return_loss=True).isfinite() and model.generate([39], 2).shape == (2,)
    model.transformer = small(num_tokens=11, depth=2).transformer
    assert (model.config.num_tokens, model.config.depth) == (11, 2)
    with pytest.raises(ValueError, match="vocabulary size 11"):
        model([39])


def test_the_decoder_is_not_set():
    model = small()
    with pytest.raises(AttributeError, match=r"decoder .* follows it; set model\.transformer"):
        model.decoder = AutoregressiveWrapper(small().transformer)
    with pytest.raises(AttributeError):
        model.config = small().config
    assert list(model.state_dict()) == list(small().state_dict())


# ---- positions whose logits are wanted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "positions"),
    [(0, range(6)), (1, [5]), (3, [3, 4, 5]), (9, range(6)), (torch.tensor([4]), [4]),
     (torch.tensor([3, 1, 1]), [3, 1, 1]), (torch.tensor([-1], dtype=torch.int32), [5]),
     (torch.tensor([2, 5], dtype=torch.uint8), [2, 5]),
     (torch.tensor([], dtype=torch.int64), [])],
    ids=str,
)  # fmt: skip
def test_logits_to_keep(wanted, positions):
    model = small().double()
    tokens = torch.randint(23, (2, 6))
    torch.testing.assert_close(model(tokens, logits_to_keep=wanted), model(tokens)[:, list(positions)])


@pytest.mark.parametrize(
    ("wanted", "error", "text"),
    [(-1, ValueError, "at least 0.*got -1"), (True, TypeError, "an int >= 0 or .*got True"),
     (False, TypeError, "got False"), (2.0, TypeError, r"got 2\.0 \(float\)"), ([1], TypeError, r"got \[1\] \(list\)"),
     (None, TypeError, "got None"), ("1", TypeError, "got '1'"), (slice(1), TypeError, "slice"),
     (torch.tensor([True] * 6), TypeError, "of bool"), (torch.tensor([1.0]), TypeError, "of float32"),
     (torch.tensor(3), TypeError, r"a tensor \(\)"), (torch.tensor([[1]]), TypeError, r"a tensor \(1, 1\)"),
     (torch.tensor([0, 6]), ValueError, "6 tokens of this call, got 6"), (torch.tensor([-7]), ValueError, "got -7")],
    ids=str,
)  # fmt: skip
def test_wrong_logits_to_keep(wanted, error, text):
    with pytest.raises(error, match=f"Andromeda: logits_to_keep must .*{text}"):
        small()([1, 2, 3, 4, 5, 6], logits_to_keep=wanted)
    if wanted is not None:
        with pytest.raises(ValueError, match="left out"):
            small()([1, 2, 3], return_loss=True, logits_to_keep=torch.tensor([0]))


# ---- a loss of no target --------------------------------------------------------------------------------------------


def test_a_loss_of_no_target():
    """It is an error on its own; as a part of a mean over several calls it is 0 with gradients of 0."""
    logits = torch.randn(4, 7, requires_grad=True)
    none = torch.full((4,), -100)
    with pytest.raises(ValueError, match="labels must hold a token to predict"):
        andromeda.model.cross_entropy(logits, none)
    for count in (0, torch.tensor(0), 3):
        loss = andromeda.model.cross_entropy(logits, none, count=count)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()
