"""Settings of the storage layer, and the base that every settings class of rollflow shares."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .refusals import CREDENTIALS, refuse_secrets


class Config(BaseModel):
    """Frozen settings; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StoreConfig(Config):
    """Where runs are kept."""

    model_config = ConfigDict(hide_input_in_errors=True)

    url: str = ".rollflow/store"
    """Any fsspec URL: a folder, ``s3://bucket/prefix``, ``memory://...``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """fsspec storage options, e.g. ``{endpoint_url = "http://127.0.0.1:9000"}``. Credentials do not
    belong here: they come from the environment or the provider's standard chain."""
    max_retries: int = Field(default=7, ge=0)
    """Times that an operation is tried again after a transient fault of the store."""
    retry_backoff_s: float = Field(default=0.2, gt=0)
    """Pause before the first retry; each further one doubles."""

    @field_validator("url")
    @classmethod
    def _url_has_no_secret(cls, url: str) -> str:
        user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
        if at and ":" in user:
            raise ValueError(f"the address holds a password; {CREDENTIALS}")
        return url

    @field_validator("options")
    @classmethod
    def _options_have_no_secret(cls, options: dict[str, Any]) -> dict[str, Any]:
        refuse_secrets(options)
        return options


class DataConfig(Config):
    """A prompt dataset."""

    path: str
    """JSONL or Parquet file, any fsspec URL; ``path@[a:b]`` takes rows a to b-1."""
    prompt_key: str = "prompt"
    """Column with the prompt: text, or a list of chat messages."""
    label_key: str = "label"
    metadata_key: str = "metadata"
    apply_chat_template: bool = False
    """Render prompts by the tokenizer's chat template (a text prompt becomes one user message)."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run, or is skipped, counted and shown."""
    shuffle: bool = True
    """A new order each epoch, derived from ``seed`` and the epoch's number."""
    seed: int = 0
    max_prompt_tokens: int | None = Field(default=None, gt=0)
    """Longer prompts count as bad rows."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the draws that this source gets where ``sources`` names others beside it."""
