"""Runnable experiments: ``python -m recipes.NAME``; each chooses, none defines layers or loops."""
