"""Inference libraries, each behind the same few calls. The loop and the update are theirs to run,
not to decide."""
