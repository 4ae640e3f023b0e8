"""Where rows come from, and what other tools' files become."""
