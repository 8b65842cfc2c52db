"""Which draws are made by one kernel, and that SGLang's settings name it."""

from types import SimpleNamespace

import pytest

from rollflow.engines.gpu.sampler import is_plain

PLAIN = {
    "is_all_greedy": False,
    "need_top_p_sampling": False,
    "need_top_k_sampling": False,
    "need_min_p_sampling": False,
    "sampling_seed": None,
}


@pytest.mark.parametrize(
    ("changes", "top", "ids", "expected"),
    [
        ({}, [0, 0], [None, None], True),
        ({}, [], [], True),
        *(({name: True}, [0], [None], False) for name in PLAIN),
        ({"return_sampling_masks": [False, True]}, [0, 0], [None, None], False),
        ({}, [0, 3], [None, None], False),
        ({}, [0, 0], [None, [7]], False),
    ],
)
def test_a_draw_is_plain_where_every_request_asks_for_its_own_logprob_alone(
    changes, top, ids, expected
):
    assert is_plain(SimpleNamespace(**(PLAIN | changes)), top, ids) is expected
