"""The benchmarks as pure functions: their files, their prompts for the judge, their scores."""
