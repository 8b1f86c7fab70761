"""The module saved beside a configuration, so that a program that knows only transformers finds this package."""

from __future__ import annotations

POINTER_MODULE = "modeling_crossways"
POINTER_SOURCE = '''"""Leads transformers' Auto classes to the installed `crossways` package."""

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM, CrosswaysModel

__all__ = ["CrosswaysConfig", "CrosswaysForCausalLM", "CrosswaysModel"]
'''
AUTO_MAP = {
    "AutoConfig": f"{POINTER_MODULE}.CrosswaysConfig",
    "AutoModel": f"{POINTER_MODULE}.CrosswaysModel",
    "AutoModelForCausalLM": f"{POINTER_MODULE}.CrosswaysForCausalLM",
}
