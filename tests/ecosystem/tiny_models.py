"""A tiny Andromeda and a Llama of the same size, with a tokenizer."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

VOCABULARY = 1088
MODELS = ("llama", "andromeda")


@dataclasses.dataclass(eq=False)
class Subject:
    """A tiny model under test: 2 layers, 64 channels, 4 query heads, 1 key head.

    Attributes:
        name: "llama" or "andromeda".
        folder: a saved copy of the model with its tokenizer.
        tokenizer: byte-level BPE of 1088 tokens with a chat template; padding on the left.
        kinds: its classes: `config`, `causal`.
        linear: names of its linear maps within the layers.
        first: the model itself; do not change it.
    """

    name: str
    folder: Path
    tokenizer: object
    kinds: SimpleNamespace
    linear: tuple
    first: torch.nn.Module

    def config(self, **options):
        """A new config of the same sizes."""
        return self.kinds.config(**{**self.first.config.to_diff_dict(), **options})

    def new(self):
        """A copy of the model, in evaluation mode, which the test may change."""
        return copy.deepcopy(self.first)

    def load(self, cls=None, **options):
        """The saved copy, in evaluation mode."""
        return (cls or self.kinds.causal).from_pretrained(self.folder, **options).eval()

    def ids(self, rows=2, length=9, seed=0):
        """(rows, length) token ids that are no special tokens."""
        return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def new_model(name, options):
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        **options,
    }
    if name == "llama":
        # Weights large enough for logits that differ clearly.
        config = LlamaConfig(**sizes, intermediate_size=256, initializer_range=0.15)
        kinds = SimpleNamespace(config=LlamaConfig, causal=LlamaForCausalLM)
        linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    else:
        config = AndromedaConfig(**sizes, alibi_num_heads=2)
        kinds = SimpleNamespace(config=AndromedaConfig, causal=AndromedaForCausalLM)
        linear = ("to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out")
    return kinds.causal(config).eval(), kinds, linear


def new_tokenizer():
    """A byte-level BPE trained on its own source, with a chat template and padding on the left."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text() for path in Path(torch.nn.__file__).parent.glob("*.py")]
    bpe.train_from_iterator([*texts[:3], Path(dataclasses.__file__).read_text()], trainer)
    assert bpe.get_vocab_size() == VOCABULARY
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def new_subject(name, tokenizer, folder, **options):
    """A `Subject`, saved in this folder. options: of its config."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model, kinds, linear = new_model(name, {**special, **options})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Subject(name, folder, tokenizer, kinds, linear, model)
