"""TRL's GRPO on what ``rollflow bench --only gpu`` measures: the same weights, prompts, lengths and reward.

TRL is no dependency of rollflow: run it with an environment of its own that has trl, datasets and a
transformers that this TRL takes, ``python tests/bench/trl_grpo.py .rollflow/throughput/0.6b --generation
paged``, in a folder that ``rollflow bench`` has made, or that has its files. Weights are written beside its
config.json unless there are some, and the bench takes those. ``plain`` is transformers' generate, ``paged``
its continuous batching. Prints one line of JSON: seconds of an iteration, its parts, and reward per second
of wall-clock time.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainerCallback

PROMPTS, SAMPLES = 32, 8


def model_of(folder):
    """In bfloat16; random weights are written to the folder where it has none."""
    if not list(folder.glob("*.safetensors")):
        with torch.device("cuda"):
            made = Qwen3ForCausalLM._from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
            )
        made.save_pretrained(folder)
    model = Qwen3ForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    )
    model.generation_config.update(eos_token_id=None)
    return model


def tokenizer_without_end(folder, vocabulary):
    """The folder's, but for its end: an id that the model cannot draw, so answers have full length."""
    inner = json.loads((folder / "tokenizer.json").read_text())
    inner["model"]["vocab"]["<end>"] = vocabulary
    inner["post_processor"] = None
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        pad_token=json.loads((folder / "tokenizer_config.json").read_text())["pad_token"],
        eos_token="<end>",
        padding_side="left",
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
    words.add_argument("folder", type=Path, help="with model/ and train.jsonl")
    words.add_argument("--generation", choices=("plain", "paged"), default="plain")
    words.add_argument("--new-tokens", type=int, default=512)
    words.add_argument("--steps", type=int, default=3)
    words.add_argument("--rows", type=int, default=16, help="samples in a micro-batch")
    asked = words.parse_args()
    torch.manual_seed(0)
    rows = map(json.loads, (asked.folder / "train.jsonl").open())
    prompts = [row["prompt"] for row in itertools.islice(rows, PROMPTS * (asked.steps + 1))]
    model = model_of(asked.folder / "model")
    clock = Clock()
    trainer = TimedTrainer(
        model=model,
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
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer_without_end(asked.folder / "model", model.config.vocab_size),
        callbacks=[clock],
    )
    trainer.clock = clock
    trainer.train()
    settled = slice(1, None) if asked.steps > 1 else slice(None)
    step_s = statistics.median(clock.steps[settled])
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    facts = {
        "generation": asked.generation,
        "model": str(asked.folder),
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
