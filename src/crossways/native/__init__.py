"""The C++ parts: compiled on first use where a compiler is present, and done without where it is not."""

from crossways.native.loading import library, why_not_native

__all__ = ["library", "why_not_native"]
