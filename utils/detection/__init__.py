"""The mathematics of detection: boxes, anchors, loss and non-maximum suppression.

May import `nets` and `utils.system`.
"""
