"""Infrastructure: command line, errors, files, devices, processes, signals and downloads.

Imports nothing from the other packages.
"""
