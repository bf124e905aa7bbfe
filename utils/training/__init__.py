"""One training run, from building the trainer to the files in its run folder.

May import `nets` and all other packages of `utils`. `settings` is the `Config` of train.py throughout.
"""
