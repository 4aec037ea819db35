"""First-order local influence (FI): which pieces of a model or of its input are fragile."""

__version__ = "0.1.0"
