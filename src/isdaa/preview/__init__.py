"""`isdaa inspect`: what a run will read and need, before it begins."""
