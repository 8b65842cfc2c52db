"""Weights inside an SGLang server on a GPU: loaded from a bucket, and told the checksums of, all at once.

SGLang takes the hundreds of tensors of a model one by one, each with its own search, launch and wait.
A bucket that fits goes into the parameters by one copy, and checksums take one launch. What does not
fit is left to SGLang, and what was loaded is verified by checksum after each push either way. The answer
to the last bucket tells the checksums, so that a push is one request.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rollflow.engines.server_names import server_name

from .server_sums import checksums
from .told import told

Places = list[Tensor]
"""The bytes of parameters that the tensors of a bucket fill, one after the other."""
Held = tuple[str, Mapping[str, Tensor | None], str, Tensor]
"""A tensor of a model: its name, the table of its module that it stands in, its name there, itself."""
PADDED_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def install() -> None:
    """Make SGLang's weight updater and checker do so in this process, before its model is built."""
    from sglang.srt.managers.scheduler_components import weight_updater as scheduler
    from sglang.srt.model_executor.model_runner_components import weight_updater
    from sglang.srt.utils import weight_checker

    manager = scheduler.SchedulerWeightUpdaterManager
    updater, checker = weight_updater.WeightUpdater, weight_checker.WeightChecker
    update = manager.update_weights_from_tensor
    load, check = updater._update_weights_from_flattened_bucket, checker._compute_checksum
    setattr(updater, load.__name__, _loading(load))
    setattr(checker, check.__name__, _checking(check, weight_checker))
    setattr(manager, update.__name__, _telling(update))


def places_of(parameters: Mapping[str, Tensor], metadata: Sequence[Any]) -> Places | None:
    """Where the tensors of a bucket belong, under SGLang's names; None where that is not plain.

    ``metadata`` has name, type, ``start_idx`` and ``end_idx`` of each, as SGLang's flattened buckets do.
    Plain is a parameter that its tensors fill, in their order, but for rows that SGLang pads a
    vocabulary with.
    """
    places: Places = []
    filled: dict[str, int] = {}
    for meta in metadata:
        name, place = server_name(meta.name)
        target = parameters.get(name)
        if target is None or not target.is_contiguous() or target.dtype is not meta.dtype:
            return None
        flat_B = target.detach().flatten().view(torch.uint8)
        start, size = filled.get(name, 0), meta.end_idx - meta.start_idx
        if (place == 0) is not (start == 0) or start + size > len(flat_B):
            return None
        places.append(flat_B[start : start + size])
        filled[name] = start + size
    ends = [meta.end_idx for meta in metadata]
    if [0, *ends[:-1]] != [meta.start_idx for meta in metadata]:
        return None
    whole = all(
        size == parameters[name].nbytes or name.endswith(PADDED_VOCABULARY)
        for name, size in filled.items()
    )
    return places if whole else None


def padding_of(parameters: Mapping[str, Tensor], metadata: Sequence[Any]) -> Places:
    """The bytes of the rows that SGLang pads the vocabularies in a bucket with. They must be zero, and
    hold anything where weights are random or a server has slept."""
    sizes = {server_name(meta.name)[0]: meta.end_idx - meta.start_idx for meta in metadata}
    return [
        parameters[name].detach().flatten().view(torch.uint8)[size:]
        for name, size in sizes.items()
        if name.endswith(PADDED_VOCABULARY) and size < parameters[name].nbytes
    ]


def copy_into(places: Places, bucket_B: Tensor) -> None:
    """Fill the places, which follow each other in the bucket, in the widest words that all have."""
    sizes = [len(target) for target in places]
    offsets = [tensor.storage_offset() for tensor in (bucket_B, *places)]
    wide = not any(n % 8 for n in (*sizes, *offsets))
    dtype = torch.int64 if wide else torch.uint8
    sources = bucket_B.view(dtype).split([n // dtype.itemsize for n in sizes])
    targets = [target.view(dtype) for target in places]
    torch._foreach_copy_(targets, list(sources))  # pyright: ignore[reportPrivateImportUsage]


def _loading(load: Callable[..., tuple[bool, str]]) -> Callable[..., tuple[bool, str]]:
    known: dict[tuple[str, ...], tuple[Places, Places] | None] = {}
    """By the names in a bucket: where its tensors go, and the padding behind them."""

    def load_bucket(self: Any, flattened_tensor_bucket_dict: Mapping[str, Any]) -> tuple[bool, str]:
        bucket_B = flattened_tensor_bucket_dict["flattened_tensor"]
        metadata = flattened_tensor_bucket_dict["metadata"]
        names = tuple(meta.name for meta in metadata)
        if names not in known:
            parameters = dict(self.get_model().named_parameters())
            places = places_of(parameters, metadata)
            known[names] = None if places is None else (places, padding_of(parameters, metadata))
        if (found := known[names]) is None:
            return load(self, flattened_tensor_bucket_dict=flattened_tensor_bucket_dict)
        with torch.no_grad():
            copy_into(found[0], bucket_B)
            for rows_B in found[1]:
                rows_B.zero_()
        if bucket_B.is_cuda:
            torch.cuda.current_stream().synchronize()  # the bucket's owner takes it back
        return True, "Success"

    return load_bucket


def is_alone(manager: Any) -> bool:
    """Whether the scheduler of this updater holds all weights of its server, and no others."""
    return (
        manager.draft_worker is None and torch.distributed.get_world_size(manager.tp_cpu_group) == 1
    )


def tell(manager: Any) -> str:
    """What the server of this updater, which is alone, holds now; it forgets keys and values of older weights."""
    flushed = bool(manager.flush_cache(empty_cache=False))
    found = manager.tp_worker.model_runner.check_weights(action="checksum")
    return told(found["checksums"], flushed=flushed)


def _telling(update: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def update_weights_from_tensor(self: Any, recv_req: Any) -> Any:
        """SGLang's, which says what the server holds once the last bucket, with a version, is in."""
        answer = update(self, recv_req)
        if answer.success and recv_req.weight_version is not None and is_alone(self):
            answer.message += tell(self)
        return answer

    return update_weights_from_tensor


def _checking(check: Callable[[Any], dict[str, Any]], module: Any) -> Callable[[Any], Any]:
    known: dict[int, list[Held]] = {}
    """By checker, what it compared last: to find it takes longer than to sum it up."""

    def compute_checksum(self: Any) -> dict[str, Any]:
        held = known.get(id(self), [])
        if not _still_there(held):
            held = known[id(self)] = _held(self._get_model(), _compared(self, module))
        if not held:
            return check(self)
        sums = checksums([tensor for *_, tensor in held])
        found = dict(zip((name for name, *_ in held), sums, strict=True))
        return module.ChecksumInfo(
            checksums=found,
            per_gpu_checksum=_of_all(found),
            parallelism_info=self._parallelism_info(),
        ).model_dump()

    return compute_checksum


def _compared(checker: Any, module: Any) -> list[str]:
    """Names of the tensors that SGLang would compare; none where that is not plain, or not on a GPU."""
    model, state = checker._get_model(), dict(checker._model_state())
    if module._build_quantized_set(model) or not all(t.is_cuda for t in state.values()):
        return []
    skipped = {name for name, t in state.items() if getattr(t, "_skip_weight_check", False)}
    entries = module._build_check_entries(state, skipped)
    return [entry.name for entry in entries if entry.should_compare]


def _held(model: Any, names: Sequence[str]) -> list[Held]:
    """The tensors of those names as they stand in the model."""
    found: list[Held] = []
    for name in names:
        path, _, key = name.rpartition(".")
        part = model.get_submodule(path)
        table = part._parameters if key in part._parameters else part._buffers
        found.append((name, table, key, table[key]))
    return found


def _still_there(held: Sequence[Held]) -> bool:
    """Whether the model has these very tensors, and there are some."""
    return bool(held) and all(table.get(key) is tensor for _, table, key, tensor in held)


def _of_all(told: Mapping[str, str]) -> str:
    """As SGLang sums them up."""
    digest = hashlib.sha256()
    for name in sorted(told):
        digest.update(name.encode())
        digest.update(told[name].encode())
    return digest.hexdigest()
