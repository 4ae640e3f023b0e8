"""Did a run over-optimise? The statistics behind that sentence."""
