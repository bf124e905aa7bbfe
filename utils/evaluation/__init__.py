"""Metrics, the significance of differences, and likely label errors.

May import `nets`, `utils.inference` and the packages below it.
"""
