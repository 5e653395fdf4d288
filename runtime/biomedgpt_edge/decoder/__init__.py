"""Decoders: one protocol, one implementation per engine."""
