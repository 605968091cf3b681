"""Inference libraries, each behind the same few calls. They run the loop and decide nothing."""
