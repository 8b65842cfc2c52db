"""Weights as files: a version is there whole or not at all, and old ones go."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollflow.engines import published
from rollflow.engines.checksums import weights_digest
from rollflow.engines.published import Publication, find, place_of, publish_files, version_of
from rollflow.engines.weights import push
from rollflow.storage.config import StoreConfig
from rollflow.storage.objects import Store
from rollflow.storage.refs import RunRef

LAYER = "model.layers.0.self_attn."


@pytest.fixture
def named():
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [(f"{LAYER}{name}.weight", torch.randn(8, 8)) for name in names]


@pytest.fixture
def model(tmp_path: Path, named) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(dict(named), folder / "model.safetensors")
    return folder


@pytest.fixture(params=["folder", "object store"])
def place(request, tmp_path: Path) -> str:
    kind = request.param
    return (
        str(tmp_path / "weights/run") if kind == "folder" else f"memory://weights/{tmp_path.name}"
    )


def test_a_version_is_found_once_it_is_whole_and_says_what_a_server_then_holds(place, model, named):
    publication = Publication(place, 7, model)
    passing = publication.passing(named)
    result = push(passing, [], 7, timeout_s=1)
    assert find(place, 7) is None
    publication.finish(result.digest, {"a": "1"})
    found = find(place, 7)
    assert found
    assert (found.version, found.digest) == (7, weights_digest(named))
    assert found.checksums == {"a": "1"}
    assert version_of(found.label) == version_of("7") == 7
    store = Store(StoreConfig(url=place))
    names = {url.rpartition("/")[2] for url in store.list("v000007")}
    assert names == {"config.json", "model.safetensors", published.MARKER}


def test_the_trainers_push_publishes_what_a_server_must_say(place, model, named):
    push(named, [], 3, timeout_s=1, publication=Publication(place, 3, model))
    found = find(place, 3)
    assert found
    assert found.checksums.keys() == {f"{LAYER}qkv_proj.weight", f"{LAYER}o_proj.weight"}
    assert found == publish_files(place, 3, model, "float32")


def test_the_newest_two_versions_stay(place, model, named):
    for version in range(4):
        push(named, [], version, timeout_s=1, publication=Publication(place, version, model))
    assert [find(place, version) is not None for version in range(4)] == [False, False, True, True]
    published.remove_all(place)
    assert find(place, 3) is None


def test_a_version_is_written_anew_over_the_one_of_an_earlier_attempt(place, model, named):
    first = publish_files(place, 5, model, "float32")
    changed = [(name, tensor + 1) for name, tensor in named]
    push(changed, [], 5, timeout_s=1, publication=Publication(place, 5, model))
    second = find(place, 5)
    assert second
    assert second.label != first.label


def test_the_files_hold_the_weights_in_as_many_shards_as_are_needed(
    tmp_path: Path, model, named, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(published, "SHARD_BYTES", 300)
    found = publish_files(str(tmp_path / "w"), 0, model, "bfloat16")
    shards = sorted(Path(found.url).glob("*.safetensors"))
    assert len(shards) == 2
    held = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert held.keys() == dict(named).keys()
    assert all(torch.equal(held[name], tensor.bfloat16()) for name, tensor in named)


def test_runs_of_one_name_in_two_stores_have_places_of_their_own():
    first, second = (place_of("/w/", RunRef("run", f"/{store}/runs/run")) for store in "ab")
    assert first != second
    assert first.startswith("/w/run-")
