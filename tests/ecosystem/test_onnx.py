"""`torch.onnx.export` of whole models, which holds the formulas of the operators, run by ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

VOCABULARY = 29


def batch_of(batch, n):
    """Token ids and a mask; the first row has a token of padding."""
    tokens = torch.randint(VOCABULARY, (batch, n), generator=torch.Generator().manual_seed(n))
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("options", [{}, {"deepnorm": False, "qk_norm": False}], ids=["default", "pre-norm"])
def test_logits_for_any_batch_and_length(options):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "head_dim": 16, "alibi_num_heads": 1, "hidden_size": 32, "num_hidden_layers": 1}
    model = AndromedaForCausalLM(AndromedaConfig(vocab_size=VOCABULARY, **sizes, **options)).eval()
    inputs = batch_of(2, 17)
    axes = {0: Dim("batch", min=1, max=8), 1: Dim("n", min=2, max=128)}
    program = torch.onnx.export(
        model, (), kwargs=inputs, dynamo=True, dynamic_shapes=dict.fromkeys(inputs, axes), verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in ((2, 17), (1, 5), (3, 64)):
        inputs = batch_of(*shape)
        (logits,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            expected = model(**inputs).logits
        real = inputs["attention_mask"].bool()
        np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-5)
