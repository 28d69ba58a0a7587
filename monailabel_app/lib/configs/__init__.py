"""What the viewers show of each task: labels and the options panel."""

SEGMENTS = 16
"""Anonymous labels declared up front; also the most segments of a slice."""


def anonymous_labels() -> dict[str, int]:
    """segment_01..segment_16: a zero-shot segment has no name of its own."""
    return {f"segment_{k:02d}": k for k in range(1, SEGMENTS + 1)}
