"""SGLang on a GPU: what a decoding step answered is put away by a short loop, and told in few words.

SGLang's scheduler goes through a dozen calls for each request of each step, one Python process for all:
for 256 requests more than a millisecond, which at short contexts a small model's GPU waits for.
A request is plain that asks for nothing but tokens and their log-probabilities; a step with one that
is not is put away by SGLang's own loop.

An answer tells each log-probability in a list of three; to write and read those of a batch that ends
at once takes a tenth of a second. Requests of ours get them as the bytes of one array, and no text: who
asks has the tokens.

Known for the versions in :data:`KNOWN`; others are left alone.
"""

import base64
import importlib.metadata
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

KNOWN = ("0.5.17", "0.5.18")
"""Versions of SGLang whose own ways these were compared with."""
OURS = "rollflow-"
"""Begins the ids of requests by a client that reads packed log-probabilities."""
LOGPROBS = "output_token_logprobs"
WRITTEN = (
    "rids",
    "decoded_texts",
    "decode_ids",
    "read_offsets",
    "finished_reasons",
    "no_stop_trim",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
"""Of a batch of answers, by request: what their texts are written from."""
End = tuple[int, frozenset[int], int]
"""(length at which an answer ends, tokens that end it, tokens that the model has)."""


def install() -> None:
    """Have SGLang's scheduler put answers away so, in this process, before it runs."""
    if importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.managers.scheduler_components import batch_result_processor, output_streamer

    processor = batch_result_processor.SchedulerBatchResultProcessor
    interval = output_streamer.DEFAULT_FORCE_STREAM_INTERVAL
    whole = processor.process_batch_result_decode
    setattr(processor, whole.__name__, putting_away(whole, interval, traced=_is_traced))
    from sglang.srt.managers import detokenizer_manager

    detokenizer = detokenizer_manager.DetokenizerManager
    texts = detokenizer._decode_batch_token_id_output
    setattr(detokenizer, texts.__name__, writing(texts))


def install_telling() -> None:
    """Have SGLang's HTTP process tell answers so; this one, before it serves."""
    if importlib.metadata.version("sglang") not in KNOWN:
        return
    from sglang.srt.managers import tokenizer_manager

    manager = tokenizer_manager.TokenizerManager
    whole = manager.add_logprob_to_meta_info
    setattr(manager, whole.__name__, packing(whole))


def writing(whole: Callable[[Any, Any], list[str]]) -> Callable[[Any, Any], list[str]]:
    """``whole``, which writes the texts of answers, but for requests of ours: nobody reads theirs."""

    def _decode_batch_token_id_output(self: Any, recv_obj: Any) -> list[str]:
        others = [i for i, rid in enumerate(recv_obj.rids) if not rid.startswith(OURS)]
        texts = [""] * len(recv_obj.rids)
        if others:
            theirs = {name: [getattr(recv_obj, name)[i] for i in others] for name in WRITTEN}
            for i, text in zip(others, whole(self, SimpleNamespace(**theirs)), strict=True):
                texts[i] = text
        return texts

    return _decode_batch_token_id_output


def packing(whole: Callable[..., None]) -> Callable[..., None]:
    """``whole``, which tells log-probabilities as SGLang does, with a short way for plain requests of ours."""

    def add_logprob_to_meta_info(
        self: Any,
        meta_info: dict[str, Any],
        state: Any,
        top_logprobs_num: int,
        token_ids_logprob: Any,
        return_text_in_logprobs: bool,
    ) -> None:
        asked, told = state.obj, state.output_token_logprobs_val
        others = top_logprobs_num or token_ids_logprob is not None or return_text_in_logprobs
        plain = not (others or state.input_token_logprobs_val or asked.stream)
        if not (plain and asked.rid.startswith(OURS)) or None in told:
            rest = (top_logprobs_num, token_ids_logprob, return_text_in_logprobs)
            whole(self, meta_info, state, *rest)
        elif meta_info["finish_reason"] is not None:  # else nobody is told yet
            meta_info[LOGPROBS] = base64.b64encode(array("f", told)).decode()

    return add_logprob_to_meta_info


def told_logprobs(meta: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of an answer's tokens, however its ``meta_info`` tells them."""
    told = meta.get(LOGPROBS) or []
    if isinstance(told, str):
        return array("f", base64.b64decode(told)).tolist()
    return [entry[0] for entry in told]


def putting_away(
    whole: Callable[..., None], interval: int, traced: Callable[[], bool]
) -> Callable[[Any, Any, Any], None]:
    """``whole``, SGLang's loop, with a short one for plain steps.

    ``interval``: tokens after which an answer is handed on. ``traced``: whether times of each step are
    kept.
    """
    known: list[tuple[list[Any], bool, list[End]]] = [([], False, [])]
    """Requests of the last step, whether all were plain, and what ends each: the next has mostly the same."""

    def process_batch_result_decode(self: Any, batch: Any, result: Any) -> None:
        requests = batch.reqs
        if known[0][0] != requests:
            plain = not traced() and all(map(is_plain, requests))
            known[0] = list(requests), plain, list(map(end_of, requests)) if plain else []
        if not (known[0][1] and is_plain_step(self, batch, result)):
            whole(self, batch, result)
            return
        if result.copy_done is not None:
            result.copy_done.synchronize()
        tokens = result.next_token_ids.tolist()
        logprobs = result.logits_output.next_token_logprobs.tolist() if batch.return_logprob else ()
        self.metrics_reporter.num_generated_tokens += len(requests)
        self.token_to_kv_pool_allocator.free_group_begin()
        due = _put_away(self, batch, result, tokens, logprobs, known[0][2], interval)
        if due:
            self.output_streamer.stream_output(due, batch.return_logprob)
        self.token_to_kv_pool_allocator.free_group_end()
        reporter = self.metrics_reporter
        reporter.forward_ct_decode = (reporter.forward_ct_decode + 1) % (1 << 30)
        reporter.report_decode_stats(
            result.can_run_cuda_graph,
            running_batch=batch,
            num_correct_drafts=result.num_correct_drafts,
        )

    return process_batch_result_decode


def _put_away(
    processor: Any,
    batch: Any,
    result: Any,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    ends: Sequence[End],
    interval: int,
) -> list[Any]:
    """Add each token to its request; the requests that have something to hand on."""
    now = time.perf_counter()
    due: list[Any] = []
    for i, request in enumerate(batch.reqs):
        if request.finished_reason is not None or request.is_retracted:
            continue  # it ended a step ago, when this one was already on its way
        token, answer = tokens[i], request.output_ids
        answer.append(token)
        request.time_stats.last_decode_finish_time = now
        limit, stops, vocabulary = ends[i]
        if (
            len(answer) >= limit
            or token in stops
            or not 0 <= token < vocabulary  # what a logit that is no number makes
            or request.to_finish
        ):
            request.update_finish_state(1)
        ended = request.finished_reason is not None
        if ended:
            processor._handle_finish_state_updated_req(
                request, batch, result, i, result.logits_output
            )
        if request.return_logprob:
            kept = request.logprob
            kept.output_token_logprobs_val.append(logprobs[i])
            kept.output_token_logprobs_idx.append(token)
        if ended or len(answer) % interval == 0:
            due.append(request)
    return due


def end_of(request: Any) -> End:
    """Below that length, and but for these tokens, SGLang need not be asked whether the answer ends."""
    asked = request.sampling_params
    if asked.stop_strs or asked.stop_regex_strs:
        return 0, frozenset(), 0
    stops: set[int] = set()
    if not asked.ignore_eos:
        stops |= {*(asked.stop_token_ids or ()), *(request.eos_token_ids or ())}
        if (tokenizer := request.tokenizer) is not None:
            stops |= {tokenizer.eos_token_id, *(tokenizer.additional_stop_token_ids or ())}
    return asked.max_new_tokens, frozenset(stops), request.vocab_size or sys.maxsize


def is_plain(request: Any) -> bool:
    """Whether the request asks for tokens and their log-probabilities alone, in one answer."""
    return not (
        request.stream
        or request.grammar is not None
        or request.require_reasoning
        or request.return_hidden_states
        or request.return_sampling_mask
        or (
            request.return_logprob
            and (
                request.logprob.top_logprobs_num > 0
                or request.logprob.token_ids_logprob is not None
            )
        )
    )


def is_plain_step(processor: Any, batch: Any, result: Any) -> bool:
    """Whether nothing but the next tokens came out of the step, and nothing else is to be kept up."""
    output = result.logits_output
    return not (
        not processor.enable_overlap
        or processor.enable_overlap_mlx
        or processor.hisparse_coordinator is not None
        or processor.decode_offload_manager is not None
        or not batch.spec_algorithm.is_none()
        or batch.has_grammar
        or batch.mamba_track_indices is not None
        or result.routed_experts_output is not None
        or result.indexer_topk_output is not None
        or getattr(output, "customized_info", None) is not None
        or isinstance(result.next_token_ids, list)
    )


def _is_traced() -> bool:
    from sglang.srt.runtime_context import get_observability

    seen = get_observability()
    return bool(seen.enable_metrics or getattr(seen, "enable_trace", False))
