"""Train the best language model that fits, code and weights together, in 16,000,000 bytes."""

__version__ = "0.1.0"
