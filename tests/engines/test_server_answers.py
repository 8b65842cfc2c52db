"""What decoding steps answered: the short ways put away and tell what SGLang's own do, here on a CPU."""

import ast
import base64
import copy
from array import array
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace

import pytest

from rollflow.engines.gpu.server_answers import (
    WRITTEN,
    packing,
    putting_away,
    told_logprobs,
    writing,
)

DETOKENIZER = "sglang/srt/managers/detokenizer_manager.py"
INTERVAL = 4


def request(rid, *, new_tokens=6, stop=None, **changes):
    """What the scheduler keeps of a request that asks for log-probabilities."""
    found = SimpleNamespace(
        rid=rid,
        output_ids=array("q"),
        finished_reason=None,
        finished_output=False,
        to_finish=None,
        is_retracted=False,
        sampling_params=SimpleNamespace(
            max_new_tokens=new_tokens,
            stop_strs=[],
            stop_regex_strs=[],
            stop_token_ids={stop} if stop else None,
            ignore_eos=False,
        ),
        eos_token_ids=None,
        tokenizer=None,
        vocab_size=100,
        return_logprob=True,
        logprob=SimpleNamespace(
            output_token_logprobs_val=[],
            output_token_logprobs_idx=[],
            top_logprobs_num=0,
            token_ids_logprob=None,
        ),
        time_stats=SimpleNamespace(last_decode_finish_time=0.0),
        stream=False,
        grammar=None,
        require_reasoning=False,
        return_hidden_states=False,
        return_sampling_mask=False,
        released=False,
        asked=0,
    )
    for name, value in changes.items():
        setattr(found, name, value)

    def update_finish_state(count):
        assert count == 1
        found.asked += 1
        if found.output_ids[-1] == stop:
            found.finished_reason = "stop"
        elif len(found.output_ids) >= new_tokens:
            found.finished_reason = "length"

    found.update_finish_state = update_finish_state
    return found


class Tokens(list):
    def tolist(self):
        return list(self)


class Processor:
    """The parts of SGLang's that the loops work on."""

    enable_overlap, enable_overlap_mlx = True, False
    hisparse_coordinator = decode_offload_manager = None

    def __init__(self):
        self.handed_on, self.events = [], []
        self.metrics_reporter = SimpleNamespace(
            num_generated_tokens=0, forward_ct_decode=0, report_decode_stats=self.report
        )
        self.token_to_kv_pool_allocator = SimpleNamespace(
            free_group_begin=lambda: self.events.append("begin"),
            free_group_end=lambda: self.events.append("end"),
        )
        self.output_streamer = SimpleNamespace(stream_output=self.stream)

    def report(self, graph, *, running_batch, num_correct_drafts):
        self.events.append(("report", graph, len(running_batch.reqs), num_correct_drafts))

    def stream(self, requests, return_logprob):
        for one in requests:
            if one.finished_reason is not None and one.finished_output:
                continue
            if one.finished_reason is not None or len(one.output_ids) % INTERVAL == 0:
                one.finished_output = one.finished_reason is not None
                self.handed_on.append((one.rid, list(one.output_ids), one.finished_reason))

    def _handle_finish_state_updated_req(self, one, batch, result, i, output):
        one.released = one.finished_reason is not None


def whole(self, batch, result):
    """SGLang's loop, for what the tests' requests ask for."""
    self.events.append("whole")
    tokens = result.next_token_ids.tolist()
    logprobs = result.logits_output.next_token_logprobs.tolist()
    self.metrics_reporter.num_generated_tokens += len(batch.reqs)
    self.token_to_kv_pool_allocator.free_group_begin()
    for i, one in enumerate(batch.reqs):
        if one.finished_reason is not None or one.is_retracted:
            continue
        one.output_ids.extend([tokens[i]])
        one.time_stats.last_decode_finish_time = 1.0
        one.update_finish_state(1)
        self._handle_finish_state_updated_req(one, batch, result, i, result.logits_output)
        one.logprob.output_token_logprobs_val.append(logprobs[i])
        one.logprob.output_token_logprobs_idx.append(tokens[i])
    self.output_streamer.stream_output(batch.reqs, batch.return_logprob)
    self.token_to_kv_pool_allocator.free_group_end()
    self.metrics_reporter.forward_ct_decode += 1
    self.metrics_reporter.report_decode_stats(
        result.can_run_cuda_graph, running_batch=batch, num_correct_drafts=0
    )


short = putting_away(whole, INTERVAL, traced=lambda: False)


def step(requests, tokens, **changes):
    batch = SimpleNamespace(
        reqs=requests,
        return_logprob=True,
        has_grammar=False,
        mamba_track_indices=None,
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
    )
    result = SimpleNamespace(
        next_token_ids=SimpleNamespace(tolist=lambda: list(tokens)),
        logits_output=SimpleNamespace(
            next_token_logprobs=Tokens([-t / 8 for t in tokens]), customized_info=None
        ),
        can_run_cuda_graph=True,
        num_correct_drafts=0,
        copy_done=None,
        routed_experts_output=None,
        indexer_topk_output=None,
    )
    for name, value in changes.items():
        setattr(batch if hasattr(batch, name) else result, name, value)
    return batch, result


def run(loop, steps):
    """What is kept and handed on after some steps over four requests, one of which was retracted."""
    processor = Processor()
    requests = [
        request("a"),
        request("b", new_tokens=3),
        request("c", stop=7),
        request("d", is_retracted=True, output_ids=array("q", [1])),
    ]
    for tokens in steps:
        loop(processor, *step(requests, tokens))
    kept = [
        (list(r.output_ids), r.finished_reason, r.released, copy.copy(vars(r.logprob)))
        for r in requests
    ]
    reporter = processor.metrics_reporter
    events = [event for event in processor.events if event != "whole"]
    return kept, processor.handed_on, reporter.num_generated_tokens, events


def test_the_short_loop_keeps_and_hands_on_what_the_whole_one_does():
    steps = [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 1, 2, 3],
        [4, 5, 6, 7],
        [7, 7, 7, 7],
        [8, 8, 8, 8],
        [1] * 4,
    ]
    found = run(short, steps)
    assert found == run(whole, steps)
    assert [rid for rid, _, reason in found[1] if reason] == ["c", "b", "a"]


def sampled(**changes):
    asked = vars(request("a").sampling_params) | changes
    return {"sampling_params": SimpleNamespace(**asked)}


ENDS = SimpleNamespace(eos_token_id=8, additional_stop_token_ids={9})


@pytest.mark.parametrize(
    ("changes", "token", "expected"),
    [
        ({}, 7, 0),
        (sampled(max_new_tokens=1), 7, 1),
        (sampled(stop_token_ids={7}), 7, 1),
        (sampled(stop_strs=["7"]), 7, 1),
        (sampled(stop_regex_strs=["7"]), 7, 1),
        ({"eos_token_ids": {7}}, 7, 1),
        ({"eos_token_ids": {7}, **sampled(ignore_eos=True)}, 7, 0),
        ({"tokenizer": ENDS}, 7, 0),
        ({"tokenizer": ENDS}, 8, 1),
        ({"tokenizer": ENDS}, 9, 1),
        ({"tokenizer": ENDS, **sampled(ignore_eos=True)}, 8, 0),
        ({}, 100, 1),
        ({}, -1, 1),
        ({"vocab_size": None}, 100, 0),
        ({"to_finish": "aborted"}, 7, 1),
    ],
)
def test_sglang_is_asked_whether_an_answer_ends_where_it_may(changes, token, expected):
    one = request("a", **changes)
    putting_away(whole, INTERVAL, traced=lambda: False)(Processor(), *step([one], [token]))
    assert one.asked == expected
    assert list(one.output_ids) == [token]


@pytest.mark.parametrize(
    "changes",
    [
        {"stream": True},
        {"grammar": object()},
        {"require_reasoning": True},
        {"return_hidden_states": True},
        {"return_sampling_mask": True},
        {"logprob": SimpleNamespace(top_logprobs_num=2, token_ids_logprob=None,
                                    output_token_logprobs_val=[], output_token_logprobs_idx=[])},
        {"logprob": SimpleNamespace(top_logprobs_num=0, token_ids_logprob=[1],
                                    output_token_logprobs_val=[], output_token_logprobs_idx=[])},
    ],
)  # fmt: skip
def test_a_request_that_asks_for_more_has_its_steps_put_away_by_sglang(changes):
    processor, plain = Processor(), request("a")
    for requests in ([plain], [plain, request("b", **changes)], [plain]):
        short(processor, *step(requests, [1] * len(requests)))
    assert processor.events.count("whole") == 1
    assert list(plain.output_ids) == [1, 1, 1]


def test_what_ends_a_request_is_not_that_of_another_of_its_name():
    loop = putting_away(whole, INTERVAL, traced=lambda: False)
    first, second = request("a"), request("a", stop=7)
    for one in (first, second):
        loop(Processor(), *step([one], [7]))
    assert (first.finished_reason, second.finished_reason) == (None, "stop")


@pytest.mark.parametrize(
    "changes",
    [
        {"has_grammar": True},
        {"mamba_track_indices": object()},
        {"spec_algorithm": SimpleNamespace(is_none=lambda: False)},
        {"routed_experts_output": object()},
        {"next_token_ids": Tokens([1])},
    ],
)
def test_a_step_with_more_than_tokens_is_put_away_by_sglang(changes):
    processor = Processor()
    short(processor, *step([request("a")], [1], **changes))
    assert processor.events[0] == "whole"


def asked(rid="rollflow-1", **changes):
    state = SimpleNamespace(
        obj=SimpleNamespace(rid=rid, stream=False),
        input_token_logprobs_val=[],
        output_token_logprobs_val=[-0.5, -0.1],
    )
    for name, value in changes.items():
        setattr(state, name, value)
    return state


def told(state, *, finish={"type": "stop"}, top=0):  # noqa: B006 - it is not changed
    meta = {"finish_reason": finish}

    def plain(self, meta, state, *_):
        meta["output_token_logprobs"] = [(v, 1, None) for v in state.output_token_logprobs_val]

    packing(plain)(None, meta, state, top, None, False)
    return meta


def test_requests_of_ours_are_told_log_probabilities_in_one_string_and_read_the_same():
    values = array("f", [-0.5, -0.1, -17.25]).tolist()
    packed = told(asked(output_token_logprobs_val=values))
    assert isinstance(packed["output_token_logprobs"], str)
    assert told_logprobs(packed) == values
    assert told_logprobs(told(asked("theirs", output_token_logprobs_val=values))) == values
    assert told_logprobs({}) == []
    assert told_logprobs({"output_token_logprobs": base64.b64encode(b"").decode()}) == []


@pytest.mark.parametrize(
    "state",
    [
        asked("theirs"),
        asked(input_token_logprobs_val=[-1.0]),
        asked(output_token_logprobs_val=[-0.5, None]),
        asked(obj=SimpleNamespace(rid="rollflow-1", stream=True)),
    ],
)
def test_others_and_what_is_more_than_that_is_told_as_sglang_does(state):
    assert isinstance(told(state)["output_token_logprobs"], list)
    assert isinstance(told(asked(), top=1)["output_token_logprobs"], list)


def test_nothing_is_told_before_the_end():
    assert told(asked(), finish=None) == {"finish_reason": None}


def test_texts_are_written_for_requests_of_others_alone():
    def whole(_self, batch):
        assert {len(values) for values in vars(batch).values()} == {2}
        return [f"{rid}:{ids}" for rid, ids in zip(batch.rids, batch.decode_ids, strict=True)]

    rids = ["rollflow-1", "theirs", "rollflow-2", "other"]
    batch = SimpleNamespace(**{name: [0, 1, 2, 3] for name in WRITTEN} | {"rids": rids})
    assert writing(whole)(None, batch) == ["", "theirs:1", "", "other:3"]
    ours = SimpleNamespace(**{name: [0] for name in WRITTEN} | {"rids": ["rollflow-1"]})
    assert writing(lambda *_: pytest.fail("nobody reads it"))(None, ours) == [""]


def test_what_sglang_writes_texts_from_is_handed_on():
    file = Path(str(distribution("sglang").locate_file(DETOKENIZER)))
    [write] = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_decode_batch_token_id_output"
    ]
    read = {
        node.attr
        for node in ast.walk(write)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "recv_obj"
    }
    assert read == set(WRITTEN)
