"""From image and label files to batches on the training device.

May import `nets`, `utils.detection` and `utils.system`.
"""
