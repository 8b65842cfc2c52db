import functools
import hashlib
import importlib
import sys

import pytest

from rollflow.engines.hooks import (
    Completion,
    GenerateContext,
    hook_version,
    is_async,
    load_hook,
    parse_reward,
)
from rollflow.storage.samples import Prompt, Status

SOURCE = """
import functools

def reward(sample):
    return 1.0

async def reward_async(sample):
    return {"reward": 1.0, "length": 0.5}

def reward_with_option(sample, scale=1.0):
    return scale

def no_argument():
    return 1.0

def two_arguments(sample, label):
    return 1.0

def keyword_needed(sample, *, scale):
    return scale

class Grader:
    def __call__(self, sample):
        return 1.0

class Episode:
    async def __call__(self, engine, prompt, context):
        return None

grader, episode = Grader(), Episode()
constant = 1.0

async def generate(engine, prompt, context):
    return None

def traced(fn):
    @functools.wraps(fn)
    def wrapper(*args):
        return fn(*args)
    return wrapper

wrapped = traced(generate)
bound = functools.partial(two_arguments, label="4")

def generate_blocking(engine, prompt, context):
    return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of hooks that can be imported for the time of one test."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, source=SOURCE):
        (tmp_path / f"{name}.py").write_text(source)
        written.append(name)
        importlib.invalidate_caches()
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name", ["reward", "reward_async", "reward_with_option", "grader", "bound"]
)
def test_whatever_takes_one_sample_is_a_reward(module, name):
    assert load_hook(f"{module('hooks_a')}:{name}", "reward") is getattr(
        sys.modules["hooks_a"], name
    )


@pytest.mark.parametrize("name", ["generate", "episode", "wrapped"])
def test_whatever_takes_engine_prompt_and_context_and_is_async_generates(module, name):
    assert callable(load_hook(f"{module('hooks_b')}:{name}", "generate"))


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("hooks_c", "reward", "not of the form 'pkg.mod:fn'"),
        ("hooks_c:", "reward", "not of the form 'pkg.mod:fn'"),
        (".hooks_c:reward", "reward", "cannot be imported"),
        ("hooks_absent:reward", "reward", "No module named 'hooks_absent'"),
        ("hooks_c:rewrd", "reward", "did you mean 'reward'"),
        ("hooks_c:constant", "reward", "is of type float, not a function"),
        ("hooks_c:Grader", "reward", "is a class"),
        ("hooks_c:no_argument", "reward", r"cannot be called with \(sample\)"),
        ("hooks_c:two_arguments", "reward", "missing a required argument: 'label'"),
        ("hooks_c:keyword_needed", "reward", "missing a required argument: 'scale'"),
        ("hooks_c:reward", "generate", r"cannot be called with \(engine, prompt, context\)"),
        ("hooks_c:generate_blocking", "generate", "is not async"),
    ],
)
def test_a_bad_hook_is_refused_with_the_reason_and_the_signature_expected(
    module, path, kind, message
):
    module("hooks_c")
    with pytest.raises(ValueError, match=message) as refusal:
        load_hook(path, kind)
    assert repr(path) in str(refusal.value)
    assert f"def {kind}(" in str(refusal.value)


def test_a_module_that_cannot_be_read_is_refused_with_its_error(module):
    module("hooks_d", "def reward(sample:\n")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_hook("hooks_d:reward", "reward")


def test_an_error_inside_the_users_module_is_not_hidden(module):
    module("hooks_e", "raise RuntimeError('no licence file')")
    with pytest.raises(ValueError, match="no licence file"):
        load_hook("hooks_e:reward", "reward")


def test_async_hooks_are_told_from_plain_ones(module):
    name = module("hooks_f")
    loaded = importlib.import_module(name)
    assert is_async(loaded.reward_async) and is_async(loaded.episode) and is_async(loaded.wrapped)
    assert not is_async(loaded.reward) and not is_async(loaded.grader)
    assert is_async(functools.partial(loaded.generate, "engine"))


def test_the_version_names_the_file_that_defines_the_hook(module, tmp_path):
    module("hooks_g")
    module("hooks_h", "from hooks_g import reward, grader\n")
    digest = hashlib.sha256((tmp_path / "hooks_g.py").read_bytes()).hexdigest()[:12]
    assert hook_version("hooks_g:reward") == f"hooks_g:reward@{digest}"
    assert hook_version("hooks_h:reward") == f"hooks_h:reward@{digest}"
    assert hook_version("hooks_g:grader") == f"hooks_g:grader@{digest}"


def test_the_version_changes_with_the_file(module):
    module("hooks_i", "LIMIT = 1\ndef reward(sample):\n    return LIMIT\n")
    before = hook_version("hooks_i:reward")
    sys.modules.pop("hooks_i")
    module("hooks_i", "LIMIT = 2\ndef reward(sample):\n    return LIMIT\n")
    assert hook_version("hooks_i:reward") != before


def test_a_hook_without_a_file_has_no_version():
    with pytest.raises(ValueError, match="no file"):
        hook_version("sys:getrefcount")


@pytest.mark.parametrize(
    ("result", "parsed"),
    [
        (1, (1.0, {})),
        (True, (1.0, {})),
        (0.25, (0.25, {})),
        ({"reward": 1, "format": 0.5}, (1.0, {"format": 0.5})),
    ],
)
def test_a_reward_is_a_number_or_a_mapping_with_a_reward(result, parsed):
    assert parse_reward(result) == parsed


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "reward = None"),
        ("1.0", "reward = '1.0'"),
        (float("nan"), "reward = nan"),
        ({"score": 1.0}, r"keys \['score'\]"),
        ({"reward": 1.0, "format": float("inf")}, "format = inf"),
    ],
)
def test_any_other_reward_is_refused(result, message):
    with pytest.raises(ValueError, match=message):
        parse_reward(result)


PROMPT = Prompt("train.jsonl:7", 7, "train.jsonl", "2+2=", "4", {"level": 1, "topic": "sum"})
CONTEXT = GenerateContext(
    run="arithmetic",
    step=12,
    group_id="000012/train.jsonl:7",
    index=3,
    seed=99,
    sampling={"temperature": 1.0},
    policy_version=5,
    engine="sglang 0.5.18",
    template="abc",
)


def test_the_context_fills_in_identity_and_provenance():
    sample = CONTEXT.sample(
        PROMPT,
        "2+2=",
        [1, 2],
        [3, 4],
        "4",
        [-0.1, -0.2],
        status=Status.COMPLETED,
        finish_reason="stop",
        metadata={"level": 2},
        cached_tokens=1,
        generate_s=0.5,
    )
    assert sample.sample_id == sample.episode_id == "000012/train.jsonl:7#3"
    assert (sample.run, sample.step, sample.prompt_id, sample.source_row) == (
        "arithmetic",
        12,
        "train.jsonl:7",
        7,
    )
    assert (sample.loss_mask, sample.policy_versions) == ([True, True], [5, 5])
    assert (sample.label, sample.metadata) == ("4", {"level": 2, "topic": "sum"})
    assert (sample.seed, sample.sampling) == (99, {"temperature": 1.0})
    assert (sample.engine, sample.template) == ("sglang 0.5.18", "abc")
    assert (sample.cached_tokens, sample.generate_s, sample.reward) == (1, 0.5, None)


def test_an_episode_of_several_turns_gives_its_own_mask_and_versions():
    sample = CONTEXT.sample(
        PROMPT,
        "2+2=",
        [1],
        [3, 4],
        "4",
        [-0.1, 0.0],
        status=Status.TRUNCATED,
        finish_reason="length",
        loss_mask=[True, False],
        policy_versions=[4, 5],
    )
    assert (sample.loss_mask, sample.policy_versions) == ([True, False], [4, 5])


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="rollout_logprobs has 1 entries for 2 response tokens"):
        CONTEXT.sample(
            PROMPT, "", [1], [3, 4], "", [-0.1], status=Status.COMPLETED, finish_reason="stop"
        )


async def test_a_hook_written_to_the_contract_runs_against_an_engine(module):
    module(
        "hooks_j",
        """
from rollflow.storage.samples import Status

async def generate(engine, prompt, context):
    ids = engine.encode(prompt)
    answer = await engine.generate(ids, context.sampling, context.seed)
    text = engine.tokenizer.decode(answer.token_ids)
    return context.sample(
        prompt, prompt.prompt, ids, answer.token_ids, text, answer.logprobs,
        status=Status.COMPLETED, finish_reason=answer.finish_reason,
    )
""",
    )

    class Tokenizer:
        def decode(self, ids):
            return "".join(map(chr, ids))

    class Engine:
        tokenizer = Tokenizer()
        judge_url = ""

        def encode(self, prompt):
            return [ord(c) for c in prompt.prompt]

        def render(self, prompt, messages, *, add_generation_prompt=True):
            raise NotImplementedError

        async def generate(self, input_ids, sampling, seed):
            return Completion([ord("4")], [-0.25], "stop", 5)

    sample = await load_hook("hooks_j:generate", "generate")(Engine(), PROMPT, CONTEXT)
    assert not isinstance(sample, list)
    assert (sample.response_text, sample.rollout_logprobs) == ("4", [-0.25])
