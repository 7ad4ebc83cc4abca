"""The benchmark of the gateway measures both ways on the same chunks."""

import pytest

from benchmarks.gateway_cost import measure, report


@pytest.mark.process
def test_every_chunk_of_both_ways_is_timed() -> None:
    ways = measure(num_calls=2, num_chunks=5, interval_ms=1.0)
    for way in ways.values():
        assert len(way.first_ms) == 2
        assert len(way.chunk_ms) == 2 * 4
        assert min(way.chunk_ms) > 0
    found = report(ways)
    assert found["chunk_ms"]["added"] == pytest.approx(
        found["chunk_ms"]["median"]["http"] - found["chunk_ms"]["median"]["grpc"]
    )
