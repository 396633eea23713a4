"""Quantised models: the modules that a tool says it changes are changed, and the model computes with them."""

import io
import warnings

import bitsandbytes
import optimum.quanto
import pytest
import torch
import torchao
from tiny_models import MODELS, new_subject
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear

from andromeda.model import is_plain

NUMBER_OF_MAPS = {"llama": 2 * 7, "andromeda": 2 * 6}


def load_int8(m, tmp):
    return m.load(AutoModelForCausalLM, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def load_nf4(m, tmp):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return m.load(AutoModelForCausalLM, quantization_config=config)


def skip_head(module, name):
    return isinstance(module, nn.Linear) and not name.endswith(("lm_head", "to_logits"))


def quantize_with_torchao(m, tmp):
    model = m.new()
    torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig(), filter_fn=skip_head)
    return model


def quantize_activations_with_torchao(m, tmp):
    model = m.new()
    config = torchao.quantization.Int8DynamicActivationInt8WeightConfig()
    torchao.quantization.quantize_(model, config, filter_fn=skip_head)
    return model


def load_with_torchao(m, tmp):
    config = TorchAoConfig(torchao.quantization.Int8WeightOnlyConfig())
    return m.load(AutoModelForCausalLM, quantization_config=config)


def reload_with_torchao(m, tmp):
    load_with_torchao(m, tmp).save_pretrained(tmp)
    return AutoModelForCausalLM.from_pretrained(tmp).eval()


def load_with_quanto(m, tmp):
    return m.load(AutoModelForCausalLM, quantization_config=QuantoConfig(weights="int8"))


def quantize_dynamic(m, tmp):
    maps = {name for name, module in m.first.named_modules() if skip_head(module, name)}
    return torch.ao.quantization.quantize_dynamic(m.new(), maps, dtype=torch.qint8)


def has_torchao_weight(module):
    return isinstance(getattr(module, "weight", None), torchao.utils.TorchAOBaseTensor)


def kind(cls):
    return lambda module: isinstance(module, cls)


# name -> how, which modules are quantised, the largest difference of logits
METHODS = {
    "bitsandbytes int8": (load_int8, kind(bitsandbytes.nn.Linear8bitLt), 0.1),
    "bitsandbytes nf4": (load_nf4, kind(bitsandbytes.nn.Linear4bit), 0.6),
    "torchao.quantize_": (quantize_with_torchao, has_torchao_weight, 0.1),
    "torchao.quantize_, activations too": (quantize_activations_with_torchao, has_torchao_weight, 0.1),
    "TorchAoConfig": (load_with_torchao, has_torchao_weight, 0.1),
    "TorchAoConfig, saved and loaded": (reload_with_torchao, has_torchao_weight, 0.1),
    "quanto int8": (load_with_quanto, kind(optimum.quanto.QLinear), 0.1),
    "quantize_dynamic": (quantize_dynamic, kind(torch.ao.nn.quantized.dynamic.Linear), 0.2),
}


def footprint(model):
    """Bytes of the layers in a file."""
    file = io.BytesIO()
    torch.save({name: value for name, value in model.state_dict().items() if ".layers." in name}, file)
    return file.tell()


@pytest.fixture(scope="module")
def subjects(tokenizer, tmp_path_factory):
    """With key heads of 32 channels: the 4-bit kernels of some processors know no narrower map."""
    return {name: new_subject(name, tokenizer, tmp_path_factory.mktemp(name), head_dim=32) for name in MODELS}


@pytest.mark.parametrize("method", METHODS)
def test_quantised(method, subject, tmp_path):
    warnings.simplefilter("ignore")
    make, is_quantised, bound = METHODS[method]
    model = make(subject, tmp_path)
    maps = [module for module in model.modules() if is_quantised(module)]
    assert len(maps) == NUMBER_OF_MAPS[subject.name]
    smaller = footprint(model) / footprint(subject.first)
    assert smaller < 0.45
    assert not any(is_plain(module) for module in maps)

    def calls_all(call):
        called = []
        with pytest.MonkeyPatch.context() as patch:
            for cls in {type(module) for module in maps}:
                forward = cls.forward
                patch.setattr(cls, "forward", lambda self, *args, f=forward: called.append(self) or f(self, *args))
            result = call()
        assert {id(module) for module in maps} <= {id(module) for module in called}
        return result

    ids = subject.ids()
    with torch.no_grad():
        found = calls_all(lambda: model(ids).logits)
        exact = subject.first(ids).logits
        assert 1e-5 < (found - exact).abs().max() / exact.abs().max() < bound
        loss = calls_all(lambda: model(ids, labels=ids).loss)
        assert (loss - functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())).abs() < 1e-3
        new = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        assert torch.equal(new[:, 9], found[:, -1].argmax(-1)) and new.shape == (2, 13)


def test_fp8(subject):
    """transformers refuses to load it without a GPU; the modules that it replaces are all linear maps."""
    with pytest.raises(RuntimeError, match="GPU or XPU is needed"):
        subject.load(quantization_config=FineGrainedFP8Config())
    with torch.device("meta"):
        model = subject.kinds.causal(subject.config())
    replace_with_fp8_linear(model, ["lm_head", "to_logits"], FineGrainedFP8Config())
    assert sum(isinstance(module, FP8Linear) for module in model.modules()) == NUMBER_OF_MAPS[subject.name]
