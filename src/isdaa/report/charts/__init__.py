"""Charts, and how one becomes a picture."""
