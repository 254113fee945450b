"""Bridges to other libraries; each is a module of its own and imports its library only when imported."""
