"""What a flow prints when nobody reads it any more."""

import os
from contextlib import suppress

import pytest

from rollflow.flows.terminal import Unbreakable


def test_a_flow_outlives_the_reader_of_its_output():
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w", buffering=1)
    with pytest.raises(BrokenPipeError):
        stream.write("a line\n")
    survivor = Unbreakable(stream)
    print("a line", file=survivor, flush=True)
    assert survivor.encoding == stream.encoding
    with suppress(BrokenPipeError):  # what was never read is given up
        stream.close()
