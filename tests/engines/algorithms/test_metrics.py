import torch

from rollflow.engines.algorithms.metrics import Metrics, max_of, mean_of, weighted_mean_of


def piece(*values):
    tensor = torch.tensor(values)
    return Metrics({"a": mean_of(tensor)}, {"b": max_of(tensor)})


def test_merged_pieces_describe_the_whole():
    merged = Metrics().merge(piece(1.0, 2.0)).merge(piece(6.0)).merge(piece())
    assert merged.values() == {"a": 3.0, "b": 6.0}


def test_a_name_on_one_side_only_is_kept():
    other = Metrics({"c": mean_of(torch.tensor([5.0]))})
    assert piece(1.0).merge(other).values() == {"a": 1.0, "b": 1.0, "c": 5.0}


def test_reduction_over_ranks_gives_every_rank_the_whole_in_two_collectives():
    ranks = [piece(1.0, 2.0), piece(6.0)]
    calls = []

    def with_the_other_rank(tensor, operation):
        calls.append(operation)
        other = ranks[1].means["a"] if operation == "sum" else ranks[1].maxima["b"]
        if operation == "sum":
            tensor += other
        else:
            torch.maximum(tensor, other, out=tensor)

    assert ranks[0].reduce(with_the_other_rank).values() == {"a": 3.0, "b": 6.0}
    assert calls == ["sum", "max"]
    assert ranks[0].values() == {"a": 1.5, "b": 2.0}


def test_a_mean_over_nothing_is_zero():
    assert piece().values() == {"a": 0.0, "b": 0.0}


def test_a_weighted_mean_is_divided_by_its_weights():
    pair = weighted_mean_of(torch.tensor([1.0, 5.0]), torch.tensor([0.75, 0.25]))
    assert Metrics({"w": pair}).merge(Metrics({"w": pair})).values() == {"w": 2.0}
