"""Break the algorithms on purpose, one way at a time, and see which test notices (`make mutants`).

Each mutant is one edit of the source in a copy of the tree; its tests run in a fork of a process
that has imported torch already. The result is `mutants.json` beside this file; the exit code is 1
where a mutant survives.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
RESULT = Path(__file__).with_name("mutants.json")
MATHS = (
    "test_policy",
    "test_losses",
    "test_returns",
    "test_advantages",
    "test_reduction",
    "test_kl",
)
ALGORITHMS = "engines/algorithms"


@dataclass(frozen=True, slots=True)
class Mutant:
    """``old`` in ``file`` becomes ``new``."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    # losses
    Mutant("sign of the policy loss", "losses", "free_T = -ratio_T", "free_T = ratio_T"),
    Mutant("ratio upside down: old and new policy swapped", "losses",
           "token_log_ratio_T = logprobs_T - old_logprobs_T.detach()",
           "token_log_ratio_T = old_logprobs_T.detach() - logprobs_T"),
    Mutant("no clip", "losses", "torch.maximum(free_T, bound_T), bound_T > free_T",
           "free_T, bound_T > free_T"),
    Mutant("minimum for maximum", "losses", "torch.maximum(free_T, bound_T), bound_T",
           "torch.minimum(free_T, bound_T), bound_T"),
    Mutant("lower bound used on both sides", "losses",
           "free_T = -ratio_T * advantages_T\n    bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)",
           "free_T = -ratio_T * advantages_T\n    bound_T = -ratio_T.clamp(1 - eps_clip, 1 + eps_clip)"),
    Mutant("dual clip where the advantage is positive", "losses", "(advantages_T < 0) & (loss_T",
           "(advantages_T > 0) & (loss_T"),
    Mutant("dual clip dropped", "losses", "torch.where(above_T, ceiling_T, loss_T)", "loss_T"),
    Mutant("GSPO by token", "losses", "if segments_T is not None:", "if segments_T is None:"),
    Mutant("GSPO without the gradient of the mean", "losses",
           "segment_mean(token_log_ratio_T, segments_T)",
           "segment_mean(token_log_ratio_T.detach(), segments_T) + token_log_ratio_T - token_log_ratio_T.detach()"),
    Mutant("CISPO's weight keeps its gradient", "losses",
           "log_ratio_T = (logprobs_T - old_logprobs_T).detach()",
           "log_ratio_T = logprobs_T - old_logprobs_T.detach()"),
    Mutant("CISPO without bounds", "losses",
           "weight_T = ratio_T.clamp(1 - eps_clip, 1 + eps_clip_high)", "weight_T = ratio_T * 1"),
    Mutant("value clip dropped", "losses", "torch.maximum(free_T, bound_T) / 2", "free_T / 2"),
    Mutant("value loss without the half", "losses", "torch.maximum(free_T, bound_T) / 2",
           "torch.maximum(free_T, bound_T)"),
    Mutant("sign of the supervised loss", "losses", "return -logprobs_T", "return logprobs_T"),
    # terms and corrections
    Mutant("entropy pushed down", "policy", "loss_T - config.entropy_coef", "loss_T + config.entropy_coef"),
    Mutant("KL pushed away", "policy", "loss_T + config.kl_coef * kl_T", "loss_T - config.kl_coef * kl_T"),
    Mutant("KL weight of the old policy forgotten", "policy",
           "kl_T = kl_T * (inputs.logprobs_T - old_T).clamp(-20.0, 20.0).exp()", "kl_T = kl_T * 1"),
    Mutant("importance weight missing", "policy", "loss_T = loss_T * factor_T", "loss_T = loss_T * 1"),
    Mutant("importance weight upside down", "importance",
           "old_logprobs_T.detach() - rollout_logprobs_T.detach()",
           "rollout_logprobs_T.detach() - old_logprobs_T.detach()"),
    Mutant("truncation forgets the lower bound", "importance", "weight_T.clamp(low, high)",
           "weight_T.clamp(max=high)"),
    Mutant("sequence weight is the mean", "importance", "log_weight_T = segment_sum(",
           "log_weight_T = segment_mean("),
    Mutant("a rejected sample loses only its bad tokens", "importance",
           "rejected_T = segment_sum(outside_T.to(weight_T.dtype), segments_T) > 0",
           "rejected_T = outside_T"),
    Mutant("off-policy mask drops good tokens", "importance", "(advantages_T < 0) &", "(advantages_T > 0) &"),
    Mutant("off-policy distance upside down", "importance",
           "rollout_logprobs_T.detach() - logprobs_T.detach()",
           "logprobs_T.detach() - rollout_logprobs_T.detach()"),
    Mutant("masked tokens are looked at", "policy", "trained_T = inputs.weights_T > 0",
           "trained_T = inputs.weights_T > -1"),
    # KL
    Mutant("k3 upside down", "kl", "(-limited_T).expm1() + limited_T", "limited_T.expm1() - limited_T"),
    Mutant("k2 without the half", "kl", "log_ratio_T.square() / 2", "log_ratio_T.square()"),
    Mutant("low-variance KL without its bound", "kl", ".clamp(max=_LOW_VAR_LIMIT)", " * 1"),
    # advantages
    Mutant("all samples are one group", "advantages", "group_N, groups = _numbered(groups_N, device)",
           "group_N, groups = _numbered([0] * len(groups_N), device)"),
    Mutant("siblings count each", "advantages", "range(len(groups_N)) if episodes_N is None else episodes_N",
           "range(len(groups_N))"),
    Mutant("biased std", "advantages", "(groups.size_G - 1).clamp(min=1)\n        advantages_N",
           "groups.size_G.clamp(min=1)\n        advantages_N"),
    Mutant("leave-one-out keeps the one", "advantages",
           "groups.sum(groups.rewards_E)[groups.group_E] - groups.rewards_E",
           "groups.sum(groups.rewards_E)[groups.group_E]"),
    Mutant("mean not subtracted", "advantages", "rewards_N.double() - mean_G[groups.group_N]",
           "rewards_N.double() - 0 * mean_G[groups.group_N]"),
    # returns
    Mutant("reward at the first token", "segments", "last_T[:-1] = segments_T[1:] != segments_T[:-1]",
           "last_T[1:] = segments_T[1:] != segments_T[:-1]"),
    Mutant("GAE's lambda forgotten", "returns", "gamma * lam)", "gamma)"),
    Mutant("value of the next token not discounted", "returns", "+ gamma * following", "+ following"),
    Mutant("value after the last token is the next sample's", "segments",
           "return next_T.masked_fill(is_last(segments_T), 0.0)", "return next_T"),
    Mutant("sums run over samples' borders", "segments", "later = sums_T[span:] * same", "later = sums_T[span:]"),
    Mutant("KL added to the reward", "returns", "rewards_T - penalties_T", "rewards_T + penalties_T"),
    Mutant("teacher and student swapped", "policy", "teacher_T.double() - old_T.double()",
           "old_T.double() - teacher_T.double()"),
    Mutant("whitening without the mean", "returns", "((a.double() - mean) / scale)", "(a.double() / scale)"),
    Mutant("whitening on each rank alone", "returns", "if all_reduce:", "if False and all_reduce:"),
    Mutant("whitening counts masked tokens", "returns", "own = [a.double()[k]", "own = [a.double()[k | True]"),
    # reduction
    Mutant("token mean for sequence mean", "reduction",
           'return [1 / (samples * tokens) if tokens',
           'return [1 / sum(trained_tokens_N) if tokens'),
    Mutant("samples without a token are counted", "reduction",
           "samples = sum(tokens > 0 for tokens in trained_tokens_N)", "samples = len(trained_tokens_N)"),
    Mutant("episodes reduced as samples", "reduction", "1 / (episodes * tokens_E[episode])",
           "1 / (episodes * tokens)"),
    # from samples to tokens
    Mutant("mask shifted by one", "engines/megatron/batch.py", "trained_m=place_m - 1", "trained_m=place_m - 2"),
    Mutant("target is the token itself", "engines/megatron/batch.py", "targets_m=tokens[place_m]",
           "targets_m=tokens[place_m - 1]"),
    Mutant("loss mask ignored", "engines/megatron/batch.py",
           "torch.tensor(sample.loss_mask, dtype=torch.bool)",
           "torch.ones(len(sample.loss_mask), dtype=torch.bool)"),
]  # fmt: skip


sys.dont_write_bytecode = True  # a mutant may have the size and the second of another


def main() -> int:
    """Run every mutant (or those whose names have a given word); the number of survivors decides."""
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    with tempfile.TemporaryDirectory(prefix="rollflow-mutants-") as scratch:
        tree = Path(scratch) / "tree"
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for name in files:
            if (ROOT / name).is_symlink() or (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        sys.path[:0] = [str(tree / ".src"), str(tree)]
        os.chdir(tree)
        _import_what_tests_share()
        found = [_judge(mutant, tree) for mutant in chosen]
    if not words:
        RESULT.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    survivors = [one["mutant"] for one in found if not one["killed_by"]]
    print(f"{len(found)} mutants, {len(survivors)} survive: {survivors}")
    return bool(survivors)


def _judge(mutant: Mutant, tree: Path) -> dict[str, str]:
    path = mutant.file if "/" in mutant.file else f"{ALGORITHMS}/{mutant.file}.py"
    file = tree / path
    source = file.read_text()
    assert source.count(mutant.old) == 1, (
        f"{mutant.name}: {source.count(mutant.old)} x {mutant.old!r}"
    )
    file.write_text(source.replace(mutant.old, mutant.new))
    try:
        killed_by = _tests(_test_files(path), tree / "killed_by")
    finally:
        file.write_text(source)
    print(f"{mutant.name:50} {killed_by or 'SURVIVES'}", flush=True)
    return {"mutant": mutant.name, "file": path, "killed_by": killed_by}


def _test_files(path: str) -> list[str]:
    if path.startswith("engines/megatron"):
        return ["tests/engines/megatron/test_batch.py"]
    first = f"test_{Path(path).stem}"
    ordered = sorted(MATHS, key=lambda name: name != first)
    return [f"tests/{ALGORITHMS}/{name}.py" for name in ordered]


def _tests(files: list[str], note: Path) -> str:
    """The first test that fails, in a fork; empty where all pass."""
    note.write_text("")
    child = os.fork()
    if child == 0:
        os.environ["ROLLFLOW_HYPOTHESIS"] = "mutants"
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        import pytest

        pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[_Note(note)])
        os._exit(0)
    os.waitpid(child, 0)
    return note.read_text()


class _Note:
    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "failed", False) and not self._file.read_text():
            self._file.write_text(str(getattr(report, "nodeid", "")))

    def pytest_collectreport(self, report: object) -> None:
        self.pytest_runtest_logreport(report)


def _import_what_tests_share() -> None:
    import warnings

    import hypothesis  # noqa: F401
    import pytest  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
