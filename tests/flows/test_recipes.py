"""The arithmetic recipe's data."""

import json

from rollflow.flows.recipes import arithmetic


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_training_and_heldout_sums_are_disjoint_and_together_all(tmp_path):
    files = arithmetic.make(tmp_path, heldout=300, seed=1)
    train = {r["prompt"] for r in rows(files.train)}
    heldout = {r["prompt"] for r in rows(files.heldout)}
    assert len(heldout) == 300
    assert len(train) == 8100 - 300
    assert not train & heldout


def test_the_label_is_the_sum_with_its_units_digit_first(tmp_path):
    files = arithmetic.make(tmp_path)
    for row in rows(files.heldout):
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(row["label"][::-1]) == int(a) + int(b)


def test_the_same_seed_makes_the_same_files(tmp_path):
    one, two = arithmetic.make(tmp_path / "a", seed=3), arithmetic.make(tmp_path / "b", seed=3)
    assert one.train.read_bytes() == two.train.read_bytes()


def test_the_tokenizer_takes_one_token_per_character_and_gives_the_text_back(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arithmetic.make(tmp_path).model)
    ids = tokenizer("47+85=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "47+85="
    assert tokenizer.eos_token_id == arithmetic.MODEL["eos_token_id"]
