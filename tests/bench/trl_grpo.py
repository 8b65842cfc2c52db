"""TRL's GRPO on what ``rollflow bench --only gpu`` measures: the same shape, counts, lengths and reward.

TRL is no dependency of rollflow: run it with an environment of its own that has trl, datasets and a
transformers that this TRL takes, ``python tests/bench/trl_grpo.py --generation paged``. ``plain`` is
transformers' generate, ``paged`` its continuous batching. Prints one line of JSON: seconds of an iteration,
its parts, and reward per second of wall-clock time.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

SHAPES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "heads": 16},
}
VOCABULARY = 151936
PROMPTS, SAMPLES, PROMPT_TOKENS = 32, 8, 64


def random_model(shape):
    sizes: dict[str, Any] = {**SHAPES[shape], "rope_theta": 1e6}
    heads = sizes.pop("heads")
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        **sizes,
    )
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.generation_config.update(pad_token_id=0, eos_token_id=None)
    return model


def tokenizer_without_end():
    """A word for each token; the end has an id that the model cannot draw, so answers have full length."""
    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}, "<end>": VOCABULARY}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def share_of_even_tokens(completion_ids, **_):
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and of the generation within it."""

    def __init__(self):
        self.steps, self.generations, self.last = [], [], 0.0

    def on_train_begin(self, *_, **__):
        self.last = now()

    def on_optimizer_step(self, *_, **__):
        moment = now()
        self.steps.append(moment - self.last)
        self.last = moment


class TimedTrainer(trl.GRPOTrainer):
    clock: Clock

    def _generate_single_turn(self, *args, **kwargs):
        started = now()
        answers = super()._generate_single_turn(*args, **kwargs)
        self.clock.generations.append(now() - started)
        return answers


def now():
    torch.cuda.synchronize()
    return time.perf_counter()


def main():
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--generation", choices=("plain", "paged"), default="plain")
    words.add_argument("--shape", choices=tuple(SHAPES), default="0.6b")
    words.add_argument("--new-tokens", type=int, default=512)
    words.add_argument("--steps", type=int, default=3)
    words.add_argument("--rows", type=int, default=16, help="samples in a micro-batch")
    asked = words.parse_args()
    draw = random.Random(0)
    torch.manual_seed(0)
    texts = [
        " ".join(f"w{draw.randrange(1, VOCABULARY)}" for _ in range(PROMPT_TOKENS))
        for _ in range(PROMPTS * (asked.steps + 1))
    ]
    clock = Clock()
    trainer = TimedTrainer(
        model=random_model(asked.shape),
        reward_funcs=share_of_even_tokens,
        args=trl.GRPOConfig(
            output_dir=".rollflow/trl",
            per_device_train_batch_size=asked.rows,
            gradient_accumulation_steps=PROMPTS * SAMPLES // asked.rows,
            num_generations=SAMPLES,
            max_completion_length=asked.new_tokens,
            learning_rate=1e-6,
            max_steps=asked.steps,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            temperature=1.0,
            beta=0.0,
            gradient_checkpointing=False,
            use_transformers_continuous_batching=asked.generation == "paged",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=tokenizer_without_end(),
        callbacks=[clock],
    )
    trainer.clock = clock
    trainer.train()
    settled = slice(1, None) if asked.steps > 1 else slice(None)
    step_s = statistics.median(clock.steps[settled])
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    facts = {
        "generation": asked.generation,
        "shape": asked.shape,
        "iteration_s": step_s,
        "iterations_s": clock.steps,
        "generate_s": statistics.median(clock.generations[settled]),
        "reward_per_s": rewards[-1] / step_s,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        "trl": trl.__version__,
        "transformers": transformers.__version__,
        "card": torch.cuda.get_device_name(),
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
