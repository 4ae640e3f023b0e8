"""The stages `sft`, `label`, `reward` and `align`, and what they start from."""
