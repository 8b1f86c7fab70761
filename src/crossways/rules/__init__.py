"""Rules: small frozen values without parameters that score and select token-expert pairs."""
