"""The data buffer: where a step's prompts come from, and where what was begun waits to go on.

Prompts come from sources that are mixed by weight, each in an order that is a pure function of its
seed. A group that was cut, or finished one too many, is *put back*; its samples stay in the log, in
the parts of the step that began it, and the buffer knows it by name. So the buffer is small, and
what it holds after a crash follows from the log: the state that the newest manifest keeps, without
what was issued since.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from .kept import Kept
from .ledger import Issue, read_issue
from .manifests import batch_folder, batch_steps, find_batch, read_manifest
from .objects import Store
from .order import draw_from
from .prompts import PromptSet
from .refs import RunRef
from .samples import Prompt


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt to generate, and the group that it goes on from, if any."""

    prompt: Prompt
    continues: Kept | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Prompts under a name, e.g. their file's."""

    name: str
    prompts: PromptSet
    weight: float = 1.0
    seed: int = 0
    shuffle: bool = True


Priority = Callable[[Kept], float]
"""The lowest is drawn first; among equals the one that waits longest."""
Filter = Callable[[Sequence[Kept], int], Iterable[Kept]]
"""Which of the waiting groups may be drawn, given the step."""
Curriculum = Callable[[int, Mapping[str, float]], Mapping[str, float]]
"""Weights of the sources for a step, given the step and the weights that the settings name."""


@dataclass(frozen=True, slots=True)
class BufferState:
    """All that a buffer has to remember."""

    cursors: dict[str, int] = field(default_factory=dict[str, int])
    """Draws so far, by source."""
    kept: list[Kept] = field(default_factory=list[Kept])
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    """Groups that were not continued, by reason; their prompts were drawn anew."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "BufferState":
        """The opposite of :meth:`to_json`."""
        kept = [Kept(**entry) for entry in record.get("kept", [])]
        return cls(dict(record.get("cursors", {})), kept, dict(record.get("dropped", {})))

    def after(self, issues: Iterable[Issue]) -> "BufferState":
        """This state once the issues were drawn, whether it knew of them already or not."""
        cursors = dict(self.cursors)
        taken: set[str] = set()
        for issue in issues:
            for name, position in issue.cursors.items():
                cursors[name] = max(position, cursors.get(name, 0))
            taken |= {group.continues for group in issue.groups if group.continues}
        return BufferState(
            cursors, [k for k in self.kept if k.group_id not in taken], dict(self.dropped)
        )


def first_in(kept: Kept) -> float:
    """First in, first out."""
    return 0.0


def oldest_policy(kept: Kept) -> float:
    """What old weights began comes first, before it is too old; prompts alone come last."""
    return float("inf") if kept.oldest_version is None else kept.oldest_version


def newest_policy(kept: Kept) -> float:
    """What the newest weights began comes first."""
    return -oldest_policy(kept)


PRIORITIES: dict[str, Priority] = {
    "first_in": first_in,
    "oldest_policy": oldest_policy,
    "newest_policy": newest_policy,
}


class DataBuffer:
    """Draws prompts for steps; ``batch_size`` shapes the order where an epoch ends within a batch.

    ValueError where two sources share a name or all weights are 0.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        batch_size: int,
        priority: Priority = first_in,
        may_draw: Filter | None = None,
        curriculum: Curriculum | None = None,
        state: BufferState | None = None,
    ) -> None:
        names = [source.name for source in sources]
        if twice := sorted(name for name, n in Counter(names).items() if n > 1):
            raise ValueError(f"two sources are named {twice[0]!r}; prompts are known by file name")
        self._sources = {source.name: source for source in sources}
        self._weights = _checked({s.name: s.weight for s in sources}, self._sources)
        self._batch_size = batch_size
        self._priority, self._may_draw, self._curriculum = priority, may_draw, curriculum
        self._prompts = {p.prompt_id: p for s in sources for p in s.prompts.prompts}
        state = state or BufferState()
        self._cursors = {name: state.cursors.get(name, 0) for name in names}
        self._kept = list(state.kept)
        self._dropped = Counter(state.dropped)

    def draw(self, n: int, step: int, oldest: int) -> list[Draw]:
        """Take ``n`` prompts for a step: those that wait first, then new ones.

        A waiting group with tokens of weights before version ``oldest`` cannot go on; its prompt is
        drawn anew and the group is counted in ``state().dropped``.
        """
        waiting = list(self._kept if self._may_draw is None else self._may_draw(self._kept, step))
        chosen = sorted(waiting, key=self._priority)[:n]
        taken = {kept.group_id for kept in chosen}
        self._kept = [kept for kept in self._kept if kept.group_id not in taken]
        draws = [self._again(kept, oldest) for kept in chosen]
        weights = self._weights
        if self._curriculum is not None:
            weights = _checked(self._curriculum(step, dict(weights)), self._sources)
        return draws + [Draw(prompt) for prompt in self._new(n - len(draws), weights)]

    def put_back(self, kept: Sequence[Kept]) -> None:
        """Let groups wait until a later step draws them."""
        self._kept += kept

    def prompt(self, prompt_id: str) -> Prompt:
        """The prompt of that name; ValueError where no source has it any more."""
        try:
            return self._prompts[prompt_id]
        except KeyError:
            raise ValueError(
                f"prompt {prompt_id} was issued but no data source has it; have the data files "
                "changed since the run began?"
            ) from None

    def state(self) -> BufferState:
        """What to keep with the step."""
        return BufferState(dict(self._cursors), list(self._kept), dict(self._dropped))

    def epochs(self) -> dict[str, int]:
        """How many times each source was gone through."""
        return {
            name: self._cursors[name] // len(source.prompts.prompts)
            for name, source in self._sources.items()
        }

    def _again(self, kept: Kept, oldest: int) -> Draw:
        prompt = self.prompt(kept.prompt_id)
        if kept.oldest_version is None:
            return Draw(prompt)
        if kept.oldest_version < oldest:
            self._dropped["too old"] += 1
            return Draw(prompt)
        return Draw(prompt, kept)

    def _new(self, n: int, weights: Mapping[str, float]) -> list[Prompt]:
        counts: Counter[str] = Counter()
        names: list[str] = []
        total = sum(weights.values())
        # Under a curriculum shares change, so each draw is shared out by itself.
        before = dict.fromkeys(weights, 0) if self._curriculum else self._cursors
        begun = sum(before.values())
        for i in range(n):
            # The source that is furthest behind its share; among equals the first.
            behind = {
                name: weight / total * (begun + i + 1) - before[name] - counts[name]
                for name, weight in weights.items()
                if weight
            }
            name = max(behind, key=lambda key: behind[key])
            counts[name] += 1
            names.append(name)
        drawn = {name: iter(self._advance(name, count)) for name, count in counts.items()}
        return [next(drawn[name]) for name in names]

    def _advance(self, name: str, count: int) -> list[Prompt]:
        source, start = self._sources[name], self._cursors[name]
        rows = len(source.prompts.prompts)
        self._cursors[name] = start + count
        places = draw_from(
            rows, start, count, self._batch_size, seed=source.seed, shuffle=source.shuffle
        )
        return [source.prompts.prompts[i] for i in places]


def _checked(weights: Mapping[str, float], known: Mapping[str, Source]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in known:
            raise ValueError(f"weight of {name!r}, which is no source; there is {sorted(known)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight of source {name!r} is {weight}; give a number from 0 on")
    if not sum(weights.values()):
        raise ValueError(f"all weights of the sources {sorted(known)} are 0; give one a share")
    return {name: weights.get(name, 0.0) for name in known}


def stored_state(store: Store, run: RunRef) -> BufferState:
    """The buffer's state by the log: what the newest manifest keeps, and what was issued since."""
    state = BufferState()
    issues: list[Issue] = []
    for step in reversed(batch_steps(store, run)):
        if find_batch(store, run, step) is not None:
            manifest = read_manifest(store, batch_folder(run, step))
            state = BufferState.from_json(manifest["ledger"].get("buffer", {}))
            break
        with suppress(FileNotFoundError):
            issues.append(read_issue(store, run, step))
    return state.after(issues)
