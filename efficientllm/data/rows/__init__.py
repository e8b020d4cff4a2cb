"""Rows for training as grain iterators. Apart from the rest because importing grain takes a second."""
