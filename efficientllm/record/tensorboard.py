"""TensorBoard event files through TensorBoard's own writer, without TensorFlow or torch."""

import time
import typing

import numpy as np

from efficientllm.record import run_name
from efficientllm.typing import PathLike


class SummaryWriter:
    """Writes one event file into `folder`.

    `first_step` is the first step that this writer will write. TensorBoard then drops the values that earlier files of
    the folder have for it and later steps, so that a run that was killed and resumed from an older checkpoint has one
    value per step. (The server does so; the `EventAccumulator` of scripts keeps both values, the later one last.)
    """

    def __init__(self, folder: PathLike, first_step: int = 0):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = event_pb2.Event
        self._file = EventFileWriter(str(folder), max_queue_size=1000, flush_secs=10)
        # TensorBoard drops values at a session start only if the folder has an earlier one: this may be the first.
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.add_event(self._event(wall_time=time.time(), step=first_step, session_log=session))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes `{tag: number}` at one step."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.scalar import metadata

        scalar = metadata.create_summary_metadata(display_name=None, description=None)
        scalar.data_class = summary_pb2.DATA_CLASS_SCALAR
        self._add(step, [(tag, np.float32(value), scalar) for tag, value in values.items()])

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        """Writes a Markdown text."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.text import metadata

        text = metadata.create_summary_metadata(display_name=None, description=None)
        text.data_class = summary_pb2.DATA_CLASS_TENSOR
        self._add(step, [(tag, np.array(markdown.encode(), dtype=object), text)])

    def image(self, tag: str, png: bytes, width: int, height: int, step: int = 0) -> None:
        """Writes a picture, the bytes of a PNG file."""
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.plugins.image import metadata

        picture = metadata.create_summary_metadata(display_name=None, description=None)
        picture.data_class = summary_pb2.DATA_CLASS_BLOB_SEQUENCE
        sides = (str(side).encode() for side in (width, height))
        self._add(step, [(tag, np.array([*sides, png], dtype=object), picture)])

    def hparams(self, config: dict[str, typing.Any], row: dict[str, float | None]) -> None:
        """Writes a line of TensorBoard's HParams table: config keys (`run_name.compared_keys`), numbers of the row.

        `config` is flat, `{dotted key: number, string, bool or None}`, `row` `{key: number or None}`. The numbers
        become scalars at step 0 under `_row/`, which sorts before all other tags; a null is left out, as the table
        knows none.
        """
        from tensorboard.plugins.hparams import summary_v2

        hparams = {key: _plain(value) for key, value in run_name.compared_keys(config).items()}
        summary = summary_v2.hparams_pb(hparams, trial_id=run_name.name(config))
        self._file.add_event(self._event(wall_time=time.time(), step=0, summary=summary))
        self.scalars(0, {f"_row/{key}": value for key, value in row.items() if value is not None})

    def _add(self, step, rows):
        from tensorboard.util.tensor_util import make_tensor_proto

        event = self._event(wall_time=time.time(), step=step)
        for tag, value, metadata in rows:
            event.summary.value.add(tag=tag, tensor=make_tensor_proto(value), metadata=metadata)
        self._file.add_event(event)

    def flush(self) -> None:
        """Waits until everything is in the file."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def _plain(value):
    return value if isinstance(value, bool | int | float | str) else str(value)
