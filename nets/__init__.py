"""The network: backbone, attention blocks, neck and heads, and the specification that describes it.

Imports nothing from the rest of the project.
"""
