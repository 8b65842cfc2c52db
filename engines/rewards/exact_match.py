"""The answer is the label, or it is not."""

from rollflow.storage.samples import Sample


def exact_match(sample: Sample) -> float:
    """1.0 where the response equals the label, white space at the ends aside, else 0.0.

    Raises ValueError where the sample has no label.
    """
    if sample.label is None:
        raise ValueError(
            f"sample {sample.sample_id}: label is None; exact_match needs a label column in the data"
        )
    return float(sample.response_text.strip() == sample.label.strip())
