"""Experts merged into those that stay: which into which, and what becomes of the weights."""
