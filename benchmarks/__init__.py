"""Measurements, one command a table; not part of the installed package."""
