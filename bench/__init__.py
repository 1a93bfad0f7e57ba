"""From raw latencies to figures that can be trusted: the workload, its orchestration and its statistics."""
