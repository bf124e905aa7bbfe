"""Metrics and what follows from them: significance of differences and likely label errors.

May import `nets`, `utils.inference` and the packages below it.
"""
