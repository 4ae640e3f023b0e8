"""How long tests wait for other processes: until nobody would take them for busy any more."""

HANGS = 1800.0  # seconds
