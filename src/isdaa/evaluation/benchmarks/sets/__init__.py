"""The benchmarks: their files, prompts for the judge, and what verdicts come to. Pure functions."""
