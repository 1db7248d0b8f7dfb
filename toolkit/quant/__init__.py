"""Arithmetic on arrays; knows no files and no graphs."""
