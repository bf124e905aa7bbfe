"""The mathematics of detection: boxes, anchors, target assignment, loss and non-maximum suppression.

May import `nets` and `utils.system`.
"""
