"""From a folder of images and masks to a trained network, its scores and its pictures; the command line calls it.

Needs the extra ``train`` (``pip install 'refinenet_fast[train]'``); nothing in ``import refinenet_fast`` imports it.
"""
