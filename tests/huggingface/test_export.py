"""torch.export, AOTInductor and make_fx of whole models."""

import io

import pytest
import torch
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import andromeda.model
from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

VOCABULARY = 29


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "head_dim": 16, "alibi_num_heads": 1, "hidden_size": 32, "num_hidden_layers": 1}
    return AndromedaForCausalLM(AndromedaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def batch_of(batch, n, *names):
    """The named inputs; the first row has a token of padding."""
    tokens = torch.randint(VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill(mask == 0, -100),
        "position_ids": (torch.arange(n) % 5).expand(batch, n),
    }
    return {name: inputs[name] for name in ("input_ids", *names)}


def dimensions(inputs, **axes):
    return {name: {int(axis[1:]): dimension for axis, dimension in axes.items()} for name in inputs}


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


BOUNDED = {"_0": Dim("batch", min=1, max=8), "_1": Dim("n", min=2, max=128)}
AUTOMATIC = {"_0": Dim.AUTO, "_1": Dim.AUTO}


@pytest.mark.parametrize(
    ("axes", "strict"),
    [(BOUNDED, True), (AUTOMATIC, False)],
    ids=["bounded, strict", "automatic"],
)
def test_export_of_any_batch_and_length(axes, strict, model):
    inputs = batch_of(2, 17, "attention_mask")
    with torch.no_grad():
        program = export(model, (), inputs, dynamic_shapes=dimensions(inputs, **axes), strict=strict)
        call = reloaded(program)
        for shape in ((2, 128), (3, 2), (1, 70)):
            inputs = batch_of(*shape, "attention_mask")
            torch.testing.assert_close(call(**inputs).logits, model(**inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("names", [("position_ids",), ("attention_mask", "labels")], ids=", ".join)
def test_export_of_other_arguments(names, model):
    """Also where gradients are recorded, as a trace outside of torch.no_grad() is."""
    inputs = batch_of(2, 17, *names)
    call = export(model, (), inputs, dynamic_shapes=dimensions(inputs, **BOUNDED)).module()
    for shape in ((2, 128), (3, 2)):
        inputs = batch_of(*shape, *names)
        for name, expected in model(**inputs).items():
            if name != "past_key_values":
                torch.testing.assert_close(call(**inputs)[name], expected, rtol=1e-6, atol=1e-6)


def test_a_longer_sequence_than_the_program_can_run_is_refused(model, monkeypatch):
    """A program of one segment of xPos positions has a guard; one that is exported for more positions is refused."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    inputs = batch_of(2, 9)
    with torch.no_grad():
        call = export(model, (), inputs, dynamic_shapes=dimensions(inputs, _1=Dim.AUTO)).module()
        torch.testing.assert_close(call(**batch_of(2, 16)).logits, model(**batch_of(2, 16)).logits)
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)guard|<= 16"):
            call(**batch_of(2, 17))
        longer = batch_of(2, 40)  # three segments
        call = export(model, (), longer).module()
        torch.testing.assert_close(call(**longer).logits, model(**longer).logits)


def test_a_package_of_aot_inductor(model, tmp_path):
    inputs = batch_of(2, 17, "attention_mask")
    with torch.no_grad():
        program = export(model, (), inputs, dynamic_shapes=dimensions(inputs, **BOUNDED))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        call = torch._inductor.aoti_load_package(path)
        for shape in ((2, 128), (3, 2)):
            inputs = batch_of(*shape, "attention_mask")
            torch.testing.assert_close(call(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorded", [False, True], ids=["", "gradients"])
def test_make_fx(recorded, model):
    inputs, others = batch_of(2, 17, "attention_mask"), batch_of(2, 17, "attention_mask")
    others["input_ids"] = others["input_ids"].flip(1)

    def call(tokens, mask):
        logits = model(tokens, attention_mask=mask).logits
        if not recorded:
            return logits
        return torch.autograd.grad(logits.square().mean(), model.transformer.token_emb.weight)[0]

    with torch.set_grad_enabled(recorded):
        graph = make_fx(call)(*inputs.values())
        torch.testing.assert_close(graph(*others.values()), call(*others.values()), rtol=1e-6, atol=1e-6)
