"""`ImageFormat`: the size, channels and classes of data, for which a diffusion model is built."""

import typing


class ImageFormat(typing.NamedTuple):
    """What a model must know of its pictures, which are latents where there is an autoencoder.

    `side` is that of square pictures; others have `(height, width)`, videos `(frames, height, width)`.
    """

    side: int | tuple[int, ...]
    channels: int
    classes: int

    @classmethod
    def of_size(cls, size: tuple[int, ...], channels: int, classes: int) -> "ImageFormat":
        """Makes the format of a `size`."""
        is_square = len(size) == 2 and size[0] == size[1]
        return cls(size[0] if is_square else size, channels, classes)

    @property
    def size(self) -> tuple[int, ...]:
        """`(height, width)`, with the frames of a video before them."""
        return (self.side, self.side) if isinstance(self.side, int) else tuple(self.side)

    def fields(self) -> dict[str, typing.Any]:
        """The fields of an `embed` spec that say the same."""
        return self._asdict() if isinstance(self.side, int) else self._asdict() | {"side": None, "size": self.size}
