"""`ExportableStep`: decoding, token by token, as a module that `torch.export` can hold."""

import torch
from torch import nn

from andromeda.generation import FixedCache
from andromeda.huggingface.cache_andromeda import AndromedaStaticCache
from andromeda.huggingface.modeling_andromeda import AndromedaForCausalLM
from andromeda.model import segment_length


class ExportableStep(nn.Module):
    """One step of decoding, whose buffers are the state of the processed tokens.

        step = ExportableStep(model, batch_size=1, max_cache_len=512)
        inputs = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
        with torch.no_grad():
            program = torch.export.export(step, (), inputs)
        call = program.module()
        for position, token in enumerate(prompt):
            logits = call(input_ids=torch.tensor([[token]]), cache_position=torch.tensor([position]))

    It has the inputs and the output of `TorchExportableModuleWithStaticCache`, transformers' recipe for ExecuTorch. The
    recipe itself cannot hold an Andromeda model: its `StaticCache` has room for keys and values, and none for the rows
    of the token shift.

    Args:
        model: the model, on its device and in its dtype.
        batch_size: number of rows of each call.
        max_cache_len: number of tokens that can be processed; at most one segment of xPos positions, which is 8192, or
            2048 in float16.
    """

    def __init__(self, model: AndromedaForCausalLM, batch_size: int, max_cache_len: int):
        super().__init__()
        longest = segment_length(model.dtype)
        if model.config.rotary_xpos and max_cache_len > longest:
            raise ValueError(
                f"ExportableStep: max_cache_len must be at most {longest}, the positions that share an xPos origin in "
                f"{str(model.dtype).removeprefix('torch.')}, got {max_cache_len}; use generate for longer texts"
            )
        self.model = model
        state = AndromedaStaticCache(max_cache_len)
        token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad():  # makes the memory
            model(token, past_key_values=state, use_cache=True)
        cache = state.for_call(1)
        assert isinstance(cache, FixedCache)
        self._cache = cache
        for index, tensor in enumerate(cache.tensors()):
            self.register_buffer(f"state_{index}", tensor.clone(), persistent=False)

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        """Logits (batch, 1, vocab_size) of the token after this one; the call at position 0 begins a new text.

        Args:
            input_ids: int64 (batch, 1), the token at that position.
            cache_position: int64 (1,), 0 in the first call and then one more in each.
        """
        self._cache.use([*self.buffers(recurse=False)])
        self._cache.go_to(cache_position)
        output = self.model(input_ids, past_key_values=self._cache, use_cache=True)
        logits: torch.Tensor = output.logits
        return logits


__all__ = ["ExportableStep"]
