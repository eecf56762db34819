"""dashbench: measure trainable sparse attentions side by side. See README.md."""

__version__ = "0.1.0"
