"""Prompt files of both formats, and rows that are none."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollflow.storage.config import DataConfig
from rollflow.storage.prompts import BadRow, load_prompts

ROWS = [
    {"prompt": f"{i}+1=", "label": i + 1, "metadata": {"i": i}, "level": "easy"} for i in range(5)
]


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(params=["jsonl", "parquet"])
def file(request, tmp_path):
    write = {"jsonl": write_jsonl, "parquet": write_parquet}[request.param]
    return write(tmp_path / f"data.{request.param}", ROWS)


def load(store, path, **settings):
    return load_prompts(store, DataConfig(path=path, **settings))


def test_both_formats_give_the_same_prompts(store, file):
    prompts = load(store, file).prompts
    name = Path(file).name
    assert [p.prompt for p in prompts] == [f"{i}+1=" for i in range(5)]
    assert [p.label for p in prompts] == ["1", "2", "3", "4", "5"]
    assert prompts[2].metadata == {"i": 2, "level": "easy"}
    assert [(p.prompt_id, p.row) for p in prompts] == [(f"{name}:{i}", i) for i in range(5)]
    assert prompts[0].source == file


@pytest.mark.parametrize(
    ("slice_", "rows"), [("[1:3]", [1, 2]), ("[:2]", [0, 1]), ("[3:]", [3, 4])]
)
def test_a_slice_keeps_the_numbers_of_the_whole_file(store, file, slice_, rows):
    assert [p.row for p in load(store, f"{file}@{slice_}").prompts] == rows


@pytest.mark.parametrize("slice_", ["[3:9]", "[2:2]", "[4:1]", "[1]", "[-1:]", "[a:b]"])
def test_a_slice_that_is_not_inside_the_file_is_refused(store, file, slice_):
    with pytest.raises(ValueError, match="slice"):
        load(store, f"{file}@{slice_}")


def test_prompts_are_read_from_any_url_packed_or_not(store, tmp_path):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    url = store.put_atomic("data/train.jsonl", data)
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(data))
    assert [p.prompt for p in load(store, url).prompts] == [
        p.prompt for p in load(store, str(packed)).prompts
    ]


def test_a_relative_path_is_relative_to_the_working_directory(store, file, monkeypatch):
    monkeypatch.chdir(Path(file).parent)
    assert load(store, Path(file).name).prompts == load(store, file).prompts


def test_keys_can_be_remapped_and_messages_are_prompts(store, tmp_path):
    messages = [{"role": "user", "content": "2+2="}]
    row = {"question": messages, "answer": 4.5, "extra": {"a": [1]}, "prompt": "another column"}
    path = write_jsonl(tmp_path / "x.jsonl", [row])
    keys = {"prompt_key": "question", "label_key": "answer", "metadata_key": "extra"}
    [prompt] = load(store, path, **keys).prompts
    assert prompt.prompt == messages
    assert prompt.label == "4.5"
    assert prompt.metadata == {"a": [1], "prompt": "another column"}


def test_a_row_needs_neither_label_nor_metadata(store, tmp_path):
    [prompt] = load(store, write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a"}])).prompts
    assert prompt.label is None
    assert prompt.metadata == {}


def test_blank_lines_are_no_rows_and_line_numbers_count_them(store, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\u2028b"}\r\n\n  \n{"prompt": 1}\n')
    with pytest.raises(ValueError, match=r"x.jsonl line 4 \(row 1\): prompt is 1; give text"):
        load(store, str(path))


BAD = [
    ('{"prompt": "a"', "is no JSON"),
    (b'{"prompt": "\xff"}', "is no JSON"),
    ('["a"]', "not an object"),
    ('{"text": "a"}', r"has no column 'prompt', only \['text'\]"),
    ('{"prompt": null}', "prompt is None"),
    ('{"prompt": ""}', "prompt is ''"),
    ('{"prompt": []}', r"prompt is \[\]"),
    ('{"prompt": [{"content": "a"}]}', r"prompt\[0\] is .* not a message with a role"),
    ('{"prompt": [{"role": "user", "content": 7}]}', r"prompt\[0\].content is 7"),
    ('{"prompt": "\\ud800"}', "prompt is no valid Unicode"),
    ('{"prompt": "a", "label": [1]}', r"label is \[1\]"),
    ('{"prompt": "a", "metadata": "x"}', "metadata is 'x'; give an object"),
    ('{"prompt": "a", "metadata": {"k": 1}, "k": 2}', "'k' is a column and a key"),
    ('{"prompt": "a", "k": NaN}', "k: nan is no JSON value"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_row_stops_with_file_line_and_reason_or_is_skipped_and_listed(
    store, tmp_path, line, reason
):
    path = tmp_path / "bad.jsonl"
    bad = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "good"}\n' + bad + b'\n{"prompt": "good"}\n')
    with pytest.raises(ValueError, match=rf"bad.jsonl line 2 \(row 1\): .*{reason}.*on_bad_row"):
        load(store, str(path))
    kept = load(store, str(path), on_bad_row="skip")
    assert [p.row for p in kept.prompts] == [0, 2]
    [skipped] = kept.skipped
    assert skipped == BadRow(f"{path} line 2 (row 1)", skipped.reason)


def test_a_bad_row_of_a_parquet_file_is_named(store, tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"x.parquet row 1: prompt is None"):
        load(store, path)


def test_rows_outside_of_the_slice_may_be_bad(store, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": None}])
    assert len(load(store, f"{path}@[0:1]").prompts) == 1


def test_a_caller_may_reject_rows_for_reasons_of_its_own(store, file):
    def too_long(prompt):
        return "9 tokens, more than max_prompt_tokens = 8" if prompt.row == 3 else None

    with pytest.raises(ValueError, match=r"row 3\)?: 9 tokens"):
        load_prompts(store, DataConfig(path=file), too_long)
    kept = load_prompts(store, DataConfig(path=file, on_bad_row="skip"), too_long)
    assert [p.row for p in kept.prompts] == [0, 1, 2, 4]


def test_a_dataset_without_a_usable_row_is_refused(store, tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": None}])
    with pytest.raises(ValueError, match=r"no usable row \(1 skipped, the first: .*line 1"):
        load(store, path, on_bad_row="skip")


def test_a_file_that_is_not_there_not_known_or_not_what_it_says_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(store, str(tmp_path / "none.jsonl"))
    for name, reason in (("x.csv", "neither"), ("x.parquet", "no Parquet file")):
        (tmp_path / name).write_text("a,b")
        with pytest.raises(ValueError, match=reason):
            load(store, str(tmp_path / name))
