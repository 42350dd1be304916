"""regpt: GPT-2, from raw text to a served model."""

__version__ = "0.1.0"
