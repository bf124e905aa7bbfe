"""Plots, HTML reports, and explanations of single predictions.

May import `nets`, `utils.evaluation` and the packages below it.
"""
