"""Families, the walk over decoder blocks, and the surgery that cuts one to a plan."""
