"""Where a long recording is cut: segments of one length, each beginning a little before the one before it ends."""

from __future__ import annotations

SLACK = 1.5  # a recording up to this many segments long stays whole


def cut(seconds: float, length: float, overlap: float) -> list[tuple[float, float]]:
    """Start and end in seconds of the segments of a recording; none where it stays whole.

    All have ``length`` seconds: the last one begins earlier instead of being shorter. A recording that grows keeps its
    first segments.

    Args:
        seconds: duration of the recording; 0 where it is not known.
        length: of a segment; 0 leaves every recording whole.
        overlap: share of a segment that the next one has too, below 1.
    """
    if not length or seconds <= SLACK * length:
        return []
    step = length * (1 - overlap)
    count = int((seconds - length) // step) + 1
    starts = [k * step for k in range(count)]
    if seconds - (starts[-1] + length) > 0.01:
        starts.append(seconds - length)
    return [(round(start, 2), round(min(start + length, seconds), 2)) for start in starts]
