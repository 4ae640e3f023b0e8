"""Drawing responses from a model as it is."""
