"""Upcycling: a dense model becomes a routed one, and starts as the same function wherever that can be."""

from crossways.surgery.upcycle.model import Upcycled, upcycle
from crossways.surgery.upcycle.settings import UpcycleSettings

__all__ = ["UpcycleSettings", "Upcycled", "upcycle"]
