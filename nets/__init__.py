"""The network and its specification. Imports nothing from the rest of the project."""
