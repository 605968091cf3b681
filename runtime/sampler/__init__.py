"""A bundle on a backend, ready to sample and to edit."""

from .sampler import Sampler

__all__ = ["Sampler"]
