"""A bundle as a static web site that samples in the browser."""
