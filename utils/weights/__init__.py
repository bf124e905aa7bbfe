"""Weights files: checkpoints, published weights and Darknet weights.

May import `nets`, `utils.data` and the packages below it.
"""
