"""The alignment tax: what lm-eval's tasks say before and after."""
