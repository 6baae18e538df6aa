"""bnport: move BatchNorm parameters between deep-learning frameworks, and prove the result."""

__version__ = "0.1.0"
