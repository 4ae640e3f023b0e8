"""Pictures of what evaluation measured."""
