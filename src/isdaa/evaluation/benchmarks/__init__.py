"""Instruction-following benchmarks by a judge: data and pure functions; who generates and judges is elsewhere."""
