"""The guard over a run: it measures the policy while it trains."""
