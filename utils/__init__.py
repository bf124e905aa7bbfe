"""Code shared by the scripts, in eight packages. Imports point down only:

training, reports, evaluation, inference, weights, data, detection, system.
"""
