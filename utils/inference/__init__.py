"""From a source through the detector to outputs.

May import `nets`, `utils.weights` and the packages below it.
"""
