"""Sources of images. They import Pillow where they draw or read, so that specs are checked without it."""
