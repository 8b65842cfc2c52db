"""Samples survive the way to Arrow and back exactly; what cannot is refused by name."""

from dataclasses import fields, replace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollflow.storage.samples import Sample, Status
from rollflow.storage.schema import SCHEMA, from_table, to_table
from rollflow.storage.shards import decode, encode

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
REAL = st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def any_sample(draw) -> Sample:
    n = draw(st.integers(0, 5))

    def per_token(values):
        return draw(st.lists(values, min_size=n, max_size=n))

    status = draw(st.sampled_from(Status))
    prompt_ids = draw(st.lists(INT32, max_size=4))
    experts = 2 * max(len(prompt_ids) + n - 1, 1)
    return Sample(
        run=draw(TEXT),
        step=draw(INT64),
        group_id=draw(TEXT),
        index=draw(INT64),
        prompt_id=draw(TEXT),
        source_row=draw(INT64),
        episode_id=draw(TEXT),
        prompt_text=draw(TEXT),
        response_text=draw(TEXT),
        prompt_ids=prompt_ids,
        response_ids=per_token(INT32),
        loss_mask=per_token(st.booleans()),
        rollout_logprobs=per_token(st.floats(width=32, allow_nan=False)),
        policy_versions=per_token(INT32),
        status=status,
        finish_reason=draw(TEXT),
        reward=None if status is Status.FAILED else draw(st.none() | REAL),
        reward_parts=draw(st.dictionaries(TEXT, REAL, max_size=3)),
        grader=draw(TEXT),
        label=draw(st.none() | TEXT),
        metadata=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        sampling=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        seed=draw(INT64),
        engine=draw(TEXT),
        template=draw(TEXT),
        generate_s=draw(REAL),
        score_s=draw(REAL),
        cached_tokens=draw(INT64),
        previous_reward=draw(st.none() | REAL),
        previous_grader=draw(TEXT),
        routed_experts=draw(st.none() | st.binary(min_size=experts, max_size=experts)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(any_sample(), max_size=5))
def test_samples_come_back_exactly(samples):
    table = to_table(samples)
    table.validate(full=True)
    back = from_table(decode(encode(table), "part"))
    assert back == samples
    assert repr(back) == repr(samples)  # -0.0, True or 1, order of keys
    assert encode(to_table(back)) == encode(table)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(any_sample(), min_size=2, max_size=6), st.data())
def test_a_slice_or_a_table_in_several_chunks_reads_the_same(samples, data):
    table = to_table(samples)
    cut = data.draw(st.integers(0, len(samples)))
    assert from_table(table.slice(cut)) == samples[cut:]
    assert from_table(pa.concat_tables([table.slice(0, cut), table.slice(cut)])) == samples


def test_every_field_of_a_sample_is_a_column_in_the_same_order():
    assert SCHEMA.names == [field.name for field in fields(Sample)]
    assert SCHEMA.metadata == {b"rollflow.schema": b"3"}


def test_log_probabilities_are_rounded_to_float32_and_nothing_else_is(make_sample):
    sample = replace(make_sample(0, 0, 1), rollout_logprobs=[-0.1], reward=0.1, generate_s=0.1)
    [back] = from_table(to_table([sample]))
    assert back.rollout_logprobs == [-0.10000000149011612]
    assert (back.reward, back.generate_s) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metadata", {"pair": (1, 2)}),
        ("metadata", {1: "one"}),
        ("sampling", {"temperature": float("nan")}),
        ("metadata", {"set": {1}}),
        ("seed", 2**63),
        ("prompt_ids", [2**31]),
        ("prompt_ids", [None]),
        ("response_text", "\ud800"),
        ("label", 4),
        ("reward_parts", {"a": "much"}),
        ("reward_parts", {"a": None}),
        ("policy_versions", [1, 2.5, 3]),
        ("engine", None),
        ("routed_experts", "text" * 3),
    ],
)
def test_a_value_that_would_not_come_back_is_refused_by_name(make_sample, field, value):
    good, bad = make_sample(0, 0), replace(make_sample(7, 1), **{field: value})
    with pytest.raises(ValueError, match=rf"sample 000003/train.jsonl:7#1: {field}"):
        to_table([good, bad])


def test_a_table_of_another_schema_is_refused(make_sample):
    table = to_table([make_sample(0, 0)])
    with pytest.raises(ValueError, match=r"rollflow.schema is 4; .* reads 1 to 3"):
        from_table(table.replace_schema_metadata({"rollflow.schema": "4"}))
    with pytest.raises(ValueError, match=r"rollflow.schema is none"):
        from_table(table.replace_schema_metadata(None))
    with pytest.raises(ValueError, match=r"\['seed'\]"):
        from_table(table.drop_columns(["seed"]))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_arrow_file_are_refused_by_name(data):
    with pytest.raises(ValueError, match="part-x: expected an Arrow file"):
        decode(data, "part-x")
