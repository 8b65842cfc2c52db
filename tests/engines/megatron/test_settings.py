"""The [megatron] table reaches megatron-core's classes, or is refused by name."""

import pytest

from rollflow.engines.megatron.settings import split_settings


def test_each_name_goes_to_every_class_that_has_it():
    settings = split_settings({"lr": 1e-3, "attention_dropout": 0.0, "bucket_size": 4})
    assert settings.optimizer == {"lr": 1e-3}
    assert settings.transformer == {"attention_dropout": 0.0}
    assert settings.ddp == {"bucket_size": 4}
    both = split_settings({"use_distributed_optimizer": False})
    assert both.optimizer == both.ddp == {"use_distributed_optimizer": False}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        ({"bf16": True}, "megatron.bf16.*model.dtype"),
        ({"hidden_size": 64}, "megatron.hidden_size.*config.json"),
        ({"virtual_pipeline_model_parallel_size": 2}, "not supported"),
        ({"context_parallel_size": 0}, "counts ranks"),
        ({"sequence_parallel": True}, "tensor_model_parallel_size is 1"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(table, words):
    with pytest.raises(ValueError, match=words):
        split_settings(table)


def test_ranks_must_divide_by_the_model_parallel_width():
    assert split_settings({}).data_parallel(3) == 3
