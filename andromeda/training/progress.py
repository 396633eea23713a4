"""The progress line of a run: its figures, the pace of its steps, and sample texts."""

import collections
import math
import statistics
import sys
import time
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from andromeda.data.tokenizer import token_ids
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training.messages import say
from andromeda.training.model_checks import Model, Tokenizer, hf_tokenizer
from andromeda.training.rows import IGNORED_LABEL
from andromeda.training.settings import TrainSettings

# Dense bfloat16 peak of a device in TFLOP/s, without sparsity, from the vendors' data sheets; the first key found in
# the device's name counts, so more specific names come first.
_PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H20": 148.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def training_flops_per_token(model: AndromedaForCausalLM, seqlen: int) -> int:
    """Floating-point operations of one token, forward and backward, without recomputation.

    6 for each parameter in a product (a multiplication and an addition, three times; the token table is only looked up)
    and, for each layer, 6 * num_heads * head_dim * seqlen for the scores and the weighted sum under the causal mask.
    """
    config = model.config
    table = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters()) - table
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seqlen
    return 6 * (parameters + attention)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


class Pace:
    """Notices, once, that steps take three times as long as at the start."""

    _WARM_UP, _STEPS, _FACTOR = 5, 20, 3.0  # steps that do not count, steps of a median, ratio of durations

    def __init__(self) -> None:
        self.ignored = 0
        self.first: list[float] = []  # seconds of the first steps
        self.recent: collections.deque[float] = collections.deque(maxlen=self._STEPS)
        self.said = False

    def add(self, seconds: float, device: str) -> str | None:
        """Add the duration of a step; returns advice where steps have become slow, else None."""
        if self.said:
            return None
        if self.ignored < self._WARM_UP:
            self.ignored += 1
            return None
        if len(self.first) < self._STEPS:
            self.first.append(seconds)
            return None
        self.recent.append(seconds)
        if len(self.recent) < self._STEPS:
            return None
        before, now = statistics.median(self.first), statistics.median(self.recent)
        if now < self._FACTOR * before:
            return None
        self.said = True
        text = f"steps take {now / before:.1f} times as long as at the start ({now:.3g} s, were {before:.3g} s): "
        if device != "cpu":
            return text + f"other programs may use the {device} device or the processors that feed it"
        return text + (
            "other programs use the cores. Stop them, or stop this run and resume it with fewer threads: threads that "
            "wait for each other lose most, so OMP_NUM_THREADS=1 may be faster beside a busy program"
        )


class Progress(TrainerCallback):
    """A line with loss, tokens/s and time left: a bar on a terminal, a plain line per logged interval elsewhere."""

    def __init__(self, settings: TrainSettings, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.bar: tqdm | None = None  # in the process that shows it
        self.loss: float | None = None
        self.begin_step = 0  # steps and tokens of the run before this call
        self.begin_tokens = 0
        self.tokens = 0  # of this call, over all processes
        self.seconds = 0.0  # of the steps of this call, without evaluations, samples and checkpoints
        self.mark = 0.0  # start of the step: rows are loaded after it, evaluations and checkpoints made before it
        self.taken = (0, 0.0)  # tokens and seconds at the last `take_rate`
        self.pace = Pace()
        self.flops_per_token: int | None = None
        self.peak: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        train_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        self.begin_step = state.global_step
        self.begin_tokens = state.num_input_tokens_seen
        if isinstance(model, AndromedaForCausalLM):  # a sharded model cannot count its own parameters
            assert train_dataloader is not None
            seqlen = train_dataloader.dataset[0]["input_ids"].shape[-1]
            self.flops_per_token = training_flops_per_token(model, seqlen)
        peak = peak_flops(args.device) if args.bf16 or args.fp16 else None
        self.peak = None if peak is None else peak * args.world_size
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                file=sys.stderr,
            )
        self.mark = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.mark = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: AndromedaForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        seconds = time.perf_counter() - self.mark
        self.seconds += seconds
        if (advice := self.pace.add(seconds, args.device.type)) and self.bar is not None:
            say(f"step {state.global_step}: {advice}")
        self.tokens = state.num_input_tokens_seen - self.begin_tokens
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(), refresh=False)
            self.bar.update()
            every = self.settings.sample_every
            if every and state.global_step % every == 0 and args.world_size == 1:
                assert model is not None and self.tokenizer is not None  # `train` requires it for samples
                self._show_sample(model, self.tokenizer, state.global_step)
        self.mark = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs:
            return
        if without := logs.get("steps_without_targets"):
            say(
                f"step {state.global_step}: {without} of the last steps had no token to predict (every label is "
                f"{IGNORED_LABEL}); their loss counts as nothing"
            )
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            finite = "" if math.isfinite(loss) else ": it is not finite, look at the rows of the evaluation"
            say(f"step {state.global_step}: evaluation loss {loss:.4f}{finite}")
        elif "loss" in logs:
            self.loss = float(logs["loss"])
            if self.bar.disable:
                rate = self.seconds / max(1, state.global_step - self.begin_step)
                left = (state.max_steps - state.global_step) * rate
                say(f"step {state.global_step}/{state.max_steps}: {self._figures()}, {tqdm.format_interval(left)} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def take_rate(self) -> float | None:
        """Tokens per second since the last call; None if no time has passed."""
        tokens, seconds = self.tokens - self.taken[0], self.seconds - self.taken[1]
        self.taken = (self.tokens, self.seconds)
        return tokens / seconds if seconds else None

    def mfu(self) -> float | None:
        """Model flops utilisation: the model's own flops per second over the peak of all devices."""
        if self.peak is None or self.flops_per_token is None or not self.seconds:
            return None
        return self.tokens * self.flops_per_token / (self.seconds * self.peak)

    def _figures(self) -> str:
        figures = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if self.seconds:
            figures.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        if (mfu := self.mfu()) is not None:
            figures.append(f"MFU {100 * mfu:.1f} %")
        return ", ".join(figures)

    def _show_sample(self, model: AndromedaForCausalLM, tokenizer: PreTrainedTokenizerBase, step: int) -> None:
        text = sample_text(model, tokenizer, self.settings.sample_prompt, tokens=48, seed=self.settings.seed)
        say(f"step {step}: a sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))


def sample_text(
    model: Model, tokenizer: Tokenizer, prompt: str, *, tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """`prompt` and its continuation by `tokens` sampled tokens. Leaves the random generators as they were."""
    tokenizer = hf_tokenizer(tokenizer)
    ids = token_ids(tokenizer, prompt) or [tokenizer.eos_token_id or 0]
    plain = model.to_andromeda() if isinstance(model, AndromedaForCausalLM) else model
    device = next(plain.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    continuation = plain.generate(
        torch.tensor(ids, device=device), tokens, temperature=temperature, generator=generator
    )
    text = tokenizer.decode(continuation.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)  # several sequences would give a list
    return prompt + text
